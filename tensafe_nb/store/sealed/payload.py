"""The payload of an artifact: u32 length, manifest, then the parts one behind the other. Never a pickle.

The manifest is canonical JSON: {"metadata": …, "name": …, "parts": [[name, size], …]}.
"""

import hashlib
import io
import re
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tensafe_nb.errors import ValidationError
from tensafe_nb.store.keys.keyring import refused
from tensafe_nb.store.sealed.envelope import Opened, canonical, parse_canonical
from tensafe_nb.store.sealed.tensors import TensorPart

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_MANIFEST = 1 << 20  # a listing decrypts one chunk of 4 MiB: the manifest is always in it
LONGEST_NAME = 200
_PART_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # `artifacts decrypt` makes files of these names


@dataclass(frozen=True, slots=True)
class Manifest:
    """The sealed table of contents.

    Attributes:
        parts: (name, size) in order.
        metadata: The user's own.
        name: The user's own, if any.
    """

    parts: tuple[tuple[str, int], ...]
    metadata: Mapping[str, Any]
    name: str | None

    @classmethod
    def of(
        cls, parts: Mapping[str, bytes | TensorPart], metadata: Mapping[str, Any] | None, name: str | None
    ) -> "Manifest":
        """Return the manifest of what is to be sealed.

        Raises:
            ValidationError: The metadata is not JSON or too long, or a name is none.
        """
        for part in parts:
            if not _PART_NAME.fullmatch(part):
                raise ValidationError(f"A part cannot be called {part!r}: letters, digits, '.', '_' and '-'.")
        if name is not None and not 1 <= len(name) <= LONGEST_NAME:
            raise ValidationError(f"A name has 1 to {LONGEST_NAME} characters, this one {len(name)}.")
        sizes = tuple(
            (part, content.size if isinstance(content, TensorPart) else len(content))
            for part, content in parts.items()
        )
        plain: Mapping[str, Any] = parse_canonical(canonical(dict(metadata or {})))
        return cls(sizes, plain, name)

    def head(self) -> bytes:
        """Return the beginning of the payload, up to the first part."""
        text = canonical({"metadata": self.metadata, "name": self.name, "parts": self.parts})
        if len(text) > MAX_MANIFEST:
            raise ValidationError(
                f"Metadata and names take {len(text)} bytes; at most {MAX_MANIFEST} can be listed. "
                f"Keep what is long in a file of its own."
            )
        return struct.pack(">I", len(text)) + text

    @classmethod
    def read(cls, stream: "PayloadStream") -> "Manifest":
        """Read the beginning of a payload, which tells its length: nothing was cut off a file that is so long.

        Raises:
            DecryptionError: It is not one, or of another length.
        """
        head = stream.read(4)
        length = int.from_bytes(head, "big")
        if len(head) < 4 or length > MAX_MANIFEST:
            raise refused("manifest")
        fields = parse_canonical(stream.read(length))
        # the chunk is authentic by now; but a key's holder might have sealed a manifest that lies
        if not _is_manifest(fields) or stream.left != sum(size for _, size in fields["parts"]):
            raise refused("manifest")
        return cls(tuple((name, size) for name, size in fields["parts"]), fields["metadata"], fields["name"])


def _is_manifest(fields: Any) -> bool:
    if not isinstance(fields, dict) or set(fields) != {"metadata", "name", "parts"}:
        return False
    parts = fields["parts"]
    return (
        isinstance(fields["metadata"], dict)
        and isinstance(fields["name"], str | None)
        and isinstance(parts, list)
        and all(isinstance(part, list) and len(part) == 2 for part in parts)
        and all(isinstance(name, str) and _PART_NAME.fullmatch(name) for name, _ in parts)
        and all(type(size) is int and size >= 0 for _, size in parts)
    )


def payload(manifest: Manifest, parts: Mapping[str, bytes | TensorPart]) -> Iterator[bytes | memoryview]:
    """Yield the bytes to seal, one tensor at a time."""
    yield manifest.head()
    for content in parts.values():
        if isinstance(content, TensorPart):
            yield from content.chunks()
        else:
            yield content


def checked(opened: Opened) -> tuple[Manifest, str]:
    """Read a sealed file to its end, keeping nothing; return its manifest, and its content hash.

    Raises:
        DecryptionError: A chunk is not authentic, or the payload is not what its manifest says.
    """
    seen = hashlib.sha256(opened.header.prefix)
    stream = PayloadStream(opened, seen.update)
    manifest = Manifest.read(stream)
    stream.skip()
    return manifest, f"sha256:{seen.hexdigest()}"


class PayloadStream(io.RawIOBase):
    """A payload, read forward only. Unlike other raw streams, reads are short only at the end.

    Args:
        opened: The file.
        tell: Called with each chunk as it lies in the file.
    """

    def __init__(self, opened: Opened, tell: "Callable[[memoryview], object]" = bool) -> None:
        super().__init__()
        self._opened, self._at = opened, 0
        self._open_at = opened.opener(tell)
        self._rest = memoryview(b"")  # of the chunk that was opened last

    def readable(self) -> bool:
        """Return True."""
        return True

    @property
    def left(self) -> int:
        """Bytes that are still to come, by the length of the file."""
        return self._opened.size - self._at

    def readinto(self, buffer: "Buffer", /) -> int:
        """Fill a buffer and return how many bytes there were for it."""
        view, at = memoryview(buffer).cast("B"), 0
        while at < len(view) and (taken := self._take(len(view) - at)):
            view[at : at + len(taken)] = taken
            at += len(taken)
        return at

    def fill(self, buffers: Sequence[memoryview]) -> None:
        """Fill several buffers, for which there is enough: as `readinto`, and quicker."""
        self._opened.fill(self._at, buffers)
        self._at += sum(map(len, buffers))
        self._rest = memoryview(b"")

    def skip(self, limit: int = sys.maxsize) -> int:
        """Pass over bytes, all of them by default, and return how many there were."""
        count = 0
        while taken := self._take(limit - count):
            count += len(taken)
        return count

    def _take(self, limit: int) -> memoryview:
        if not self._rest and limit and self._at < self._opened.size:
            self._rest = self._open_at(self._at)
        taken, self._rest = self._rest[:limit], self._rest[limit:]
        self._at += len(taken)
        return taken


class PartStream(io.RawIOBase):
    """One part of a payload. It ends when the next part is asked for, read or not."""

    def __init__(self, payload: PayloadStream, size: int) -> None:
        super().__init__()
        self._payload = payload
        self._left = size

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: "Buffer", /) -> int:
        """Fill a buffer and return how many bytes there were for it."""
        if self.closed:
            raise ValueError("This part has ended: it is closed when the next one is asked for.")
        count = self._payload.readinto(memoryview(buffer).cast("B")[: self._left])
        self._left -= count
        return count

    def fill(self, buffers: Sequence[memoryview]) -> None:
        """Fill several buffers, for which there is enough: as `readinto`, and quicker."""
        if self.closed or sum(map(len, buffers)) > self._left:
            raise ValueError("This part has ended, or is shorter than that.")
        self._payload.fill(buffers)
        self._left -= sum(map(len, buffers))

    def readall(self) -> bytes:
        """Return the rest of the part."""
        return self.read(self._left) or b""

    def finish(self) -> None:
        """Pass over what was not read."""
        self._payload.skip(self._left)
        self.close()
