"""Where things are kept: the home folder and, later, artifacts and keys."""
