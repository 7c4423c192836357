"""Policy-gradient algorithms: advantages, losses, updates."""
