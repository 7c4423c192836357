"""Sealed tables: small files, written again and again, that the privacy ledger keeps beside the audit log.

Each is one TSNB1 file named by a hash of what it is about. A rotation of keys rewraps them as it does artifacts.
"""

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tensafe_nb.locks import held
from tensafe_nb.store.disk import Draft, Files, disk_errors, make_folder, sweep_drafts
from tensafe_nb.store.keys.keyring import Keys
from tensafe_nb.store.sealed.envelope import content_hash, open_sealed, seal
from tensafe_nb.store.sealed.rotation import replay, rotate

Seen = tuple[int, int, int]


class SealedTables:
    """The sealed tables of one tenant. Nothing is made before the first is written.

    Args:
        folder: Holds them.
        keys: Wrap their data keys.
        tenant: Whose they are.
        files: How the disk is touched.
    """

    def __init__(self, folder: Path, keys: Keys, tenant: str = "local", files: Files | None = None) -> None:
        self._folder = folder
        self._keys = keys
        self._tenant = tenant
        self._files = files or Files()
        self._lock = threading.RLock()
        self._depth = 0
        self._read: dict[str, tuple[Seen, bytes, str]] = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other threads and processes out; may be entered again inside.

        Raises:
            StorageError: The folder cannot be made or locked.
        """
        with self._lock:
            if self._depth:
                yield
                return
            with disk_errors("lock the privacy ledger"):
                if not self._folder.is_dir():
                    make_folder(self._files, self._folder)
            with held(self._folder / ".lock", exclusive=True):
                self._depth += 1
                try:
                    replay(self._files, self._folder)  # of a rotation that a crash cut off
                    yield
                finally:
                    self._depth -= 1

    def read(self, name: str) -> tuple[bytes, str] | None:
        """Return a table and its content hash; None where there is none. An unchanged file is not read again.

        Raises:
            DecryptionError: It was altered, or its key is not here.
        """
        path = self._path(name)
        with self._lock, disk_errors("read a table of the privacy ledger"):
            try:
                file = path.open("rb")
            except FileNotFoundError:
                return None
            with file:
                seen = _seen(os.fstat(file.fileno()))
                if name not in self._read or self._read[name][0] != seen:
                    data = b"".join(bytes(chunk) for chunk in open_sealed(file, self._keys).chunks())
                    file.seek(0)
                    self._read[name] = seen, data, content_hash(file)
            return self._read[name][1:]

    def write(self, name: str, data: bytes) -> str:
        """Seal a table in place of the one before it, and return its content hash when it is on the disk.

        Raises:
            StorageError: It could not be written; the one before it is intact.
        """
        header = {"tenant": self._tenant, "schema": 1, "table": self._path(name).stem}
        with self.held(), disk_errors("write a table of the privacy ledger"):
            sweep_drafts(self._files, self._folder)
            with Draft(self._files, self._folder) as draft:
                sealed = seal(draft.file, header, [data], self._keys)
                seen = _seen(os.fstat(draft.file.fileno()))
                draft.publish(self._path(name))
            self._read[name] = seen, data, sealed.content_hash
        return sealed.content_hash

    def rewrap(self) -> int:
        """Rewrap every table to the primary key and return how many were."""
        if not self._folder.is_dir():
            return 0
        with self.held(), disk_errors("rewrap the tables of the privacy ledger"):
            return rotate(self._files, self._folder, sorted(self._folder.glob("*.tsnb")), self._keys)

    def _path(self, name: str) -> Path:  # a hash: a data set's name may hold what no file name may
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.tsnb"


def _seen(found: os.stat_result) -> Seen:
    return found.st_ino, found.st_size, found.st_mtime_ns
