"""Plain data that crosses a wall: batches, operations, results, and the codec that writes them."""
