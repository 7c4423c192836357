"""Differential privacy: what a run spends, where that is written down, and what may be said about it."""
