"""The chain of the audit log: records, each bound to the one before it, and ways to read them.

    record_hash_i = SHA-256(canonical JSON of record i without `record_hash` and `mac`; `seq`, `prev_hash` included)
    mac_i         = HMAC-SHA256(k_i, record_hash_i)
    k_{i+1}       = HKDF(k_i), and k_i is overwritten

So whoever learns k_i can forge record i and those after it, and none before it.
"""

import dataclasses
import hashlib
import hmac
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from tensafe_nb.errors import AuditLogError, DecryptionError
from tensafe_nb.protocol.results import AuditLogEntry
from tensafe_nb.store.disk import disk_errors
from tensafe_nb.store.keys.sources import derive
from tensafe_nb.store.sealed.envelope import canonical, parse_canonical

ZEROS = "0" * 64
BLOCK = 64 << 10
UNKNOWN = os.urandom(32).hex()  # stands for what is not known yet; random, so that no field can hold it
_SHOWN = tuple(f.name for f in dataclasses.fields(AuditLogEntry))
_shown = itemgetter(*_SHOWN)
FIELDS = frozenset(_SHOWN) | {"ts", "mac", "stanzas"}
_FOREIGN = "it is not a record as this package writes them"


@dataclass(frozen=True, slots=True)
class Tip:
    """The end of a chain: number, place, predecessor and key of the record that comes next.

    Without `key`, MACs are neither made nor checked.
    """

    seq: int
    size: int
    head: str
    key: bytes | None = field(repr=False)

    def record(self, fields: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Return the record that comes next, complete, and its line.

        Its JSON is made once. What is hashed is the line without hash and MAC, which stand where the keys' order puts
        them, each before another field.
        """
        known = {"seq": self.seq, "prev_hash": self.head, "record_hash": UNKNOWN, "mac": UNKNOWN}
        record = {**fields, **known}
        begin, rest = canonical(record).split(_NO_MAC)
        middle, end = rest.split(_NO_HASH)
        claimed = hashlib.sha256(begin + middle + end).hexdigest()
        record["record_hash"], record["mac"] = claimed, self._mac(claimed)
        mac, own = _member("mac", record["mac"]), _member("record_hash", claimed)
        return record, b"".join((begin, mac, middle, own, end, b"\n"))

    def moved(self, record: Mapping[str, Any], line: bytes) -> "Tip":
        """Return the tip behind a record that is known to fit."""
        # one way only: who learns this key cannot go back to the one before it, nor write what it wrote
        key = None if self.key is None else derive(self.key, "TSNB1/audit/next")
        return Tip(self.seq + 1, self.size + len(line), record["record_hash"], key)

    def after(self, line: bytes) -> "Tip":
        """Return the tip behind a line of the log.

        Raises:
            AuditLogError: The line is not what comes next. The message is the reason, without the place.
        """
        record = parse_record(line)
        claimed = record.get("record_hash")
        if record.get("seq") != self.seq:
            raise AuditLogError(
                f"it says it is number {record.get('seq')!r:.20}, which is not what comes next"
            )
        if record.get("prev_hash") != self.head:
            raise AuditLogError("its prev_hash is not the record_hash of the record before it")
        if claimed != record_hash(record):
            raise AuditLogError("its record_hash is not that of its content")
        if self.key is not None and record.get("mac") != self._mac(claimed):
            raise AuditLogError("its MAC is wrong: this log's key did not write it")
        return self.moved(record, line)

    def _mac(self, claimed: str) -> str:
        assert self.key is not None
        return hmac.digest(self.key, bytes.fromhex(claimed), "sha256").hex()


def first_tip(secret: bytes | None) -> Tip:
    """Return the tip of an empty log; `secret` is the one that k_0 derives from."""
    return Tip(0, 0, ZEROS, None if secret is None else derive(secret, "TSNB1/audit/first"))


def _member(name: str, digits: str) -> bytes:
    """Return a field of hexadecimal digits, as canonical JSON has it before another field."""
    return f'"{name}":"{digits}",'.encode()


_NO_MAC, _NO_HASH = _member("mac", UNKNOWN), _member("record_hash", UNKNOWN)


def record_hash(record: Mapping[str, Any]) -> str:
    """Return the hash of a record's content, whatever it says its hash is."""
    body = {name: value for name, value in record.items() if name not in ("record_hash", "mac")}
    return hashlib.sha256(canonical(body)).hexdigest()


def hash_of(line: bytes) -> str | None:
    """Return the hash of the record in a line; None where there is no record."""
    try:
        return record_hash(parse_record(line))
    except AuditLogError:
        return None


def check_end(log: BinaryIO, counted: Tip, size: int) -> None:
    """Refuse to go on behind anything but the record that the key file counts as the last.

    Raises:
        AuditLogError: The log ends before it, or another record is there.
    """
    if size < counted.size:
        raise AuditLogError(
            f"its key file counts {counted.seq} records in {counted.size} bytes, but it has {size} bytes: its "
            f"end was cut off, or was lost when the machine lost power"
        )
    last = next(lines_newest_first(log, counted.size), None)
    if (ZEROS if last is None else hash_of(last)) != counted.head:
        raise AuditLogError(f"record {counted.seq - 1} is not the one that its key file counts as the last")


def parse_record(line: bytes) -> dict[str, Any]:
    """Return the record in a line.

    Raises:
        AuditLogError: It is not one, byte for byte.
    """
    try:
        record = parse_canonical(line.removesuffix(b"\n"))
    except DecryptionError as error:
        raise AuditLogError(_FOREIGN) from error
    if not isinstance(record, dict):
        raise AuditLogError(_FOREIGN)
    return record


def lines(log: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """Yield the lines between two places, each with its newline; an unfinished last one comes without."""
    log.seek(start)
    while start < end and (line := log.readline(end - start)):
        yield line
        start += len(line)


def lines_newest_first(log: BinaryIO, end: int) -> Iterator[bytes]:
    """Yield the finished lines before a place, last first, reading back no further than is asked for."""
    rest, finished = b"", False  # of a line whose beginning is in the block before; whether a newline was met
    while end > 0:
        start = max(0, end - BLOCK)
        log.seek(start)
        pieces = (log.read(end - start) + rest).split(b"\n")
        if not finished and len(pieces) > 1:
            pieces.pop()  # what follows the last newline
            finished = True
        rest, end = pieces.pop(0), start
        yield from (piece + b"\n" for piece in reversed(pieces))
    if finished:
        yield rest + b"\n"


def newest_first(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log, newest first, unchecked: `verify` checks.

    Raises:
        AuditLogError: A line is no record.
        StorageError: The log cannot be read.
    """
    if not path.exists():
        return
    with disk_errors("read the audit log"), path.open("rb") as log:
        for line in lines_newest_first(log, log.seek(0, os.SEEK_END)):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict) or not record.keys() >= set(_SHOWN):
                raise AuditLogError(
                    f"The audit log {path} holds a line that is no record. verify_audit_log() says which one."
                )
            yield record


def entry_of(record: Mapping[str, Any]) -> AuditLogEntry:
    """Return what users see of a record."""
    ids = {name: tuple(record[name]) for name in ("artifact_ids_produced", "artifact_ids_consumed")}
    return AuditLogEntry(*_shown({**record, **ids}))
