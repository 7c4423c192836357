"""The journal of a training client: what a server needs to go on where it was killed.

It lies beside the client's event log, sealed with the tenant's key, and has three parts:

- `operations-N`: what came in, in order: operations with their bodies, refusals that took a turn, what runs told; and
  which automatic checkpoint holds everything up to where.
- `results-N`: how each operation ended. What is in there has ended, whatever else is missing.
- `states`: automatic checkpoints. The last that is named counts.

Everything is written here before anybody else learns of it, and in one order: **journal, event log, stream**. So
whenever the process dies, what is torn is resolved by what is there:

- *An operation is in the journal, and its 202 never left*: it is carried out. The kernel sends it again, with its old
  number, and gets the answer that it would have had.
- *It ran, and its end is not in the results*: it runs again, from the same state. The events that the first attempt
  left in the log are not told again; an artifact that it had sealed is found under the id that came with the operation.
- *Its end is in the results, and no event tells of it*: the event is told, and nothing runs.
- *A checkpoint is sealed, and not named*: it is swept away, and the one before it counts.
- *It is named, and the older operations are still there*: they are passed over. A new `operations` file counts from the
  record on that says that all of it was carried over; until then the old one does.
- *What a run told is in the journal, and not in the log*: the journal has the numbers that were set aside for it.

After a rotation of keys both files begin anew under the new key with the next automatic checkpoint, and what was under
the old one is removed: `Vault.needing` asks them before a key is forgotten.

Of a private client nothing runs twice. Its state is kept at every step, before the step is told of; a step that was cut
off fails, and what was paid for it is in the ledger.

What the system was given outlives the process; what was synced, about once a second, outlives a power cut, too.
"""

import json
import logging
import shutil
import struct
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tensafe_nb.core.past import Past
from tensafe_nb.core.queue import Job
from tensafe_nb.errors import StorageError, TGTinkerError
from tensafe_nb.protocol import wire
from tensafe_nb.protocol.codec import encode
from tensafe_nb.protocol.results import FutureStatus, TrainingClientInfo
from tensafe_nb.server.answers import error_of
from tensafe_nb.store.artifacts.artifacts import ArtifactStore, new_id
from tensafe_nb.store.disk import Files, make_folder
from tensafe_nb.store.keys.keyring import Keys
from tensafe_nb.store.sealed.log import SealedLog, key_of

logger = logging.getLogger(__name__)

VERSION = 1
MOST_OPERATIONS, MOST_SECONDS, MOST_BYTES = 50, 30.0, 64 << 20  # since a checkpoint, until the next is made
SHARE = 30  # the time between two checkpoints is at least so many times what the last one took
OPEN = 4  # times those bounds, and a window that is open is kept as it is
KEPT_RESULTS = 1_000  # of a file of results; of those, the last two are kept
KEPT_ANSWERS = 64  # of a submitter, across a restart: it has 4 submissions on their way at a time
KEPT_SUBMITTERS = 64
KEPT_TOLD = 256  # failures of which a kernel said that it knows


def pack(record: Mapping[str, Any], body: bytes = b"") -> bytes:
    """Return a record of the journal: its JSON, and bytes as they came."""
    head = json.dumps(record, allow_nan=False, separators=(",", ":")).encode()
    return struct.pack(">I", len(head)) + head + body


def unpack(content: bytes) -> "Record":
    """Read what `pack` made."""
    length = int.from_bytes(content[:4], "big")
    return Record(json.loads(content[4 : 4 + length]), content[4 + length :])


@dataclass(frozen=True, slots=True)
class Record:
    """A record of the journal."""

    fields: Mapping[str, Any]
    body: bytes

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]


@dataclass(slots=True)
class SubmitterSoFar:
    """A submitter, as the journal has it: its next number, and what its last ones were answered with."""

    next: int = 1
    answers: "deque[tuple[int, dict[str, Any]]]" = field(default_factory=lambda: deque(maxlen=KEPT_ANSWERS))

    def took(self, number: int, answer: dict[str, Any]) -> None:
        self.next = max(self.next, number + 1)
        self.answers.append((number, answer))


@dataclass(frozen=True, slots=True)
class Waiting:
    """What came in since the last automatic checkpoint.

    Attributes:
        number: Of its record in the file.
        record: It, without its body.
        before: How many failures were known to some kernel before it came.
        tellings: And with what its own kernel said.
    """

    number: int
    record: Record
    before: int
    tellings: int


def past_of(ended: Record) -> Past:
    """Return how an operation ended."""
    return Past(FutureStatus(ended["state"]), ended["started"], ended["streams"])


class Journal:
    """The journal of one training client, open to be written. Methods may be called from any thread.

    Args:
        folder: Its own.
        keys: Seal it.
        tenant: Whose it is.
        begun: Of a new one: what the training client is. None opens the one that is there.
        files: How the disk is touched.

    Attributes:
        states: The automatic checkpoints.
        begun: What the training client is, as `begun` said.
        base: The last automatic checkpoint.
        info: How the training client stood there; None before the first.
        submitters: Who has submitted what.
        told: Failed operations that some kernel said it knows of, and how many there were then.
        draws: How many Poisson draws were made for it, and what a unit of the last one is.
        drawn_keys: The keys of whoever asked for the last of them; None where a draw had none.
        published_once: The last number of what runs told, by the name of the request that brought it.
        waiting: What came in since `base`, by future id.
        results: How operations ended before this process, by future id, the newest last.
        owed: What a run told last: the number set aside for the first of its events, and their records.

    Raises:
        DecryptionError: It was altered.
        StorageError: The disk refuses, or another server writes it.
    """

    def __init__(
        self,
        folder: Path,
        keys: Keys,
        tenant: str,
        begun: Mapping[str, Any] | None = None,
        files: Files | None = None,
    ) -> None:
        self.folder, self._keys, self._files = folder, keys, files or Files()
        self.states = ArtifactStore(folder / "states", keys, tenant)
        self._lock, self._syncing = threading.RLock(), threading.Lock()  # the second is taken first
        self.begun: Mapping[str, Any] = begun or {}
        self.base: str | None = None
        self.info: Mapping[str, Any] | None = None
        self.submitters: OrderedDict[str, SubmitterSoFar] = OrderedDict()
        self.told: OrderedDict[str, int] = OrderedDict()
        self.waiting: OrderedDict[str, Waiting] = OrderedDict()
        self._tellings, self.draws = 0, (0, "")
        self.drawn_keys: deque[str | None] = deque(maxlen=KEPT_ANSWERS)
        self.published_once: OrderedDict[str, int] = OrderedDict()
        self.results: OrderedDict[str, Record] = OrderedDict()
        self.owed: tuple[int, list[Any]] = (0, [])
        self._publishing: bytes | None = None  # what is on its way into the event log
        self._unwritten: deque[bytes] = deque()  # results that a full disk has refused
        self._since = self._asked = time.monotonic()
        self._took, self._count, self._from = 0.0, 0, 0
        self._superseded: list[SealedLog] = []  # files and
        self._dropped: list[str] = []  # checkpoints that nothing needs once what was written is on the disk
        self._dirty = False
        make_folder(self._files, folder)
        if begun is not None:
            self._operations, self._results = self._new("operations", 1), self._new("results", 1)
            self._carry_over(None)
        else:
            self._operations, self._results = self._read_operations(), self._read_results()
            self._settle()

    # reading

    def _paths(self, kind: str) -> list[Path]:
        return sorted(self.folder.glob(f"{kind}-*.tsnj"))

    def _new(self, kind: str, number: int) -> SealedLog:
        path = self.folder / f"{kind}-{number:08}.tsnj"
        return SealedLog(path, self._keys, {"version": VERSION}, self._files)

    def _read_operations(self) -> SealedLog:
        """Read the newest file that holds all that was to be carried over; others are removed."""
        found: SealedLog | None = None
        for path in reversed(self._paths("operations")):
            if found is not None or path.stat().st_size == 0:
                path.unlink()
                continue
            log = SealedLog(path, self._keys, files=self._files)
            records, log.found = [unpack(content) for content in log.found], []
            if any(record["$"] == "carried" for record in records):
                found = log
                for number, record in enumerate(records):
                    self._take(number, record)
            else:
                log.remove()
        if found is None:
            raise StorageError(f"{self.folder} holds no journal that is whole.")
        return found

    def _take(self, number: int, record: Record) -> None:
        match record["$"]:
            case "begun":
                self.begun, self.base, self.info = record["client"], record["base"], record["info"]
                self.told = OrderedDict.fromkeys(record["told"], 0)
                self.draws = tuple(record["draws"])
                self.drawn_keys.extend(record.fields.get("drawn_keys", ()))  # records of 0.2 have none
                self.published_once.update(record.fields.get("published_once", {}))
                for name, (following, answers) in record["submitters"].items():
                    known = self.submitters[name] = SubmitterSoFar(following)
                    known.answers.extend((place, answer) for place, answer in answers)
            case "submitted" | "refused":
                self._took_turn(record, number)
            case "published":
                self.owed = record["first"], json.loads(record.body)
                self._published(record, record["first"] + len(self.owed[1]) - 1)
            case "drawn":
                self._drew(record["unit"], record.fields.get("key"))
            case "kept":
                self._cover(record["base"], record["through"], record["info"])

    def _took_turn(self, record: Record, number: int) -> None:
        self._answered(record, {name: record[name] for name in ("future_id", "verb", "at", "error")})
        before = self._tellings
        for name in record["knows_of"]:
            self._tellings += name not in self.told
            self.told.setdefault(name, self._tellings)
        while len(self.told) > KEPT_TOLD:
            self.told.popitem(last=False)
        self.waiting[record["future_id"]] = Waiting(number, record, before, self._tellings)

    def operation(self, future_id: str) -> Record:
        """Return what came in, with its body, read from the file."""
        return unpack(self._operations[self.waiting[future_id].number])

    def known_to(self, future_id: str) -> frozenset[str]:
        """Return the failures of which it was known as an operation came in."""
        until = self.waiting[future_id].tellings
        return frozenset(name for name, telling in self.told.items() if telling <= until)

    def _answered(self, record: Record, answer: dict[str, Any]) -> None:
        if record["submitter"] is not None:
            self.submitters.setdefault(record["submitter"], SubmitterSoFar()).took(record["number"], answer)
            self.submitters.move_to_end(record["submitter"])
            while len(self.submitters) > KEPT_SUBMITTERS:
                self.submitters.popitem(last=False)

    def _cover(self, base: str, through: str | None, info: Mapping[str, Any] | None) -> None:
        """Let an automatic checkpoint stand for what came in, up to an operation."""
        self.base, self.info = base, info
        if through in self.waiting:
            while self.waiting.popitem(last=False)[0] != through:
                pass

    def _read_results(self) -> SealedLog:
        log: SealedLog | None = None
        for path in self._paths("results"):
            if log is not None:
                log.close()
            log = SealedLog(path, self._keys, files=self._files)
            for content in log.found:
                record = unpack(content)
                self.results[record["future_id"]] = record
            log.found = []
        return self._new("results", 1) if log is None else log

    def _settle(self) -> None:
        """Take the newest state that the end of an operation has named, and sweep away those that nothing names."""
        for name in reversed(self.waiting):
            ended = self.results.get(name)
            if ended is not None and ended["base"] is not None:
                self._cover(ended["base"], name, ended["info"])
                break
        self._from = self._operations.size
        with suppress(TGTinkerError):
            for state in self.states.list():
                if state.artifact_id != self.base:
                    self.states.delete(state.artifact_id)

    # writing, before anybody is told

    def submitted(self, place: Mapping[str, Any], verb: str, media_type: str, body: bytes, job: Job) -> None:
        """Write down an operation that is about to be queued.

        Args:
            place: Its submitter and its number there, failures of which that one knows, whether it was cancelled.
            verb: What it is.
            media_type: Of its body.
            body: As it came.
            job: Its job; it is told under which id to save.
        """
        if verb == "save_state":
            job.artifact_id = new_id()
        self._enter(
            {"$": "submitted", "future_id": job.future_id, "verb": verb, "type": media_type, "error": None,
             "artifact_id": job.artifact_id, "at": time.time(), **place}, body,
        )  # fmt: skip

    def refused(self, place: Mapping[str, Any], verb: str, future_id: str, error: TGTinkerError) -> None:
        """Write down that an operation will fail in its turn."""
        self._enter(
            {"$": "refused", "future_id": future_id, "verb": verb, "error": error_of(error), "at": time.time(),
             **place}, b"",
        )  # fmt: skip

    def _enter(self, fields: Mapping[str, Any], body: bytes) -> None:
        with self._lock:
            number = self._operations.append(pack(fields, body))
            self._took_turn(Record(fields, b""), number)
            self._dirty = True

    def publishing(
        self,
        submitter: str | None,
        number: int | None,
        first: int,
        events: list[Any],
        *,
        once: str | None = None,
    ) -> None:
        """Write down what a run tells, with the number that the first of it is about to get."""
        fields = {"$": "published", "submitter": submitter, "number": number, "first": first, "once": once}
        content = pack(fields, json.dumps(events, allow_nan=False).encode())
        with self._lock:
            self._operations.append(content)
            self._published(Record(fields, b""), first + len(events) - 1)
            self._publishing, self._dirty = content, True

    def _published(self, record: Record, last: int) -> None:
        self._answered(record, {"seq": last})
        once = record.fields.get("once")
        if once is not None:
            self.published_once[once] = last
            while len(self.published_once) > KEPT_ANSWERS:
                self.published_once.popitem(last=False)

    def drawn(self, unit: str, key: str | None = None) -> None:
        """Write down that a Poisson draw is about to be made: whatever comes of it, it is to be paid for."""
        with self._lock:
            self._operations.append(pack({"$": "drawn", "unit": unit, "key": key}))
            self._drew(unit, key)
            self._dirty = True

    def _drew(self, unit: str, key: str | None) -> None:
        self.draws = self.draws[0] + 1, unit
        self.drawn_keys.append(key)

    def published(self) -> None:
        """Take note that it is in the event log."""
        self._publishing = None

    def ended(
        self,
        job: Job,
        outcome: object,
        *,
        duration: float,
        streams: Mapping[str, Any] | None,
        base: str | None,
        info: TrainingClientInfo,
    ) -> None:
        """Write down how an operation ended; see `Keeper.ended`. What a full disk refuses is written with the next."""
        fields: dict[str, Any] = {"$": "ended", "future_id": job.future_id, "verb": job.kind.verb, "duration": duration,
                  "started": job.promise.started_at is not None, "streams": streams, "base": base,
                  "info": None if base is None else encode(info), "type": None, "error": None}  # fmt: skip
        body = b""
        match outcome:
            case None:
                fields["state"] = FutureStatus.CANCELLED
            case BaseException():
                fields["state"], fields["error"] = FutureStatus.FAILED, error_of(outcome)
            case _:
                fields["state"] = FutureStatus.COMPLETED
                fields["type"], body = wire.pack(outcome)
        with self._lock:
            self._count, self._dirty = self._count + 1, True
            self._unwritten.append(pack(fields, body))
            self._catch_up()
            if base is not None:
                self._supersede()
                self._cover(base, job.future_id, fields["info"])

    def _catch_up(self) -> None:
        try:
            while self._unwritten:
                self._results.append(self._unwritten[0])
                self._unwritten.popleft()
        except StorageError as error:
            logger.error("the end of an operation cannot be written down; it is tried again: %s", error)

    # checkpoints

    def is_due(self, *, whole: bool) -> bool:
        """Whether an automatic checkpoint should be made: at the bounds above, which an open window may exceed."""
        self._asked, more = time.monotonic(), 1 if whole else OPEN
        since = self._asked - self._since
        return bool(self._count) and since >= SHARE * self._took and (
            self._count >= more * MOST_OPERATIONS
            or since >= more * MOST_SECONDS
            or self.unkept_bytes >= more * MOST_BYTES
        )  # fmt: skip

    @property
    def unkept_bytes(self) -> int:
        """How much came in since the last automatic checkpoint."""
        return self._operations.size - self._from

    @property
    def size(self) -> int:
        """How many bytes of it are on the disk, its automatic checkpoints included."""
        sizes = 0
        with suppress(FileNotFoundError):  # removed a moment ago
            for path in self.folder.rglob("*.tsn*"):
                with suppress(FileNotFoundError):
                    sizes += path.stat().st_size
        return sizes

    def kept(self, base: str, through: str | None, info: TrainingClientInfo) -> None:
        """Name an automatic checkpoint, and go on in a new file, with what it does not cover.

        Nobody waits for the disk here: what this makes superfluous stays until the next `sync`, and counts till then.
        """
        fields = {"$": "kept", "base": base, "through": through, "info": encode(info)}
        with self._lock:
            self._operations.append(pack(fields))
            self._supersede()
            self._cover(base, through, fields["info"])
            self._turn_over()
            self._count, self._dirty = 0, True
        self._since = time.monotonic()
        self._took = self._since - self._asked

    def _supersede(self) -> None:
        if self.base is not None:
            self._dropped.append(self.base)

    def _turn_over(self) -> None:
        primary, paths = self._keys.primary_id(), self._paths("results")
        if any(key_of(path) != primary for path in paths):
            self._reseal(paths)
        old = self._operations
        self._operations = self._new("operations", number_of(old) + 1)
        try:
            self._carry_over(old)
        except BaseException:
            self._operations.remove()
            self._operations = old
            raise
        self._superseded.append(old)
        self._from = self._operations.size
        if len(self._results) >= KEPT_RESULTS:
            self._results.close()
            self._results = self._new("results", number_of(self._results) + 1)
            for path in self._paths("results")[:-2]:
                path.unlink()

    def _reseal(self, paths: list[Path]) -> None:
        """Write the results that are kept under the new key; the old files stay until that is on the disk."""
        olds = [SealedLog(path, self._keys, files=self._files) for path in paths[:-1]] + [self._results]
        new = self._new("results", number_of(self._results) + 1)
        try:
            for old in olds:
                old.found = []
                for number in range(len(old)):
                    new.append(old[number])
        except BaseException:
            new.remove()
            raise
        self._results = new
        self._superseded += olds

    def _carry_over(self, old: SealedLog | None) -> None:
        """Write how things stand, and what still waits; the last record says that this is all of it."""
        submitters = {name: [known.next, list(known.answers)] for name, known in self.submitters.items()}
        first = next(iter(self.waiting.values()), None)
        told = [name for name, telling in self.told.items() if first is None or telling <= first.before]
        begun = {"$": "begun", "client": dict(self.begun), "base": self.base, "info": self.info,
                 "told": told, "draws": self.draws, "drawn_keys": list(self.drawn_keys),
                 "published_once": self.published_once, "submitters": submitters}  # fmt: skip
        self._operations.append(pack(begun))
        if old is not None:
            moved = {name: self._operations.append(old[w.number]) for name, w in self.waiting.items()}
            for name, number in moved.items():
                self.waiting[name] = replace(self.waiting[name], number=number)
            if self._publishing is not None:
                self._operations.append(self._publishing)
        self._operations.append(pack({"$": "carried"}))

    def sync(self) -> None:
        """Put everything on the disk, then remove what it makes superfluous; what a disk refuses, the next call tries.

        Whoever calls while another does waits for it: else it would go on before anything is on the disk.
        """
        with self._syncing:
            with self._lock:
                self._catch_up()
                if not self._dirty:
                    return
                self._dirty = False
                logs, self._superseded = self._superseded, []
                states, self._dropped = self._dropped, []
                operations, results = self._operations, self._results
            try:
                operations.sync()
                results.sync()
            except BaseException:
                with self._lock:
                    self._dirty = True
                    self._superseded, self._dropped = logs + self._superseded, states + self._dropped
                raise
            for log in logs:
                log.remove()
            for state in states:
                with suppress(TGTinkerError):
                    self.states.delete(state)

    # its end

    def close(self) -> None:
        """Write out everything; later records are lost."""
        with suppress(TGTinkerError):
            self.sync()
        self._close_files()

    def remove(self) -> None:
        """Remove it: the training client has ended for good."""
        self._close_files()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _close_files(self) -> None:
        with self._lock:
            for log in (self._operations, self._results, *self._superseded):
                log.close()


def number_of(log: SealedLog) -> int:
    """Return the number in a file's name."""
    return int(log.path.stem.rpartition("-")[2])
