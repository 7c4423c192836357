"""File locks: which process has a file for itself."""

import sys
from pathlib import Path
from typing import TextIO

if sys.platform != "win32":  # there, a run of another process counts as interrupted
    import fcntl


def is_being_written(path: Path) -> bool:
    """Whether some process, this one included, holds the log open: its end is still to come."""
    if sys.platform == "win32":
        return False
    with path.open("r") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def hold(log: TextIO) -> None:
    if sys.platform != "win32":
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
