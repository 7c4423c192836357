"""Keys: where they come from, and the ring that holds them."""
