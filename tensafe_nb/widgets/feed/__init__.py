"""What a panel shows, gathered from events."""
