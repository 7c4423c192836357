"""File locks of the operating system, held through an open file: they end with it, or with the process that has it.

Elsewhere they are advisory (`flock`). Windows locks bytes, and what is locked there nobody else can read or write. So
one byte is locked that no file has, far beyond the end of the largest: the lock keeps out others that ask for it, and
nobody else. Libraries for this lock the file's own bytes, or know no shared locks.
"""

import ctypes
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCKED_BYTE = 1 << 62
FAIL_IMMEDIATELY, EXCLUSIVE = 1, 2  # flags of LockFileEx
LOCK_VIOLATION, NOT_LOCKED = 33, 158  # errors of it and of UnlockFileEx


def hold(file: IO[Any], *, exclusive: bool = True, wait: bool = False) -> bool:
    """Lock an open file until it is let go or closed; return whether the lock was to be had."""
    if sys.platform == "win32":
        return _windows.hold(msvcrt.get_osfhandle(file.fileno()), exclusive=exclusive, wait=wait)
    else:  # noqa: RET505  # so that type checkers on Windows leave it out
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        try:
            fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def let_go(file: IO[Any]) -> None:
    """Unlock an open file: closing alone would not, while a forked child holds a copy of it."""
    if sys.platform == "win32":
        _windows.let_go(msvcrt.get_osfhandle(file.fileno()))
    else:
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


# Windows


class Overlapped(ctypes.Structure):
    """The OVERLAPPED of Windows: where the bytes begin, in two halves."""

    _fields_ = (
        ("Internal", ctypes.c_void_p),
        ("InternalHigh", ctypes.c_void_p),
        ("Offset", ctypes.c_uint32),
        ("OffsetHigh", ctypes.c_uint32),
        ("hEvent", ctypes.c_void_p),
    )

    @classmethod
    def at_locked_byte(cls) -> "Overlapped":
        return cls(Offset=LOCKED_BYTE & 0xFFFFFFFF, OffsetHigh=LOCKED_BYTE >> 32)


class ByteLocks:
    """Locks of the byte that stands for a file. They belong to a handle, and end with it.

    Args:
        kernel32: The library that has `LockFileEx`.
        last_error: Returns why its last call failed.
    """

    def __init__(self, kernel32: Any, last_error: Callable[[], int]) -> None:
        self._kernel32, self._last_error = kernel32, last_error

    def hold(self, handle: int, *, exclusive: bool, wait: bool) -> bool:
        """Lock it; return whether the lock was to be had."""
        flags = EXCLUSIVE * exclusive | FAIL_IMMEDIATELY * (not wait)
        begin = ctypes.byref(Overlapped.at_locked_byte())
        done = self._kernel32.LockFileEx(ctypes.c_void_p(handle), flags, 0, 1, 0, begin)
        return bool(done) or self._failed(but_for=LOCK_VIOLATION)

    def let_go(self, handle: int) -> None:
        """Unlock it, if it is locked through this handle."""
        begin = ctypes.byref(Overlapped.at_locked_byte())
        done = self._kernel32.UnlockFileEx(ctypes.c_void_p(handle), 0, 1, 0, begin)
        if not done:
            self._failed(but_for=NOT_LOCKED)

    def _failed(self, but_for: int) -> bool:
        code = self._last_error()
        if code != but_for:
            raise OSError(errno.ENOLCK, f"Windows cannot lock it: error {code}")
        return False


if sys.platform == "win32":
    _windows = ByteLocks(ctypes.WinDLL("kernel32", use_last_error=True), ctypes.get_last_error)
