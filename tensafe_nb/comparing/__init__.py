"""Comparisons: arms raced over common seeds, and what may be said of their differences."""
