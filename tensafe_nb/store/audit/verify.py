"""Verification of an audit log, or of a copy: record by record, in constant memory, changing nothing.

What it can show and what it cannot is written in `log.py`.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from tensafe_nb.errors import AuditLogError, DecryptionError
from tensafe_nb.protocol.results import AuditVerification
from tensafe_nb.store.audit import chain
from tensafe_nb.store.audit.files import read_key_file, snapshot
from tensafe_nb.store.audit.key import KeyPage, Secrets, unwrap_secret
from tensafe_nb.store.disk import disk_errors
from tensafe_nb.store.keys.keyring import Keys

MOST_WRAPPED = 64  # what a file may make us try; each may ask for a passphrase's derivation
NO_KEY = "the MACs, and so whether somebody without the key computed the chain anew: needs the key"
NO_KEY_FILE = "whether records were cut from the end: needs the key file beside the log, or an anchor"
NO_ANCHOR = (
    "whether it was cut or written anew with the key, or with older copies of its files: needs an anchor"
)


def verify_file(path: Path, keys: Keys | None, anchors: Sequence[str] = ()) -> AuditVerification:
    """Check an audit log, or a copy of one; the key file is used where it lies beside.

    Args:
        path: The `.jsonl` file.
        keys: Open the log's secret. With None the chain alone is checked, and the result says what was not. With
            keys that do not open it, the log is not ok: nothing tells a missing key from a log put in its place.
        anchors: `record_hash`es noted elsewhere, which must be in the log.

    Raises:
        AuditLogError: There is no such file.
        StorageError: It cannot be read.
    """
    if not path.exists():
        raise AuditLogError(f"There is no audit log {path}.")
    return check(path, keys, anchors, own=False)


def check(path: Path, keys: Keys | None, anchors: Sequence[str], *, own: bool) -> AuditVerification:
    """Check a log; where it is this home's `own`, its key file has to be there."""
    with disk_errors("read the audit log"):
        if not path.exists():
            return _checked(BytesIO(), 0, read_key_file(path), keys, anchors, own)
        with path.open("rb") as log:
            size, raw = snapshot(path, log)
            return _checked(log, size, raw, keys, anchors, own)


Fault = tuple[int | None, str]


@dataclass(slots=True)
class Walk:
    """One pass over the records, as far as they are good.

    Attributes:
        tip: Behind the last good record.
        fault: What is wrong with the next one.
        counted: The tip behind the last record that the key file counts, if there are so many.
        matched: The anchors that were met.
        unfinished: Size of a last line without its end.
    """

    tip: chain.Tip
    fault: str | None = None
    counted: chain.Tip | None = None
    matched: set[str] = field(default_factory=set)
    unfinished: int = 0

    def over(self, log: BinaryIO, size: int, page: KeyPage | None, anchors: set[str]) -> None:
        """Go from record to record, up to the end or the first that is not good."""
        for line in chain.lines(log, 0, size):
            self._note(page, anchors)
            if not line.endswith(b"\n"):
                self.unfinished = len(line)
                break
            try:
                self.tip = self.tip.after(line)
            except AuditLogError as error:
                self.fault = error.message
                break
        self._note(page, anchors)

    def _note(self, page: KeyPage | None, anchors: set[str]) -> None:
        if self.tip.seq and self.tip.head in anchors:
            self.matched.add(self.tip.head)
        if page and page.claim.seq == self.tip.seq:
            self.counted = self.tip

    def against(self, page: KeyPage | None, secret: bytes | None, own: bool) -> Fault | None:
        """Hold the records against the key file: it may be behind them, for a process that died, but not ahead."""
        seq = self.tip.seq
        if page is None:
            return (None, "its key file is missing") if own and seq else None
        try:
            says = page.opened(Secrets.of(secret, page.stanzas)) if secret else page.claim
        except AuditLogError as error:
            return None, error.message
        if self.fault:
            return None
        if says.seq > seq:
            return seq, f"{says.seq - seq} records are missing at the end: the key file counts {says.seq}"
        return None if self.counted == says else (None, "the key file does not fit the records")

    def without(self, anchors: Sequence[str]) -> Fault | None:
        """Say which anchor was not met."""
        missing = [anchor for anchor in anchors if anchor not in self.matched]
        if not missing:
            return None
        return None, (
            f"the anchor {missing[0]} is not in the log: it was cut before that record, or written anew, or is "
            f"another log"
        )

    def not_checked(self, secret: bytes | None, raw: bytes, anchors: Sequence[str]) -> Iterator[str]:
        """Yield what this pass could not show, and what would."""
        if secret is None and self.tip.seq:
            yield NO_KEY
        if not raw:
            yield NO_KEY_FILE
        if not anchors:
            yield NO_ANCHOR
        if self.unfinished:
            yield (
                f"the last {self.unfinished} bytes, an unfinished record: a process died writing it, or the file was "
                f"cut there; the next append moves them to a .torn file"
            )


def secret_in(log: BinaryIO, size: int, keys: Keys) -> tuple[bytes | None, Fault | None]:
    """Return a log's secret, from whichever of its records holds a wrapping that opens; or why none does."""
    wrapped: deque[Any] = deque(maxlen=MOST_WRAPPED)
    for line in chain.lines(log, 0, size):
        if b'"stanzas":' in line:
            with suppress(AuditLogError):
                wrapped.append(chain.parse_record(line).get("stanzas"))
    fault: Fault | None = None
    for stanzas in reversed(wrapped):  # the latest first: after a rotation it is the one whose key is here
        try:
            return unwrap_secret(stanzas, keys), None
        except DecryptionError as error:
            fault = fault or (None, f"the log's key does not open: {error.message}")
    return None, fault or (None, "no record holds the log's wrapped key")


def _checked(
    log: BinaryIO, size: int, raw: bytes, keys: Keys | None, anchors: Sequence[str], own: bool
) -> AuditVerification:
    page, page_fault = None, None
    try:
        page = KeyPage.parse(raw) if raw else None
    except AuditLogError as error:
        page_fault = None, error.message
    secret, secret_fault = secret_in(log, size, keys) if keys and size else (None, None)
    walk = Walk(chain.first_tip(secret))
    walk.over(log, size, page, set(anchors))
    faults: list[Fault | None] = [
        (walk.tip.seq, f"record {walk.tip.seq}: {walk.fault}") if walk.fault else None,
        secret_fault,
        page_fault or walk.against(page, secret, own),
        walk.without(anchors),
    ]
    bad_seq, reason = next((fault for fault in faults if fault), (None, None))
    return AuditVerification(
        ok=reason is None,
        records=walk.tip.seq,
        first_bad_seq=bad_seq,
        reason=reason,
        head=walk.tip.head if walk.tip.seq else None,
        anchors_matched=tuple(anchor for anchor in anchors if anchor in walk.matched),
        not_checked=tuple(walk.not_checked(secret, raw, anchors)),
    )
