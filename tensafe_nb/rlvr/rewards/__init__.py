"""Rewards: what scores an answer, and how a reward function is called."""
