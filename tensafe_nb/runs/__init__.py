"""Training runs: the loop that drives a client, its record, its checkpoints and its alarms."""
