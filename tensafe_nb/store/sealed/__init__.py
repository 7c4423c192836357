"""Sealed files: envelopes, payloads, key rotation."""
