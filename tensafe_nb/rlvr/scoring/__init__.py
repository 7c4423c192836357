"""Runs reward functions over rollouts, in threads and processes."""
