"""The store: home folder, keys, sealed artifacts, audit log."""
