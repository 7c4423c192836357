"""Writes that outlive a power cut: every one of them goes through `Files`.

A new file is written under a name of its own making, fsynced, given its real name in one step, and its folder fsynced.
So under its name it is whole or absent, and once `Draft.publish` has returned it is there for good.
"""

import errno
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeAlias

from tensafe_nb.errors import StorageError
from tensafe_nb.locks import hold

Buffer: TypeAlias = bytes | bytearray | memoryview

DRAFTS = ".tensafe-*.tmp"
ADVICE = {  # by what the system says; a server tells its users something else
    errno.ENOSPC: " Free some space, or set TENSAFE_HOME to a folder on another disk.",
    errno.EDQUOT: " Free some of your quota, or set TENSAFE_HOME to a folder on another disk.",
    errno.EACCES: " Give this user the right to read and write there, or set TENSAFE_HOME to another folder.",
    errno.EFBIG: " Free some space or raise the limit (ulimit -f), or set TENSAFE_HOME to a folder on another disk.",
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

    def create_shared(self, path: Path) -> BinaryIO:
        """Make a new file that others can read as far as the user's umask lets them, open in the same way."""
        return path.open("x+b")

    def append(self, path: Path) -> BinaryIO:
        """Open a file to write behind its end, wherever others have moved that; make it where there is none."""
        return open(path, "a+b", opener=_private)

    def update(self, path: Path) -> BinaryIO:
        """Open a file to change bytes in place."""
        return path.open("r+b")

    def unbuffered(self, path: Path, *, append: bool = False) -> FileIO:
        """Open a file each of whose writes reaches the system whole and at once; make it where there is none."""
        flags = os.O_CREAT | (os.O_APPEND if append else 0)
        return FileIO(path, "r+", opener=lambda name, mode: _private(name, mode | flags))

    def fsync(self, file: BinaryIO) -> None:
        """Return when everything written to the file is on the disk."""
        file.flush()
        os.fsync(file.fileno())

    def replace(self, source: Path, target: Path) -> None:
        """Give a file another name in one step, in place of what has that name."""
        source.replace(target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name, unless something has that name: unlike `replace`, it takes none away."""
        os.link(source, target)

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

    def __init__(self, files: Files, folder: Path, *, shared: bool = False) -> None:
        self._files = files
        self._path: Path | None = folder / DRAFTS.replace("*", secrets.token_hex(16))
        self.file = files.create_shared(self._path) if shared else files.create(self._path)
        hold(self.file)  # let go by closing it, or by dying

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

    def publish(self, target: Path, *, fresh: bool = False, lasting: bool = True) -> None:
        """Give it its name, for good; on an error the name stays free.

        Args:
            target: In the same folder. What has this name is replaced.
            fresh: Replace nothing.
            lasting: Return when it is on the disk. Else it is whole for whoever looks, and a power cut may take it.

        Raises:
            FileExistsError: `fresh`, and something has this name.
        """
        assert self._path is not None, "published twice"
        if lasting:
            self.sync()
        self.file.close()
        if fresh:
            self._files.link(self._path, target)
            self._files.unlink(self._path)
        else:
            self._files.replace(self._path, target)
        self._path = target  # until the name is on the disk, leaving removes it
        if lasting:
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
            if hold(draft):
                files.unlink(path)


def publish_folder(files: Files, draft: Path, target: Path) -> None:
    """Give a folder its name, once all that lies in it is on the disk; an empty one of that name gives way."""
    for file in draft.iterdir():
        with files.update(file) as written:
            files.fsync(written)
    files.fsync_folder(draft)
    if target.exists():
        target.rmdir()
    files.replace(draft, target)
    files.fsync_folder(target.parent)


def write_whole(path: Path, content: str | bytes, *, shared: bool = False) -> None:
    """Write a text or bytes, whole or not at all; not fsynced: a run does it at every step.

    Args:
        path: What is there is replaced.
        content: What to write.
        shared: Others may read it, as far as the umask lets them; else only its owner.

    Raises:
        StorageError: It could not be written; what was there is intact.
    """
    try:
        with Draft(Files(), path.parent, shared=shared) as draft:
            draft.file.write(content.encode() if isinstance(content, str) else content)
            draft.publish(path, lasting=False)
    except OSError as error:
        raise StorageError(
            f"{path} could not be written ({error.strerror}). Make room or choose another folder."
        ) from error


# Unbuffered files may give or take less than they are asked to


def fill(file: BinaryIO, buffer: bytearray | memoryview) -> memoryview:
    """Read until the buffer is full, less only at the end, and return what is filled."""
    view, filled = memoryview(buffer), 0
    while filled < len(view) and (count := file.readinto(view[filled:])):  # type: ignore[attr-defined]
        filled += count
    return view[:filled]


def read_up_to(file: BinaryIO, size: int) -> bytes:
    """Read `size` bytes, fewer only at the end."""
    data = file.read(size)
    while data and len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


def write_all(out: BinaryIO, data: Buffer) -> None:
    """Write everything: on a full disk, a part is taken, and only the next write says so."""
    written = out.write(data)
    while written < len(data):
        written += out.write(memoryview(data)[written:])


@contextmanager
def disk_errors(action: str) -> Iterator[None]:
    """Turn what the operating system refuses into a `StorageError` that says what was being done."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(error.filename) not in action else ""
        raise StorageError(
            f"Could not {action}: {error.strerror or error}{where}. What was stored before is intact."
            f"{ADVICE.get(error.errno or 0, '')}",
            details={"errno": error.errno},
        ) from error


def _private(path: str, flags: int) -> int:  # an opener: files are their owner's alone
    return os.open(path, flags, 0o600)
