"""Encrypted adapters as a notebook holds them: what is called, what encrypts, what is answered."""
