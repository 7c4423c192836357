"""TSNB1, the sealed file: readable header, key slot, then chunks that open only with the key and only in order.

    magic "TSNB" 01 | u32 H | header: canonical JSON, H bytes | key slot: 4096 bytes | chunk | chunk | … | last chunk

A chunk is AES-256-GCM of up to 4 MiB, 16 bytes of tag behind it, in the STREAM construction (Hoang, Reyhanitabar,
Rogaway, Vizár 2015): nonce = prefix (7) + counter (4) + last flag (1), associated data = SHA-256 of everything before
the slot. The slot holds the artifact's data key, wrapped, and a MAC over everything up to itself; changing the key
rewrites the slot and nothing else. `content_hash` covers the file without its slot, so it stays. A file begins at
byte 0.

The prefix of the nonces is random, and so is the data key, of which each file has one of its own: no nonce comes twice
under a key, as long as a file has less than 2³² chunks (16 PiB). The counter in the nonce makes a chunk that was moved
or repeated fail, the flag one that was made the last.
"""

import hashlib
import hmac
import json
import os
import re
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.codec import writer_of
from tensafe_nb.store.disk import Buffer, fill, read_up_to, write_all
from tensafe_nb.store.keys.keyring import Keys, check_stanzas, refused
from tensafe_nb.store.keys.sources import derive

MAGIC = b"TSNB\x01"
SUITE = "AES256GCM-STREAM"
CHUNK = 4 << 20
TAG = 16
SLOT = 4096
MAC = 32
MAX_HEADER = 64 << 10
READERS = 2  # threads that open the chunks of one large read
_text_of = writer_of(
    json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
)
_OURS = ("suite", "chunk", "nonce_prefix")
_NONCE_PREFIX = re.compile("[0-9a-f]{14}")


def canonical(value: Any) -> bytes:
    """Return the one JSON text of a value: sorted keys, no spaces, UTF-8.

    Raises:
        ValidationError: It is not JSON: NaN, an object of a class, a lone surrogate.
    """
    try:
        return _text_of(value).encode()
    except (TypeError, ValueError, RecursionError) as err:
        raise ValidationError(f"This cannot be written as JSON: {err}.") from err


def parse_canonical(data: bytes) -> Any:
    """Read canonical JSON.

    Raises:
        DecryptionError: It is not what `canonical` writes; duplicate keys, too, do not survive writing it again.
    """
    try:
        value = json.loads(data.decode())
        same = canonical(value) == data
    except (ValueError, RecursionError) as err:
        raise refused("JSON") from err
    if not same:
        raise refused("JSON")
    return value


@dataclass(frozen=True, slots=True)
class Sealed:
    """A sealed file as a whole.

    Attributes:
        content_hash: "sha256:…" of the file without its key slot.
        size_bytes: Of the file.
        key_id: Of the key that wraps its data key.
    """

    content_hash: str
    size_bytes: int
    key_id: str


@dataclass(frozen=True, slots=True)
class Header:
    """What a sealed file says about itself: well-formed, but NOT authenticated before `open_sealed`.

    Attributes:
        fields: As given to `seal`, and suite, chunk and nonce_prefix.
        stanzas: The wrapped data key, once per key that opens it.
        prefix: The bytes before the key slot.
        slot: The key slot.
    """

    fields: Mapping[str, Any]
    stanzas: tuple[Mapping[str, Any], ...]
    prefix: bytes = field(repr=False)
    slot: bytes = field(repr=False)

    @property
    def key_id(self) -> str:
        """The id of the key that wraps the data key; of the first, where there are several."""
        return str(self.stanzas[0]["kek_id"])


class ChunkCipher:
    """AES-256-GCM under the nonces of STREAM, in either direction."""

    def __init__(self, data_key: bytes, nonce_prefix: bytes, prefix: bytes) -> None:
        self._cipher = AESGCM(derive(data_key, "TSNB1/payload"))
        self._nonce_prefix = nonce_prefix
        self._associated = hashlib.sha256(prefix).digest()

    def seal(self, chunk: Buffer, counter: int, last: bool, into: bytearray) -> memoryview:
        block = memoryview(into)[: len(chunk) + TAG]
        self._cipher.encrypt_into(self._nonce(counter, last), chunk, self._associated, block)
        return block

    def open(self, block: Buffer, counter: int, last: bool, into: bytearray | memoryview) -> memoryview:
        size = len(block) - TAG
        # an empty chunk is how nothing is sealed, never how something ends
        if size < 0 or (size == 0 and counter):
            raise refused(f"chunk {counter}")
        chunk = memoryview(into)[:size]
        try:
            self._cipher.decrypt_into(self._nonce(counter, last), block, self._associated, chunk)
        except InvalidTag as err:
            raise refused(f"chunk {counter}") from err
        return chunk

    def _nonce(self, counter: int, last: bool) -> bytes:
        return self._nonce_prefix + struct.pack(">IB", counter, last)


@dataclass(frozen=True, slots=True)
class Opened:
    """A sealed file whose header and key slot are authentic; its chunks are checked as they are read.

    Each chunk is authentic by itself, and in its place. That all of them are there is known once the last was read: it
    opens only as the last, and so only in a file as long as the one that was sealed.

    Attributes:
        header: Its header.
        length: Bytes behind the key slot.
    """

    header: Header
    length: int
    _file: BinaryIO = field(repr=False)
    _cipher: ChunkCipher = field(repr=False)
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False)  # of the file's position

    @property
    def count(self) -> int:
        """How many chunks there are: one, where nothing was sealed."""
        return max(1, -(-self.length // (CHUNK + TAG)))

    @property
    def size(self) -> int:
        """Bytes of the payload, by the length of the file."""
        return self.length - TAG * self.count

    def chunks(self) -> Iterator[memoryview]:
        """Yield the payload chunk by chunk, from its beginning at every call, each one authenticated.

        A chunk is gone when the next is asked for: its memory is used again. Only the end tells that nothing was cut
        off: whoever must not act on a part reads twice.

        Raises:
            DecryptionError: At the first chunk that is altered, missing, moved or too many.
        """
        open_at = self.opener()
        return (open_at(counter * CHUNK) for counter in range(self.count))

    def opener(self, tell: Callable[[memoryview], object] = bool) -> Callable[[int], memoryview]:
        """Return what opens the chunk at a place of the payload, and gives it from there on, until the next call.

        Args:
            tell: Called with each chunk as it lies in the file.
        """
        longest = min(self.length, CHUNK + TAG)
        block, chunk = bytearray(longest), memoryview(bytearray(longest))

        def open_at(at: int, into: memoryview = chunk) -> memoryview:
            counter, begin = divmod(at, CHUNK)
            sealed = self._sealed(counter, block)
            tell(sealed)
            return self._cipher.open(sealed, counter, counter == self.count - 1, into)[begin:]

        return open_at

    def fill(self, at: int, buffers: Sequence[memoryview]) -> None:
        """Fill buffers, one behind the other, with the payload from a place on; on several threads where it is long.

        A chunk that lies within one buffer is opened into it. After an error, what is in the buffers is no content.

        Args:
            at: The place in the payload.
            buffers: Of bytes, no more in all than there are.

        Raises:
            DecryptionError: A chunk is altered, missing, moved or too many.
        """
        places, taking = places_in_chunks(at, buffers), threading.Lock()

        def work() -> None:
            open_at: Any = self.opener()
            while True:
                with taking:
                    start, parts = next(places, (0, ()))
                if not parts:
                    return
                if start % CHUNK == 0 and len(parts) == 1 and len(parts[0]) == min(CHUNK, self.size - start):
                    open_at(start, parts[0])
                    continue
                opened = open_at(start)
                for room in parts:
                    room[:], opened = opened[: len(room)], opened[len(room) :]

        if sum(map(len, buffers)) <= CHUNK:  # a thread would take longer to start
            work()
            return
        with ThreadPoolExecutor(READERS, "tensafe-open") as pool:
            for reader in [pool.submit(work) for _ in range(READERS)]:
                reader.result()

    def _sealed(self, counter: int, buffer: bytearray) -> memoryview:
        at = counter * (CHUNK + TAG)
        size = min(self.length - at, CHUNK + TAG)
        with self._turn:
            self._file.seek(len(self.header.prefix) + SLOT + at)
            block = fill(self._file, memoryview(buffer)[:size])
        if len(block) != size:  # cut off meanwhile
            raise refused(f"chunk {counter}")
        return block


def places_in_chunks(at: int, buffers: Sequence[memoryview]) -> Iterator[tuple[int, list[memoryview]]]:
    """Yield, for each chunk that buffers are filled from, the place of its first byte for them, and their parts."""
    start, parts = at, list[memoryview]()
    for buffer in buffers:
        rest = buffer
        while rest:
            room = rest[: CHUNK - at % CHUNK]
            parts.append(room)
            at, rest = at + len(room), rest[len(room) :]
            if at % CHUNK == 0:
                yield start, parts
                start, parts = at, []
    if parts:
        yield start, parts


def seal(out: BinaryIO, header: Mapping[str, Any], payload: Iterable[Buffer], keys: Keys) -> Sealed:
    """Write a sealed file under a new data key, with a few chunks in memory however long it gets.

    Args:
        out: A file, at its beginning. Making it durable is the caller's.
        header: JSON that everyone may read; it is authenticated, not encrypted.
        payload: Pieces of any size, zero included; a piece may be reused by its maker once the next is asked for.
        keys: The primary key wraps the data key.

    Raises:
        ValidationError: The header is not JSON, too long, or names what is set here.
        KeyUnavailableError: The primary key cannot be had.
        OSError: Writing failed.
    """
    nonce_prefix, data_key = os.urandom(7), os.urandom(32)
    prefix = _prefix(header, nonce_prefix)
    stanza = keys.wrap(data_key)
    seen, size = hashlib.sha256(prefix), len(prefix) + SLOT
    # two buffers in turn: one chunk is encrypted while the one before it is hashed, which takes longest, and written
    chunks, buffers = ChunkCipher(data_key, nonce_prefix, prefix), [bytearray(), bytearray()]
    with ThreadPoolExecutor(1, "tensafe-hash") as hasher, ThreadPoolExecutor(1, "tensafe-seal") as writer:
        used: list[list[Future[None]]] = [[], []]
        used[1] = [writer.submit(write_all, out, prefix + _slot(prefix, [stanza], data_key))]
        for counter, (chunk, last) in enumerate(chunked(payload)):
            turn = counter % 2
            for use in used[turn]:  # the buffer is free again, and an error comes out here
                use.result()
            if len(buffers[turn]) < len(chunk) + TAG:
                buffers[turn] = bytearray(len(chunk) + TAG)
            block = chunks.seal(chunk, counter, last, buffers[turn])
            size += len(block)
            used[turn] = [hasher.submit(seen.update, block), writer.submit(write_all, out, block)]
        for use in used[0] + used[1]:
            use.result()
    return Sealed(f"sha256:{seen.hexdigest()}", size, str(stanza["kek_id"]))


def read_header(file: BinaryIO) -> Header:
    """Return what a sealed file says about itself, without a key: well-formed, NOT authenticated.

    Raises:
        DecryptionError: It is no sealed file, or of a suite, chunk size or version that this version does not know.
    """
    prefix, fields = _read_prefix(file)
    slot = read_up_to(file, SLOT)
    if len(slot) != SLOT:
        raise refused("key slot")
    (length,) = struct.unpack(">I", slot[:4])
    data, padding = slot[4 : 4 + length], slot[4 + length : SLOT - MAC]
    if length > SLOT - MAC - 4 or any(padding):
        raise refused("key slot")
    stanzas = parse_canonical(data)
    check_stanzas(stanzas)
    return Header(fields, tuple(stanzas), prefix, slot)


def open_sealed(file: BinaryIO, keys: Keys) -> Opened:
    """Authenticate the header of a sealed file and return its chunks' reader.

    Raises:
        KeyUnavailableError: The key is not here; says which one it is.
        DecryptionError: A wrong key or an altered file.
    """
    header, data_key = _unlock(file, keys)
    nonce_prefix = bytes.fromhex(header.fields["nonce_prefix"])
    length = file.seek(0, os.SEEK_END) - len(header.prefix) - SLOT
    if length > TAG and 0 < length % (CHUNK + TAG) <= TAG:
        raise refused("last chunk")  # which would be empty, or shorter than that
    return Opened(header, length, file, ChunkCipher(data_key, nonce_prefix, header.prefix))


def verify(file: BinaryIO, keys: Keys) -> Sealed:
    """Read a sealed file once, to its end, and return what it is.

    Raises:
        DecryptionError: As `open_sealed` and `Opened.chunks`.
    """
    opened = open_sealed(file, keys)
    prefix = opened.header.prefix
    seen = hashlib.sha256(prefix)
    open_at = opened.opener(seen.update)
    for counter in range(opened.count):
        open_at(counter * CHUNK)
    size = len(prefix) + SLOT + opened.length
    return Sealed(f"sha256:{seen.hexdigest()}", size, opened.header.key_id)


def content_hash(file: BinaryIO) -> str:
    """Return "sha256:…" of a sealed file without its key slot. Needs no key, shows nothing about the content."""
    prefix, _ = _read_prefix(file)
    seen, buffer = hashlib.sha256(prefix), bytearray(CHUNK)
    file.seek(len(prefix) + SLOT)
    while block := fill(file, buffer):
        seen.update(block)
    return f"sha256:{seen.hexdigest()}"


def rewrapped_slot(file: BinaryIO, keys: Keys) -> bytes:
    """Return a key slot for the same data key under the primary key; the file is not changed.

    Raises:
        DecryptionError: The present slot does not open.
    """
    header, data_key = _unlock(file, keys)
    return _slot(header.prefix, [keys.wrap(data_key)], data_key)


def write_slot(file: BinaryIO, slot: bytes) -> None:
    """Put a key slot in its place, whatever is there now: a slot half-written by a crash, too.

    Raises:
        DecryptionError: The file is no sealed file.
    """
    if len(slot) != SLOT:
        raise ValidationError(f"A key slot has {SLOT} bytes, not {len(slot)}.")
    prefix, _ = _read_prefix(file)
    file.seek(len(prefix))
    write_all(file, slot)


def _prefix(header: Mapping[str, Any], nonce_prefix: bytes) -> bytes:
    taken = [name for name in _OURS if name in header]
    if taken:
        raise ValidationError(
            f"The header fields {', '.join(taken)} are set by the envelope; leave them out."
        )
    data = canonical({**header, "suite": SUITE, "chunk": CHUNK, "nonce_prefix": nonce_prefix.hex()})
    if canonical(json.loads(data)) != data:  # numbers as keys sort in another way than the texts they become
        raise ValidationError("The keys of a header are texts; it holds one that is not.")
    if len(data) > MAX_HEADER:
        raise ValidationError(
            f"A header has at most {MAX_HEADER} bytes, this one {len(data)}. Put what is long into the metadata."
        )
    return MAGIC + struct.pack(">I", len(data)) + data


def _read_prefix(file: BinaryIO) -> tuple[bytes, Mapping[str, Any]]:
    file.seek(0)
    start = read_up_to(file, len(MAGIC) + 4)
    if len(start) != len(MAGIC) + 4 or not start.startswith(MAGIC):
        raise refused("magic")
    (length,) = struct.unpack(">I", start[len(MAGIC) :])
    data = read_up_to(file, length) if length <= MAX_HEADER else b""
    if len(data) != length:
        raise refused("header")
    fields = parse_canonical(data)
    known = isinstance(fields, dict) and (fields.get("suite"), fields.get("chunk")) == (SUITE, CHUNK)
    if not known or not _NONCE_PREFIX.fullmatch(str(fields.get("nonce_prefix"))):
        raise refused("header")
    return start + data, dict(fields)


def _slot(prefix: bytes, stanzas: list[Mapping[str, Any]], data_key: bytes) -> bytes:
    data = canonical(stanzas)
    slot = (struct.pack(">I", len(data)) + data).ljust(SLOT - MAC, b"\0")
    return slot + _mac(prefix, slot, data_key)


def _mac(prefix: bytes, slot: bytes, data_key: bytes) -> bytes:
    # under the data key, not the one that wraps it: whoever can open the slot can tell whether the header is its own
    return hmac.digest(derive(data_key, "TSNB1/header"), prefix + slot[: SLOT - MAC], "sha256")


def _unlock(file: BinaryIO, keys: Keys) -> tuple[Header, bytes]:
    header = read_header(file)
    data_key = keys.unwrap(header.stanzas)
    if not hmac.compare_digest(_mac(header.prefix, header.slot, data_key), header.slot[SLOT - MAC :]):
        raise refused("header")
    return header, data_key


def chunked(payload: Iterable[Buffer]) -> Iterator[tuple[Buffer, bool]]:
    """Yield pieces of any size as chunks, and whether each is the last; what fills a chunk by itself is not copied."""
    staged = bytearray()
    for piece in payload:
        view = memoryview(piece)
        rest = view.cast("B") if view.nbytes else memoryview(b"")
        while len(staged) + len(rest) > CHUNK:  # more follows, so the chunk is not the last
            if staged:
                room = CHUNK - len(staged)
                staged += rest[:room]
                yield staged, False
                staged, rest = bytearray(), rest[room:]
            else:
                yield rest[:CHUNK], False
                rest = rest[CHUNK:]
        staged += rest
    yield staged, True
