"""Runs one training client: a worker thread, its queue, and what each operation does. No torch."""
