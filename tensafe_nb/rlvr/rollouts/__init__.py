"""Rollouts: prompts in, sampled trajectories out."""
