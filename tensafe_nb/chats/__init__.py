"""Chats: talking to one training client, or to several side by side, and what of it becomes a preference data set."""
