"""What crosses between the halves: ciphertexts, in an envelope that shows what was altered, replayed or misdirected.

CKKS itself takes any bytes for a ciphertext and decrypts them to something. So each message carries an HMAC-SHA256
over all of it, under a key of its connection and its direction, and a number that only grows.

    "TSNH" 1 │ u32 header length │ header, JSON │ (u32 length, part)* │ 32 bytes of HMAC
"""

import hashlib
import hmac
import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from tensafe_nb.display import as_given
from tensafe_nb.errors import EncryptionContextError, ValidationError

MAGIC, TAG, MOST_HEADER = b"TSNH\x01", 32, 2**16
MOST_MESSAGE = 2**28  # bytes of any message
Direction = Literal["bundle", "request", "reply", "update", "total"]
_CONTEXT = re.compile(r"[0-9a-f]{32}")


@runtime_checkable
class KeySource(Protocol):
    """Wraps the key of a connection, and opens it again: `tensafe_nb.store.keys.keyring.Keys` is one."""

    def wrap(self, secret: bytes) -> Mapping[str, Any]:
        """Return a stanza that holds a secret."""

    def unwrap(self, stanzas: Sequence[Mapping[str, Any]]) -> bytes:
        """Return the secret of a stanza."""


@dataclass(frozen=True, slots=True)
class Message:
    """An envelope whose seal was whole.

    Attributes:
        sequence: Its number; a reply has that of its request.
        fields: What the header says besides.
        parts: Ciphertexts or keys, not yet parsed.
    """

    sequence: int
    fields: Mapping[str, Any]
    parts: Sequence[bytes | memoryview]

    def number(self, name: str, least: int, most: int) -> int:
        """Return a whole number of the header.

        Raises:
            EncryptionContextError: It is not one, or beyond its bounds.
        """
        value = self.fields.get(name)
        if type(value) is not int or not least <= value <= most:
            raise EncryptionContextError(
                f"The message's {name!r} is not a whole number from {least} to {most}."
            )
        return value


@dataclass(frozen=True, slots=True)
class Connection:
    """The secret that two halves share for as long as they talk, and the name of their conversation."""

    context: str = field(default_factory=lambda: os.urandom(16).hex())
    secret: bytes = field(default_factory=lambda: os.urandom(32), repr=False)

    def seal(
        self,
        direction: Direction,
        sequence: int,
        fields: Mapping[str, Any],
        parts: Sequence[bytes | memoryview],
    ) -> bytes:
        """Return an envelope.

        Raises:
            EncryptionContextError: It would be larger than any that is opened.
        """
        header = {"context": self.context, "direction": direction, "sequence": sequence, **fields}
        return self._sealed(direction, header, parts)

    def _sealed(
        self, direction: Direction, header: Mapping[str, Any], parts: Sequence[bytes | memoryview]
    ) -> bytes:
        text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
        body = b"".join(piece for part in parts for piece in (struct.pack(">I", len(part)), part))
        sealed = MAGIC + struct.pack(">I", len(text)) + text + body
        if len(sealed) + TAG > MOST_MESSAGE:
            raise EncryptionContextError(
                f"The message would have {len(sealed):,} bytes; {MOST_MESSAGE:,} are the most. Send less at once."
            )
        return sealed + self._tag(direction, sealed)

    def open(self, data: bytes, direction: Direction, *, most: int = MOST_MESSAGE) -> Message:
        """Return what an envelope holds; its size is looked at first, then its seal, then all else.

        Raises:
            EncryptionContextError: It is too large, of another connection or direction, or was altered.
        """
        _check_size(data, most)
        if not hmac.compare_digest(self._tag(direction, memoryview(data)[:-TAG]), data[-TAG:]):
            raise EncryptionContextError(
                f"This is no {direction} of this connection: it was altered or cut, belongs to another connection or "
                f"another direction. Nothing of it was used. If it goes on, make a new client, which makes new keys."
            )
        return _read(data, direction, self.context)

    def _tag(self, direction: Direction, data: bytes | memoryview) -> bytes:
        key = hmac.digest(self.secret, f"TSNH1/{direction}/{self.context}".encode(), hashlib.sha256)
        return hmac.digest(key, data, hashlib.sha256)

    def bundle(
        self, fields: Mapping[str, Any], parts: Sequence[bytes | memoryview], keys: KeySource | None
    ) -> bytes:
        """Return the message that opens the connection: it brings the secret, wrapped if there is a key source."""
        check_keys(keys)
        brought = {"wrapped": dict(keys.wrap(self.secret))} if keys else {"fresh": self.secret.hex()}
        return self.seal("bundle", 0, {**fields, "key": brought}, parts)


def open_bundle(data: bytes, keys: KeySource | None) -> tuple[Connection, Message]:
    """Return the connection that a bundle opens, and what it brings.

    Raises:
        EncryptionContextError: It is not whole, or its key is not wrapped where there is a key source.
        KeyUnavailableError: Its key is wrapped, and what opens it is not here.
    """
    check_keys(keys)
    _check_size(data, MOST_MESSAGE)
    message = _read(data, "bundle", None)
    brought, context = message.fields.get("key"), message.fields.get("context")
    if not isinstance(brought, dict) or not isinstance(context, str) or not _CONTEXT.fullmatch(context):
        raise _damaged()
    if ("wrapped" in brought) != (keys is not None):
        raise EncryptionContextError(
            "The client's bundle and this server differ in keys=: give both the same key source, or neither one."
        )
    if keys is not None:
        secret = keys.unwrap([brought["wrapped"]])
    else:
        try:
            secret = bytes.fromhex(brought["fresh"])
        except (KeyError, TypeError, ValueError) as err:
            raise _damaged() from err
    if len(secret) != 32:
        raise _damaged()
    connection = Connection(context, secret)
    return connection, connection.open(data, "bundle")


def check_keys(keys: KeySource | None) -> None:
    """Refuse what is no key source.

    Raises:
        ValidationError: It has not what wraps and opens.
    """
    if keys is not None and not isinstance(keys, KeySource):
        raise ValidationError(
            f"keys= is a key source with wrap() and unwrap(), such as tensafe_nb.store.keys.keyring.Keys, not "
            f"{as_given(keys)}."
        )


def _check_size(data: bytes, most: int) -> None:
    if not isinstance(data, bytes):
        raise EncryptionContextError(f"The halves exchange bytes, not {type(data).__name__}.")
    if len(data) > most:
        raise EncryptionContextError(
            f"The message has {len(data):,} bytes; {most:,} are the most that its kind may have. It was not parsed."
        )
    if len(data) < len(MAGIC) + 4 + TAG:
        raise _damaged()


def _read(data: bytes, direction: Direction, context: str | None) -> Message:
    magic, rest = data[: len(MAGIC)], memoryview(data)[len(MAGIC) : -TAG]
    (length,) = struct.unpack(">I", rest[:4])
    if magic != MAGIC or length > min(MOST_HEADER, len(rest) - 4):
        raise _damaged()
    try:
        header = json.loads(bytes(rest[4 : 4 + length]))
    except (ValueError, RecursionError) as err:
        raise _damaged() from err
    if not isinstance(header, dict) or type(header.get("sequence")) is not int:
        raise _damaged()
    if header.get("direction") != direction or context not in (None, header.get("context")):
        raise _damaged()
    return Message(header["sequence"], header, _parts(rest[4 + length :]))


def _parts(body: memoryview) -> list[memoryview]:
    parts = []
    while body:
        if len(body) < 4:
            raise _damaged()
        (length,) = struct.unpack(">I", body[:4])
        if length > len(body) - 4:
            raise _damaged()
        parts.append(body[4 : 4 + length])  # a view: updates have megabytes
        body = body[4 + length :]
    return parts


def _damaged() -> EncryptionContextError:
    return EncryptionContextError(
        "This is not a message of encrypted computation, or it was cut or altered. Nothing of it was used."
    )
