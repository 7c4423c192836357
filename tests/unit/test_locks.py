"""Locks of files: what is promised of them is asked of real ones here, and of what Windows is told, of a stand-in."""

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tensafe_nb import locks

HOLD_AND_SAY_SO = """
import sys
from tensafe_nb.locks import hold
file = open(sys.argv[1], "ab")
print(hold(file), flush=True)
sys.stdin.read()
"""
HELD_BY_ANOTHER = locks.LOCK_VIOLATION


def test_one_holds_it_alone_or_several_share_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.held(path, exclusive=True) as alone, locks.held(path, exclusive=False, wait=False) as other:
        assert (alone, other) == (True, False)
    with locks.held(path, exclusive=False) as one, locks.held(path, exclusive=False, wait=False) as two:
        assert (one, two) == (True, True)
        with locks.held(path, exclusive=True, wait=False) as three:
            assert not three


def test_it_ends_with_the_process_that_holds_it_and_keeps_nobody_from_reading(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"an event\n")
    command = [sys.executable, "-c", HOLD_AND_SAY_SO, str(log)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "True\n"
        assert locks.is_being_written(log)
        assert log.read_bytes() == b"an event\n"
        process.kill()
        process.wait()
    assert not locks.is_being_written(log)


class MockKernel32:
    """LockFileEx and UnlockFileEx by their documentation, over the handles of one file; waiting is refused."""

    def __init__(self) -> None:
        self.locks: list[tuple[int, int, bool]] = []  # (handle, byte, exclusive)
        self.error = 0

    def LockFileEx(self, handle: Any, flags: int, _: int, low: int, high: int, where: Any) -> int:
        byte = self._byte(low, high, where)
        exclusive = bool(flags & 2)
        assert flags & 1, "it would wait"
        taken = any(at == byte and (exclusive or theirs) for _, at, theirs in self.locks)
        self.error = HELD_BY_ANOTHER if taken else 0
        if not taken:
            self.locks.append((handle.value, byte, exclusive))
        return int(not taken)

    def UnlockFileEx(self, handle: Any, _: int, low: int, high: int, where: Any) -> int:
        byte = self._byte(low, high, where)
        found = [lock for lock in self.locks if lock[:2] == (handle.value, byte)]
        self.error = 0 if found else locks.NOT_LOCKED
        for lock in found[:1]:
            self.locks.remove(lock)
        return len(found)

    def _byte(self, low: int, high: int, where: Any) -> int:
        assert (low, high) == (1, 0)
        begin = where._obj
        return int(begin.OffsetHigh << 32 | begin.Offset)


@pytest.fixture
def kernel32() -> MockKernel32:
    return MockKernel32()


@pytest.fixture
def windows(kernel32: MockKernel32) -> locks.ByteLocks:
    return locks.ByteLocks(kernel32, lambda: kernel32.error)


def test_on_windows_too_one_holds_it_alone_or_several_share_it(windows: locks.ByteLocks) -> None:
    def hold(handle: int, *, exclusive: bool) -> bool:
        return windows.hold(handle, exclusive=exclusive, wait=False)

    assert hold(1, exclusive=True)
    assert not hold(2, exclusive=True)
    assert not hold(2, exclusive=False)
    windows.let_go(1)
    assert hold(2, exclusive=False)
    assert hold(3, exclusive=False)
    assert not hold(1, exclusive=True)
    windows.let_go(2)
    windows.let_go(3)
    assert hold(1, exclusive=True)


def test_on_windows_what_is_locked_lies_beyond_the_end_of_any_file_so_that_all_can_read_it(
    windows: locks.ByteLocks, kernel32: MockKernel32
) -> None:
    windows.hold(7, exclusive=True, wait=False)
    assert kernel32.locks == [(7, 1 << 62, True)]
    assert 1 << 62 > 2**57, "NTFS has no larger files"


def test_on_windows_letting_go_of_what_was_not_to_be_had_is_no_error_and_anything_else_is(
    windows: locks.ByteLocks,
) -> None:
    windows.let_go(1)
    broken = locks.ByteLocks(MockBroken(), lambda: 6)  # ERROR_INVALID_HANDLE
    with pytest.raises(OSError, match="error 6"):
        broken.hold(1, exclusive=True, wait=True)
    with pytest.raises(OSError, match="error 6"):
        broken.let_go(1)


class MockBroken:
    """Fails whatever it is asked."""

    def LockFileEx(self, *_: Any) -> int:
        return 0

    UnlockFileEx = LockFileEx


@pytest.mark.skipif(ctypes.sizeof(ctypes.c_void_p) != 8, reason="the figures are those of 64 bits")
def test_where_the_bytes_begin_is_laid_out_as_windows_reads_it() -> None:
    """The figures of minwinbase.h: two ULONG_PTR, two DWORD, a HANDLE."""
    layout = locks.Overlapped
    assert ctypes.sizeof(layout) == 32
    assert [getattr(layout, name).offset for name in ("Offset", "OffsetHigh", "hEvent")] == [16, 20, 24]
