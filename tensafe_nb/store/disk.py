"""How the store touches the disk: whatever must outlive a power cut goes through `Files`.

A new file is written under a name of its own making, fsynced, given its real name in one step, and its folder fsynced.
So under its name it is whole or absent, and once `Draft.publish` has returned it is there for good.
"""

import errno
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from tensafe_nb.errors import StorageError

if sys.platform != "win32":
    import fcntl

    def _flock(file: BinaryIO, exclusive: bool, wait: bool) -> bool:
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        try:
            fcntl.flock(file.fileno(), kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(file: BinaryIO) -> None:
        fcntl.flock(
            file.fileno(), fcntl.LOCK_UN
        )  # closing alone would not, while a forked child holds a copy
else:  # no locks there: what another process has open cannot be removed, two rotations at once are the user's to avoid

    def _flock(file: BinaryIO, exclusive: bool, wait: bool) -> bool:
        return True

    def _unlock(file: BinaryIO) -> None:
        pass


DRAFTS = ".tensafe-*.tmp"
_ADVICE = {
    errno.ENOSPC: " Free some space, or set TENSAFE_HOME to a folder on another disk.",
    errno.EDQUOT: " Free some of your quota, or set TENSAFE_HOME to a folder on another disk.",
    errno.EACCES: " Give this user the right to read and write there, or set TENSAFE_HOME to another folder.",
    errno.EROFS: " That disk is read-only; set TENSAFE_HOME to a folder that can be written.",
}


class Files:
    """The calls whose order decides what a power cut leaves. The tests put a failing disk in their place."""

    def mkdir(self, folder: Path) -> None:
        """Make a folder that only its owner can enter; one that is there already is left as it is."""
        folder.mkdir(mode=0o700, exist_ok=True)

    def create(self, path: Path) -> BinaryIO:
        """Make a new file that only its owner can read, open for writing and reading."""
        return open(path, "x+b", opener=_private)

    def append(self, path: Path) -> BinaryIO:
        """Open a file to write behind its end, wherever others have moved that; make it where there is none."""
        return open(path, "a+b", opener=_private)

    def update(self, path: Path) -> BinaryIO:
        """Open a file to change bytes in place."""
        return path.open("r+b")

    def fsync(self, file: BinaryIO) -> None:
        """Return when everything written to the file is on the disk."""
        file.flush()
        os.fsync(file.fileno())

    def replace(self, source: Path, target: Path) -> None:
        """Give a file another name in one step, in place of what has that name."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()

    def fsync_folder(self, folder: Path) -> None:
        """Return when the names in a folder are on the disk."""
        if sys.platform == "win32":  # there, names need no such call and offer none
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Draft:
    """A file in the making. It leaves no trace unless it is published.

    It is locked while it is open, so that others can tell it from one whose process died.
    """

    def __init__(self, files: Files, folder: Path) -> None:
        self._files = files
        self._path: Path | None = folder / DRAFTS.replace("*", secrets.token_hex(16))
        self.file = files.create(self._path)
        _flock(self.file, exclusive=True, wait=False)

    def __enter__(self) -> "Draft":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a full disk refuses at closing, too, what it refused before
            self.file.close()
        if self._path is not None:
            with suppress(OSError):  # the error that led here is the one to tell; the next save sweeps
                self._files.unlink(self._path)

    def sync(self) -> None:
        """Return when what was written so far is on the disk."""
        self._files.fsync(self.file)

    def publish(self, target: Path) -> None:
        """Give it its name, for good; on an error the name stays free.

        Args:
            target: In the same folder. What has this name is replaced.
        """
        assert self._path is not None, "published twice"
        self.sync()
        self.file.close()
        self._files.replace(self._path, target)
        self._path = target  # until the name is on the disk, leaving removes it
        self._files.fsync_folder(target.parent)
        self._path = None


def make_folder(files: Files, folder: Path) -> None:
    """Make a folder and those above it, for good."""
    if not folder.parent.is_dir():
        make_folder(files, folder.parent)
    files.mkdir(folder)
    files.fsync_folder(folder.parent)


def sweep_drafts(files: Files, folder: Path) -> None:
    """Remove drafts whose process died. Nobody may make one meanwhile."""
    for path in folder.glob(DRAFTS):
        with suppress(FileNotFoundError, PermissionError), path.open("r+b") as draft:
            if _flock(draft, exclusive=True, wait=False):
                files.unlink(path)


@contextmanager
def locked(path: Path, *, exclusive: bool, wait: bool = True) -> Iterator[bool]:
    """Hold the lock that a file stands for, and yield whether it was to be had."""
    with open(
        path, "a+b", opener=_private
    ) as file:  # both ways, for network folders lock only what is open so
        held = _flock(file, exclusive, wait)
        try:
            yield held
        finally:
            _unlock(file)


def write_private(path: Path, text: str) -> None:
    """Write a text for its owner only, whole or not at all; not fsynced: it is written at every step of a run.

    Raises:
        StorageError: It could not be written; what was there is intact.
    """
    temp = path.with_name(f"{path.name}.tmp")
    try:
        with os.fdopen(
            os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
        ) as file:
            file.write(text)
        temp.replace(path)
    except OSError as error:
        temp.unlink(missing_ok=True)
        raise StorageError(
            f"{path} could not be written ({error.strerror}). Make room or choose another folder."
        ) from error


@contextmanager
def disk_errors(action: str) -> Iterator[None]:
    """Turn what the operating system refuses into a `StorageError` that says what was being done."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise StorageError(
            f"Could not {action}: {error.strerror or error}{where}. What was stored before is intact."
            f"{_ADVICE.get(error.errno or 0, '')}",
            details={"errno": error.errno},
        ) from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
