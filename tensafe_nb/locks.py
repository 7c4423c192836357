"""File locks: the advisory ones of the operating system, which end with the process that holds them.

Windows has none of them: there, a log counts as nobody's, and two processes that share a home folder are the user's
to avoid.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

if sys.platform != "win32":
    import fcntl


def hold(file: IO[Any], *, exclusive: bool = True, wait: bool = False) -> bool:
    """Lock an open file until it is let go or closed; return whether the lock was to be had."""
    if sys.platform == "win32":
        return True
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def let_go(file: IO[Any]) -> None:
    """Unlock an open file: closing alone would not, while a forked child holds a copy of it."""
    if sys.platform != "win32":
        fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def locked(file: IO[Any], *, exclusive: bool, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of an open file, and yield whether it was to be had."""
    try:
        yield hold(file, exclusive=exclusive, wait=wait)
    finally:
        let_go(file)


@contextmanager
def held(path: Path, *, exclusive: bool, wait: bool = True) -> Iterator[bool]:
    """Hold the lock that a file stands for, made if need be, and yield whether it was to be had."""
    descriptor = os.open(
        path, os.O_RDWR | os.O_CREAT, 0o600
    )  # both ways: network folders lock only what is open so
    with os.fdopen(descriptor, "r+b") as file, locked(file, exclusive=exclusive, wait=wait) as had:
        yield had


def is_being_written(path: Path) -> bool:
    """Whether some process, this one included, holds a log open: its end is still to come."""
    with path.open("rb") as log, locked(log, exclusive=False, wait=False) as had:
        return not had
