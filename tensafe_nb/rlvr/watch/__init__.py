"""Metrics, alarms, evaluation and previews of a reinforcement-learning run."""
