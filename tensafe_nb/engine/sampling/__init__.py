"""Draws completions: the sampler, and the steps of a decoder."""
