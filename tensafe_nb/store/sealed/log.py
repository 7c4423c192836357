"""A sealed log: records one behind the other in a file, each of which opens only with the key, whole, in its place.

    magic "TSNJ" 01 | u32 H | header: canonical JSON, H bytes | record | record | …
    record: u32 length | 8 bytes that vouch for the length | AES-256-GCM of the content, 16 bytes of tag behind it

The nonce is the record's number, under a data key that each file has for itself; the header, which holds that key,
wrapped, is associated data. A process that is killed leaves a record cut off at the end at most: reading ends before
it, and writing goes on there. Whatever else does not open was altered, and is an error: since a length vouches for
itself, no flipped byte can pass for a cut. What nothing here can tell is a file from whose end whole records were cut.
"""

import hashlib
import hmac
import os
import struct
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tensafe_nb.errors import DecryptionError, StorageError
from tensafe_nb.locks import hold
from tensafe_nb.store.disk import Files, disk_errors
from tensafe_nb.store.keys.keyring import Keys, refused
from tensafe_nb.store.keys.sources import derive
from tensafe_nb.store.sealed.envelope import MAX_HEADER, TAG, canonical, parse_canonical

MAGIC = b"TSNJ\x01"
VOUCHER = 8
HEAD = 4 + VOUCHER
LONGEST = (1 << 32) - 1


def key_of(path: Path) -> str | None:
    """Return the id of the key that a sealed log needs, from its header, which anyone may read; None if it has none."""
    with suppress(FileNotFoundError), disk_errors(f"read {path}"), path.open("rb") as file:
        begin = file.read(len(MAGIC) + 4)
        with suppress(DecryptionError, KeyError, TypeError):
            length = int.from_bytes(begin[len(MAGIC) :], "big")
            if begin.startswith(MAGIC) and length <= MAX_HEADER:
                return str(parse_canonical(file.read(length))["key"]["kek_id"])
    return None


class SealedLog:
    """A sealed log that is open to be written. Every method may be called from any thread.

    Args:
        path: The file. One that is there is read; a new one is made.
        keys: Wrap its data key.
        header: Of a new one: JSON that everyone may read.
        files: How the disk is touched.

    Attributes:
        found: The records that were in it, until whoever opened it takes them away.
        header: Authentic once a record was read.
        size: In bytes.

    Raises:
        DecryptionError: It was altered, or is no sealed log.
        KeyUnavailableError: Its key is not here.
        StorageError: The disk refuses, or another process writes it.
    """

    def __init__(
        self, path: Path, keys: Keys, header: Mapping[str, Any] | None = None, files: Files | None = None
    ) -> None:
        self.path, self._files = path, files or Files()
        self._lock = threading.RLock()
        self._places: list[int] = []  # where each record begins
        self.found: list[bytes] = []
        with disk_errors(f"open {path}"):
            fresh = not path.exists()
            draft = path.with_suffix(".new")
            if fresh:  # it gets its name with its header whole
                draft.unlink(missing_ok=True)
            self._file = self._files.unbuffered(draft if fresh else path)
            try:
                if not hold(self._file):
                    raise StorageError(
                        f"Another process writes {path}: one server at a time has a home folder."
                    )
                if fresh:
                    self._begin(keys, header or {})
                    self._files.replace(draft, path)
                else:
                    self._read(self._file.read() or b"", keys)
            except BaseException:
                self._file.close()
                raise

    @property
    def key_id(self) -> str:
        """The key that wraps its data key."""
        return str(self.header["key"]["kek_id"])

    def _begin(self, keys: Keys, header: Mapping[str, Any]) -> None:
        data_key = os.urandom(32)
        self.header = {**header, "key": keys.wrap(data_key)}
        text = canonical(self.header)
        prefix = MAGIC + struct.pack(">I", len(text)) + text
        self._know(prefix, data_key)
        self._put(prefix)

    def _know(self, prefix: bytes, data_key: bytes) -> None:
        self._cipher = AESGCM(derive(data_key, "TSNJ1/records"))
        self._vouching = derive(data_key, "TSNJ1/lengths")
        self._associated = hashlib.sha256(prefix).digest()
        self.size = 0

    def _read(self, content: bytes, keys: Keys) -> None:
        begin = len(MAGIC) + 4
        length = int.from_bytes(content[len(MAGIC) : begin], "big")
        text = content[begin : begin + length]
        if not content.startswith(MAGIC) or length > MAX_HEADER or len(text) < length:
            raise refused("header")
        self.header = parse_canonical(text)
        if not isinstance(self.header, dict) or not isinstance(self.header.get("key"), dict):
            raise refused("header")
        at = begin + length
        self._know(content[:at], keys.unwrap([self.header["key"]]))
        view = memoryview(content)
        # A power cut leaves zeros of what was not on the disk yet: then the end of the last whole record is the end.
        unwritten = not any(view[-TAG:])
        try:
            while (end := self._end_of(view, at)) is not None:
                self.found.append(self._opened(view[at + HEAD : end], len(self._places)))
                self._places.append(at)
                at = end
        except DecryptionError:
            if not unwritten:
                raise
        if at < len(content):  # cut off: whoever wrote it was killed
            os.ftruncate(self._file.fileno(), at)
        self._file.seek(at)
        self.size = at

    def _end_of(self, content: memoryview, at: int) -> int | None:
        """Return where the record that begins at a place ends; None where it is cut off, or there is none."""
        head = bytes(content[at : at + HEAD])
        if len(head) < HEAD:
            return None
        number = len(self._places)
        if not hmac.compare_digest(self._vouched(head[:4], number), head[4:]):
            raise refused(f"record {number}")
        end = at + HEAD + int.from_bytes(head[:4], "big") + TAG
        return end if end <= len(content) else None

    def _vouched(self, length: bytes, number: int) -> bytes:
        return hmac.digest(self._vouching, struct.pack(">Q", number) + length, "sha256")[:VOUCHER]

    def _opened(self, block: memoryview, number: int) -> bytes:
        try:
            return self._cipher.decrypt(struct.pack(">IQ", 0, number), block, self._associated)
        except InvalidTag as error:
            raise refused(f"record {number}") from error

    def append(self, content: bytes) -> int:
        """Write a record, and return its number; the system has it when this returns, the disk after `sync`.

        Raises:
            StorageError: It could not be written; nothing of it is in the file.
        """
        if len(content) > LONGEST:
            raise StorageError(f"A record has at most {LONGEST:,} bytes, this one {len(content):,}.")
        with self._lock, disk_errors(f"write {self.path}"):
            number, length = len(self._places), struct.pack(">I", len(content))
            sealed = self._cipher.encrypt(struct.pack(">IQ", 0, number), content, self._associated)
            self._places.append(self.size)
            try:
                self._put(length + self._vouched(length, number) + sealed)
            except BaseException:
                self._places.pop()
                raise
            return number

    def _put(self, data: bytes) -> None:
        """Write bytes whole or not at all: behind half a record, no other could be read."""
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), self.size)
                self._file.seek(self.size)
            raise
        self.size += len(data)

    def __getitem__(self, number: int) -> bytes:
        """Return a record, read from the file."""
        with self._lock, disk_errors(f"read {self.path}"):
            at = self._places[number]
            end = self._places[number + 1] if number + 1 < len(self._places) else self.size
            block = os.pread(self._file.fileno(), end - at - HEAD, at + HEAD)
            return self._opened(memoryview(block), number)

    def __len__(self) -> int:
        return len(self._places)

    def sync(self) -> None:
        """Return when everything written so far is on the disk."""
        with self._lock:
            if self._file.closed:
                return
            file = os.dup(self._file.fileno())
        try:
            with disk_errors(f"write {self.path}"):
                os.fsync(file)  # a slow disk holds up nobody who writes meanwhile
        finally:
            os.close(file)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()

    def remove(self) -> None:
        """Close the file, and remove it."""
        self.close()
        with suppress(FileNotFoundError), disk_errors(f"remove {self.path}"):
            self._files.unlink(self.path)
