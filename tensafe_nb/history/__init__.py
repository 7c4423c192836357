"""The past of a training client: the log of its events, and the state that they add up to."""
