"""Model files in, modules out: loading, adapters, quantised files, memory."""
