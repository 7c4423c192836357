"""Transports: the lines from a client to its core, in the same process or across a network."""
