"""The data behind panels and pictures: one feed for each training client, read from its state."""
