"""The two files of an audit log, held by one thread of one process at a time."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from tensafe_nb.locks import locked
from tensafe_nb.store.disk import Files, disk_errors, make_folder

logger = logging.getLogger(__name__)


class LogFiles:
    """Log and key file, open for reading and writing.

    The key file is overwritten in place, in one write of one page: a process that dies leaves the old page or the new
    one; no older key stays behind on the disk under another name; and a machine that dies has most likely written
    back either both files or neither, where a rename would put the key on the disk well before the log.
    """

    def __init__(self, path: Path, log: FileIO, key: FileIO, files: Files) -> None:
        self._files = files
        self.path = path
        self.log = log
        self._key = key

    @property
    def size(self) -> int:
        """Of the log."""
        return os.fstat(self.log.fileno()).st_size

    def page(self) -> bytes:
        """Return the key file's content; nothing where there was none."""
        self._key.seek(0)
        return self._key.read()

    def append(self, line: bytes, sync: bool) -> None:
        """Write a line at the log's end, or leave the log as it was."""
        self._put(self.log, line, sync)

    def keep(self, page: bytes, sync: bool) -> None:
        """Overwrite the key file."""
        self._key.seek(0)
        self._put(self._key, page, sync)

    def keep_names(self) -> None:
        """Return when both files' names are on the disk."""
        self._files.fsync_folder(self.path.parent)

    def set_aside(self, unfinished: bytes) -> None:
        """Move the log's last bytes to a file of their own."""
        aside = self.path.with_name(f"{self.path.name}.torn")
        with self._files.unbuffered(aside, append=True) as file:
            self._put(file, unfinished + b"\n", sync=True)
        # only now that they are on the disk elsewhere
        self.log.truncate(self.size - len(unfinished))
        logger.warning(
            "%s ended in %d bytes of an unfinished record; they are now in %s",
            self.path,
            len(unfinished),
            aside,
        )

    def _put(self, file: FileIO, data: bytes, sync: bool) -> None:
        """Write all of it, or leave the file as long as it was."""
        before = os.fstat(file.fileno()).st_size
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(before)
            raise
        if sync:
            self._files.fsync(file)


@contextmanager
def opened(path: Path, files: Files) -> Iterator[LogFiles]:
    """Open a log and its key file, made if need be, while nobody else appends or takes a snapshot.

    Raises:
        StorageError: They cannot be written; what is in them is intact.
    """
    with disk_errors("write the audit log"):
        if not path.parent.is_dir():
            make_folder(files, path.parent)
        # the log's own lock guards both: the key file is opened under it, and closed before it is let go
        with (
            files.unbuffered(path, append=True) as log,
            locked(log, exclusive=True),
            files.unbuffered(path.with_suffix(".key")) as key,
        ):
            yield LogFiles(path, log, key, files)


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
