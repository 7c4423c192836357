"""The two files of an audit log, held by one thread of one process at a time."""

import errno
import logging
import os
import sys
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from tensafe_nb.locks import hold, let_go, locked
from tensafe_nb.store.disk import Files, disk_errors, make_folder

logger = logging.getLogger(__name__)

LONGEST_PAGE = 64 << 10  # of a key file; ours has 4 KiB


class LogFiles:
    """Log and key file. They stay open from one record to the next, and are locked for each.

    The key file is overwritten in place, in one write of one page: a process that dies leaves the old page or the new
    one; no older key stays behind on the disk under another name; and a machine that dies has most likely written
    back either both files or neither, where a rename would put the key on the disk well before the log.

    Args:
        path: Of the log.
        files: How the disk is touched.
    """

    def __init__(self, path: Path, files: Files) -> None:
        self._files = files
        self.path, self.size, self._page_size = path, 0, 0
        self._log = OpenFile(path)
        self._key = OpenFile(path.with_suffix(".key"))

    def __enter__(self) -> None:
        """Hold the files, made if need be, while nobody else appends or takes a snapshot.

        Raises:
            StorageError: They cannot be written; what is in them is intact.
        """
        try:
            while not self._hold():
                self.close()  # it was moved or removed: its name stands for another log, or for one to come
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log.file is not None:
            let_go(self._log.file)
        if sys.platform == "win32":  # there, what is open can be neither moved nor removed
            self.close()
        if isinstance(error, OSError):
            with disk_errors("write the audit log"):
                raise error

    def _hold(self) -> bool:
        """Lock the log, which guards both files; return whether it is still the one of its name."""
        if self._log.file is None:
            if not self.path.parent.is_dir():
                make_folder(self._files, self.path.parent)
            self._log.open(self._files, append=True)
        hold(self._log.now, wait=True)
        size = self._log.size_by_name()
        if size is None:
            return False
        self.size = size
        if self._key.file is None or self._key.size_by_name() is None:
            self._key.open(self._files)
        return True

    def close(self) -> None:
        """Close the files; who holds them next opens them again."""
        self._key.close()
        self._log.close()

    def page(self) -> bytes:
        """Return the key file's content; nothing where there was none."""
        self._key.now.seek(0)
        page = self._key.now.read(LONGEST_PAGE)
        self._page_size = len(page)
        return page

    def append(self, line: bytes, sync: bool) -> None:
        """Write a line at the log's end, or leave the log as it was."""
        self._put(self._log.now, line, self.size, sync)
        self.size += len(line)

    def keep(self, page: bytes, sync: bool) -> None:
        """Overwrite the key file."""
        self._key.now.seek(0)
        self._put(self._key.now, page, self._page_size, sync)
        self._page_size = len(page)

    def keep_names(self) -> None:
        """Return when both files' names are on the disk."""
        self._files.fsync_folder(self.path.parent)

    def set_aside(self, unfinished: bytes) -> None:
        """Move the log's last bytes to a file of their own."""
        aside = self.path.with_name(f"{self.path.name}.torn")
        with self._files.unbuffered(aside, append=True) as file:
            self._put(file, unfinished + b"\n", os.fstat(file.fileno()).st_size, sync=True)
        # only now that they are on the disk elsewhere
        self.size -= len(unfinished)
        self._log.now.truncate(self.size)
        logger.warning(
            "%s ended in %d bytes of an unfinished record; they are now in %s",
            self.path,
            len(unfinished),
            aside,
        )

    def _put(self, file: FileIO, data: bytes, before: int, sync: bool) -> None:
        """Write all of it, or leave the file as long as it was."""
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(before)
            raise
        if sync:
            self._files.fsync(file)


class OpenFile:
    """A file that is kept open for as long as its name stands for it.

    Args:
        path: Its name.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._name = path, os.fspath(path)
        self.file: FileIO | None = None
        self._identity = (0, 0)  # device and inode

    @property
    def now(self) -> FileIO:
        """The open file."""
        assert self.file is not None, "it is not held"
        return self.file

    def open(self, files: Files, *, append: bool = False) -> None:
        """Open what its name stands for now, made if need be."""
        self.close()
        self.file = files.unbuffered(self._path, append=append)
        found = os.fstat(self.file.fileno())
        self._identity = found.st_dev, found.st_ino

    def size_by_name(self) -> int | None:
        """Return the file's size; None where its name stands for another, or for none."""
        try:
            found = os.stat(self._name)  # noqa: PTH116  # twice with each operation
        except FileNotFoundError:
            return None
        return found.st_size if (found.st_dev, found.st_ino) == self._identity else None

    def close(self) -> None:
        """Close it, if it is open."""
        file, self.file = self.file, None
        if file is not None:
            file.close()


def snapshot(path: Path, log: BinaryIO) -> tuple[int, bytes]:
    """Return the size of a log and the content of its key file, as they belong together."""
    with locked(log, exclusive=False):
        return log.seek(0, os.SEEK_END), read_key_file(path)


def read_key_file(log: Path) -> bytes:
    """Return the content of the key file beside a log; nothing where there is none."""
    try:
        return log.with_suffix(".key").read_bytes()
    except FileNotFoundError:
        return b""
