"""Artifacts: sealed checkpoints, by id and by name."""
