"""Where things are kept: the home folder, keys, sealed artifacts, the audit log."""
