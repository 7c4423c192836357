"""What happened, kept and read back: the log, and the state that its events add up to."""
