"""Tensors as safetensors bytes, written and read as a stream: without torch, one tensor in memory at a time.

Format (https://huggingface.co/docs/safetensors): u64 little-endian N; N bytes of JSON, {name: {dtype, shape,
data_offsets}}, padded with spaces to a multiple of 8; the tensors, little-endian, without gaps. As the library does,
the widest types come first, so every tensor starts at a multiple of its item size: the bytes are the library's own.
Left out: types of less than a byte, complex numbers, free-text metadata.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from tensafe_nb.errors import ValidationError

if TYPE_CHECKING:
    from typing_extensions import Buffer

Source: TypeAlias = "Buffer | Callable[[], Buffer]"

ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
"""Bytes per element of every dtype taken, in the library's order: files hold the last of these first."""

_RANKS = {dtype: -rank for rank, dtype in enumerate(ITEM_SIZES)}
_LONGEST_HEADER = 100_000_000  # the library's own limit


class Readable(Protocol):
    """What tensors are read from."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return ITEM_SIZES[self.dtype] * prod(self.shape)

    def check(self) -> None:
        if self.dtype not in ITEM_SIZES:
            raise ValidationError(
                f"Tensor {self.name!r} has the dtype {self.dtype!r}; stored are {', '.join(ITEM_SIZES)}."
            )
        if not all(type(length) is int and length >= 0 for length in self.shape):
            raise ValidationError(
                f"Tensor {self.name!r} has the shape {self.shape}; lengths are whole numbers from 0."
            )

    def bytes_of(self, source: Source) -> memoryview:
        """Return the tensor's bytes as one view of its source.

        Raises:
            ValidationError: They are not as many as its shape takes, or have gaps.
        """
        view = memoryview(source() if callable(source) else source)
        if view.nbytes != self.size:
            raise ValidationError(
                f"Tensor {self.name!r}: {self.dtype} of shape {self.shape} takes {self.size} bytes, "
                f"its buffer has {view.nbytes}."
            )
        if not view.c_contiguous:
            raise ValidationError(f"Tensor {self.name!r} is not contiguous; give a contiguous copy.")
        # views with a zero in their shape refuse a cast
        return view.cast("B") if view.nbytes else memoryview(b"")


class TensorPart:
    """Tensors as the bytes of a safetensors file, made while they are read.

    Args:
        tensors: (name, dtype, shape, source) each. The dtype is the format's ("F32", "BF16", "I64" …). The source is a
            C-contiguous buffer of the tensor's little-endian bytes, or a function that returns one: it is called when
            its turn comes and its buffer dropped before the next, so a state larger than memory can be written.

    Raises:
        ValidationError: A name twice, an unknown dtype, or a shape that is none. A buffer whose size does not fit its
            shape is found when its turn comes.

    Example:
        >>> part = TensorPart([("bias", "F32", (2,), array("f", [1, 2]))])
        >>> safetensors.torch.load(b"".join(part.chunks()))
        {'bias': tensor([1., 2.])}
    """

    def __init__(self, tensors: Iterable[tuple[str, str, Sequence[int], Source]]) -> None:
        self._sources: dict[str, Source] = {}
        entries = []
        for name, dtype, shape, source in tensors:
            entry = Entry(name, dtype, tuple(shape))
            entry.check()
            if name in self._sources or name == "__metadata__":
                raise ValidationError(f"A tensor cannot be called {name!r}: that name is taken.")
            self._sources[name] = source
            entries.append(entry)
        self._entries = sorted(entries, key=lambda entry: (_RANKS[entry.dtype], entry.name))
        self._header = header_of(self._entries)

    @property
    def size(self) -> int:
        """Bytes in all."""
        return len(self._header) + sum(entry.size for entry in self._entries)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Yield the file from its first byte: the header, then each tensor as one view of its source."""
        yield self._header
        for entry in self._entries:
            yield entry.bytes_of(self._sources[entry.name])


def header_of(entries: Iterable[Entry]) -> bytes:
    """Return the beginning of a safetensors file: the length of its JSON, and the JSON."""
    described, at = {}, 0
    for entry in entries:
        described[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": (at, at + entry.size),
        }
        at += entry.size
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so the first tensor, too, starts at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def read_entries(stream: Readable, size: int) -> list[Entry]:
    """Return what the header of a safetensors stream says, checked whole; the tensors follow, in this order.

    Args:
        stream: Stands at the first byte.
        size: Bytes of the whole.

    Raises:
        ValidationError: It is not a safetensors file of this size, or the stream ends early.
    """
    if size < 8:
        raise _malformed(f"{size} bytes are too few")
    length = int.from_bytes(_read(stream, 8), "little")
    if length > min(size - 8, _LONGEST_HEADER):
        raise _malformed(f"a header of {length} bytes in a file of {size}")
    entries, end = entries_of(bytes(_read(stream, length)))
    if 8 + length + end != size:
        raise _malformed(f"its header describes {8 + length + end} bytes, it has {size}")
    return entries


def read_tensors(stream: Readable, size: int) -> Iterator[tuple[str, str, tuple[int, ...], memoryview]]:
    """Yield (name, dtype, shape, bytes) for each tensor of a safetensors stream; nothing yielded is kept here.

    Raises:
        ValidationError: As `read_entries`.
    """
    for entry in read_entries(stream, size):
        yield entry.name, entry.dtype, entry.shape, _read(stream, entry.size)


def entries_of(text: bytes) -> tuple[list[Entry], int]:
    """Return the entries of a header's JSON by place, and where the last one ends; they leave no gap.

    Raises:
        ValidationError: It is no such JSON.
    """
    try:
        described = json.loads(text, object_pairs_hook=_without_duplicates)
        described.pop("__metadata__", None)
        placed = []
        for name, fields in described.items():
            begin, stop = fields["data_offsets"]
            placed.append((begin, stop, Entry(name, str(fields["dtype"]), tuple(fields["shape"]))))
        placed.sort(key=lambda place: place[:2])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _malformed(f"its header cannot be read ({error})") from error
    end, entries = 0, []
    for begin, stop, entry in placed:
        entry.check()
        if (begin, stop) != (end, end + entry.size):
            raise _malformed(f"tensor {entry.name!r} does not lie where it should")
        end = stop
        entries.append(entry)
    return entries, end


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name appears twice")
    return fields


def _read(stream: Readable, size: int) -> memoryview:
    view, at = memoryview(bytearray(size)), 0
    while at < size:
        count = stream.readinto(view[at:])
        if not count:
            raise _malformed(f"it ends {size - at} bytes early")
        at += count
    return view


def _malformed(reason: str) -> ValidationError:
    return ValidationError(f"These are not the bytes of a safetensors file: {reason}.")
