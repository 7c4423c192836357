"""The audit log: one chained record per finished operation, in `audit.jsonl`, with its evolving key in `audit.key`.

What verifying shows, and to whom:

- Edit, insertion, removal or reordering of records, or of any byte of them: with the key, always. Without the key,
  if the chain was not computed anew; a chain computed anew without the key needs the key or an anchor to be seen.
- Records cut from the end: by any anchor (a `record_hash` noted elsewhere, as in every checkpoint) at or after the
  cut. Also by the number in the key file, as long as the key file is the present one: left in place, removed from
  the log's own folder, or altered, it betrays the cut. Whoever has kept an *older copy of the key file* can put it
  back and cut the log to any record that copy counts or a later one, and only an anchor shows it. So with older
  copies of both files, and with the whole folder removed. A copy of the log without its key file has no number.
- A key file that is behind the log is no fault by itself: a process died between the two writes. The records it
  does not count must carry right MACs.
- Not shown: what was never logged, who acted, true time; and nothing, but by an anchor, against one who holds the
  key-encryption key, or who held k_i when record i was written: they can write the log anew from there.
- A machine that loses power may lose the last records written without `sync`; if the key file was on the disk
  before them, that looks like a cut, and the log is not continued. With `sync` the record is on the disk, and the key
  file may come to be behind it there.
"""

import json
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensafe_nb.errors import (
    AuditLogError,
    DecryptionError,
    FutureCancelledError,
    KeyUnavailableError,
    TGTinkerError,
    ValidationError,
)
from tensafe_nb.protocol.results import AuditLogEntry, AuditVerification
from tensafe_nb.store.audit import chain
from tensafe_nb.store.audit.files import LogFiles, read_key_file
from tensafe_nb.store.audit.key import SIZE, KeyPage, Secrets, key_page, unwrap_secret, wrap_secret
from tensafe_nb.store.audit.verify import check, verify_file
from tensafe_nb.store.disk import Files, disk_errors
from tensafe_nb.store.keys.keyring import Keys

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["AuditLog", "outcome_of", "verify_file"]

DAY = 86_400.0  # seconds
OWN = 32  # lines that are kept of those just written, for who follows the log


def outcome_of(error: BaseException | None) -> dict[str, Any]:
    """Return the fields of a record that say how an operation ended: never the text of an error, only its kind.

    Of a class whose name is no name (`type("My Error[int]", …)`), the nearest ancestor's is written.
    """
    if error is None:
        return {"success": True, "error_code": None, "error_class": None}
    code = error.code if isinstance(error, TGTinkerError) else "failed"
    if isinstance(error, FutureCancelledError):
        code = "cancelled"
    names = (ancestor.__name__ for ancestor in type(error).__mro__)
    return {
        "success": False,
        "error_code": code if isinstance(code, str) and code.isidentifier() else "failed",
        "error_class": next(name for name in names if name.isidentifier()),
    }


_logs: "weakref.WeakSet[AuditLog]" = weakref.WeakSet()  # of this process


def _start_anew() -> None:
    """Let a forked child open the files for itself: through its parent's, the lock of one would be that of both."""
    for log in list(_logs):
        log._lock = threading.Lock()
        log._files.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


@dataclass(frozen=True, slots=True)
class _Seen:
    """The files as we last left them; while they are so, nothing is read again."""

    page: bytes
    tip: chain.Tip


class AuditLog:
    """The audit log of one tenant. Nothing is read, made or asked before the first use.

    Threads and processes may append to one log. The log holds no tokens, texts, losses or paths.

    Args:
        folder: Holds `audit.jsonl` and `audit.key`.
        keys: Wrap the log's key.
        tenant: Whose log it is.
        files: How the disk is touched.

    Example:
        log = AuditLog(home.audit("local"), keys)
        log.append(operation="optim_step", training_client_id="tc-1", started_at=t0, completed_at=t1)
        assert log.verify(anchors=[noted_before]).ok
    """

    def __init__(self, folder: Path, keys: Keys, tenant: str = "local", files: Files | None = None) -> None:
        self.path = folder / "audit.jsonl"
        self._files = LogFiles(self.path, files or Files())
        self._keys = keys
        self._tenant = tenant
        self._lock = threading.Lock()
        self._secrets: Secrets | None = None
        self._seen: _Seen | None = None
        self._own: deque[tuple[chain.Tip, bytes, chain.Tip]] = deque(maxlen=OWN)
        _logs.add(self)

    def close(self) -> None:
        """Close the files, which stay open from one record to the next; the next record opens them again."""
        with self._lock:
            self._files.close()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self._files.close()

    def append(
        self,
        *,
        kind: str = "op",
        operation: str,
        training_client_id: str | None = None,
        request: "Iterable[Buffer]" = (),
        request_size_bytes: int | None = None,
        produced: Iterable[str] = (),
        consumed: Iterable[str] = (),
        started_at: float,
        completed_at: float,
        success: bool = True,
        error_code: str | None = None,
        error_class: str | None = None,
        dp_metrics: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        sync: bool = False,
        to_the_day: bool = False,
    ) -> chain.Tip:
        """Write one record, and return the log's end behind it, whose `head` is the record's hash.

        Args:
            kind: "op", "key", "artifact", "dp_charge", "dp_void", "dp_join", "import".
            operation: The verb.
            training_client_id: Whose operation it was.
            request: What was asked for, as pieces of bytes: hashed with a key of this log, never written. Where one
                piece ends counts; shapes and types do not, so put them into a piece.
            request_size_bytes: The pieces' own size by default.
            produced: Ids of artifacts written.
            consumed: Ids of artifacts read or deleted.
            started_at: Unix seconds.
            completed_at: Unix seconds.
            success: Whether it completed.
            error_code: Of the error, or "cancelled".
            error_class: Name of the error's class, never its text.
            dp_metrics: What a private step spent; fields that are for the operator's eyes are None.
            extra: More fields of the record, as plain data; they are readable by whoever reads the file.
            sync: Wait until the record is on the disk.
            to_the_day: Write down the day only: how long a private step took tells how many rows it drew.

        Raises:
            AuditLogError: The log was altered or cut; it is not continued, and the message says how to go on.
            KeyUnavailableError: The key that opens the log's own is not here.
            StorageError: The folder cannot be written; the records in it are intact.
        """
        extra = {} if extra is None else dict(extra)
        if extra and (taken := sorted(chain.FIELDS & extra.keys())):
            raise ValidationError(f"extra cannot hold {', '.join(taken)}: a record has fields of that name.")
        if to_the_day:
            started_at = completed_at = completed_at // DAY * DAY
        if error_class is not None and not error_class.isidentifier():
            raise ValidationError(f"error_class takes the name of a class, not {error_class!r:.40}.")
        fields: dict[str, Any] = {
            "kind": kind,
            "operation": operation,
            "training_client_id": training_client_id,
            "artifact_ids_produced": list(produced),
            "artifact_ids_consumed": list(consumed),
            "started_at": started_at,
            "completed_at": completed_at,
            "success": success,
            "error_code": error_code,
            "error_message": error_class,
            "dp_metrics": None if dp_metrics is None else dict(dp_metrics),
            "ts": completed_at if to_the_day else time.time(),
        }
        with self._lock, self._files:
            tip = self._ready()
            fields["request_hash"], size = self._open.hash_request(request)
            fields["request_size_bytes"] = size if request_size_bytes is None else request_size_bytes
            return self._write(tip, fields | extra, sync)

    def rewrap(self) -> bool:
        """Wrap the log's key under the primary key, after a rotation; False if it is, or if there is no log yet."""
        if not self.path.exists():
            return False
        with self._lock, self._files:
            tip = self._ready()
            old = self._open.stanzas
            if {stanza["kek_id"] for stanza in old} == {self._keys.primary_id()}:
                return False
            # the secret stays, and with it every record's key; only what wraps it changes
            secret = unwrap_secret(old, self._keys)
            self._secrets = Secrets.of(secret, wrap_secret(secret, self._keys))
            self._seen = None  # if writing fails, the old wrapping is what counts
            self._write_event(tip, "key", "rewrap_log_key")
            return True

    def key_ids(self) -> tuple[str, ...]:
        """Return the ids of the keys that open the log's own: with none of them here, it cannot be continued."""
        with disk_errors("read the audit log's key file"):
            raw = read_key_file(self.path)
        try:
            return tuple(str(stanza["kek_id"]) for stanza in KeyPage.parse(raw).stanzas) if raw else ()
        except AuditLogError as error:
            raise self._broken(error) from error

    def head(self) -> dict[str, Any] | None:
        """Return {"account", "seq", "record_hash"} of the last record, for a checkpoint's header; None without one."""
        for record in chain.newest_first(self.path):
            return {"account": None, "seq": record["seq"], "record_hash": record["record_hash"]}
        return None

    def follow(self, behind: chain.Tip | None = None) -> tuple[list[dict[str, Any]], chain.Tip | None]:
        """Return the records behind a place, and the place behind them.

        Each is checked against the chain with the key, unless this object has just written it.

        Args:
            behind: A place that was returned before; None is the beginning.

        Raises:
            AuditLogError: The log was altered, cut, or is gone.
            KeyUnavailableError: The key that opens the log's own is not here.
            StorageError: It cannot be read.
        """
        if not self.path.exists():
            if behind is None:
                return [], None
            raise self._broken(AuditLogError("it is gone"))
        with self._lock, self._files:
            end = self._ready()
            tip = behind or chain.first_tip(unwrap_secret(self._open.stanzas, self._keys))
            records: list[dict[str, Any]] = []
            for before, line, after in self._own:  # what this object has chained itself, it need not check
                if before == tip:
                    records.append(json.loads(line))
                    tip = after
            if tip == end:
                return records, tip
            try:
                return records + self._between(tip, end), end
            except AuditLogError as error:
                raise self._broken(error) from error

    def _between(self, tip: chain.Tip, end: chain.Tip) -> list[dict[str, Any]]:
        records = []
        with self.path.open("rb") as log:
            for line in chain.lines(log, tip.size, end.size):
                tip = _next(tip, line)
                records.append(json.loads(line))
        if tip != end:
            raise AuditLogError("it is not the log that was read before, or its end was cut off")
        return records

    def entries(
        self,
        training_client_id: str | None = None,
        operation: str | None = None,
        limit: int = 100,
        offset: int = 0,
    ) -> list[AuditLogEntry]:
        """Return records, newest first; unfiltered, each one's `prev_hash` is the next one's `record_hash`.

        Args:
            training_client_id: Of this client only.
            operation: Of this verb only.
            limit: At most so many.
            offset: Leave out so many of the newest that fit.
        """
        if limit < 0 or offset < 0:
            raise ValidationError(f"limit and offset count records, from 0; they are {limit} and {offset}.")
        found: list[AuditLogEntry] = []
        for record in chain.newest_first(self.path) if limit else ():
            if training_client_id not in (None, record["training_client_id"]):
                continue
            if operation not in (None, record["operation"]):
                continue
            if offset:
                offset -= 1
                continue
            found.append(chain.entry_of(record))
            if len(found) == limit:
                break
        return found

    def verify(self, anchors: Sequence[str] = ()) -> AuditVerification:
        """Check the whole log with the key, its key file, and the given `record_hash`es noted elsewhere."""
        return check(self.path, self._keys, anchors, own=True)

    @property
    def _open(self) -> Secrets:
        assert self._secrets is not None
        return self._secrets

    def _ready(self) -> chain.Tip:
        """Return where the next record goes, having read, started or repaired what is there."""
        raw, size = self._files.page(), self._files.size
        # every append of another process changes the page: its number, its nonce
        if self._seen and (raw, size) == (self._seen.page, self._seen.tip.size):
            return self._seen.tip
        try:
            tip = self._resumed(raw, size) if raw or size else self._started()
        except KeyUnavailableError:
            raise
        except (AuditLogError, DecryptionError) as error:
            raise self._broken(error) from error
        if tip.seq == 0:
            self._write_event(tip, "genesis", "start_log")
        return self._seen.tip if self._seen else tip

    def _started(self) -> chain.Tip:
        secret = os.urandom(SIZE)
        self._secrets = Secrets.of(secret, wrap_secret(secret, self._keys))
        tip = chain.first_tip(secret)
        self._keep(tip, sync=True)
        self._files.keep_names()
        return tip

    def _resumed(self, raw: bytes, size: int) -> chain.Tip:
        """Take in what a process that died wrote behind the last record that the key file counts."""
        tip = self._opened(raw)
        with self.path.open("rb") as log:
            chain.check_end(log, tip, size)
            for line in chain.lines(log, tip.size, size):
                if line.endswith(b"\n"):
                    tip = _next(tip, line)
                else:
                    self._files.set_aside(line)
        self._keep(tip, sync=False)
        return tip

    def _opened(self, raw: bytes) -> chain.Tip:
        if not raw:
            raise AuditLogError("its key file is missing")
        page = KeyPage.parse(raw)
        if self._secrets is None or self._secrets.stanzas != page.stanzas:
            self._secrets = Secrets.of(unwrap_secret(page.stanzas, self._keys), page.stanzas)
        return page.opened(self._secrets)

    def _write_event(self, tip: chain.Tip, kind: str, operation: str) -> None:
        """Write a record of the log's own, which carries the log's wrapped key."""
        now = time.time()
        fields: dict[str, Any] = dict.fromkeys(
            ("training_client_id", "error_code", "error_message", "dp_metrics")
        )
        fields |= {
            "kind": kind,
            "operation": operation,
            "started_at": now,
            "completed_at": now,
            "success": True,
            "ts": now,
        }
        fields |= {"artifact_ids_produced": [], "artifact_ids_consumed": []}
        fields["request_hash"], fields["request_size_bytes"] = self._open.hash_request(())
        fields["stanzas"] = list(self._open.stanzas)
        self._write(tip, fields, sync=True)

    def _write(self, tip: chain.Tip, fields: dict[str, Any], sync: bool) -> chain.Tip:
        """Append, flush, then replace the key: a death in between leaves a record that the next append takes in."""
        fields |= {
            "entry_id": f"log-{os.urandom(8).hex()}",
            "tenant_id": self._tenant,
            "duration_ms": round((fields["completed_at"] - fields["started_at"]) * 1000, 3),
        }
        record, line = tip.record(fields)
        self._files.append(line, sync)
        end = tip.moved(record, line)
        self._keep(end, sync=False)  # a key file that is behind the log is made up for by the log
        self._own.append((tip, line, end))
        return end

    def _keep(self, tip: chain.Tip, sync: bool) -> None:
        page = key_page(tip, self._open)
        self._files.keep(page, sync)
        self._seen = _Seen(page, tip)

    def _broken(self, reason: Exception) -> AuditLogError:
        return AuditLogError(
            f"The audit log {self.path} is not continued: {reason}. verify_audit_log() tells more. To go on, move the "
            f"folder {self.path.parent} away and keep it: the next operation then starts a new log. The old one stays "
            f"evidence up to its last good record; anchors and checkpoints made so far point into it, and nothing "
            f"ties the new log to it."
        )


def _next(tip: chain.Tip, line: bytes) -> chain.Tip:
    try:
        return tip.after(line)
    except AuditLogError as error:
        raise AuditLogError(f"record {tip.seq} is not a continuation of it: {error}") from error
