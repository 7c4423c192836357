"""Widgets that follow a training while it runs, and their buttons."""
