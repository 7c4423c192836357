"""What the events of one training client add up to: the facts of badge, table and bar, ready at any moment."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol, cast

from tensafe_nb.config import TrainingConfig
from tensafe_nb.errors import TGTinkerError
from tensafe_nb.events import (
    Event,
    Metrics,
    OperationCancelled,
    OperationFailed,
    OperationFinished,
    OperationStarted,
    Progress,
    RunHistory,
    RunState,
    RunStep,
    StatusChanged,
)
from tensafe_nb.records import RunRecord
from tensafe_nb.runs import TrainingRun
from tensafe_nb.types import ClientStatus, RunStatus, TrainingClientInfo
from tensafe_nb.widgets.landmarks import KINDS, Landmarks
from tensafe_nb.widgets.recording import RecordedRun, Recording
from tensafe_nb.widgets.view import VIEW, Member, View

ETA_STEPS = 20  # the median of their durations
ETA_AFTER = 5


class Watched(Protocol):
    """What there is to see of a training client."""

    @property
    def training_client_id(self) -> str: ...
    @property
    def config(self) -> TrainingConfig: ...
    @property
    def history(self) -> RunHistory: ...
    @property
    def runs(self) -> tuple[TrainingRun, ...]: ...
    @property
    def step(self) -> int: ...
    @property
    def marks(self) -> tuple[str, ...]:
        """Words that badge, picture and text carry, so that nobody takes it for something else: "REPLAY"."""

    @property
    def steerable(self) -> bool:
        """Whether buttons can reach it; where not, there are none."""

    def refresh(self) -> TrainingClientInfo: ...
    def subscribe(
        self, subscriber: Callable[[Event], None], after: int | None = None
    ) -> Callable[[], None]: ...


@dataclass(frozen=True, slots=True)
class Facts:
    """A training client, and one run of it, at one moment; None is unknown and shown as a dash.

    Attributes:
        client: Status of the client.
        state: State of the run; the client's status where there is no run.
        run_id: The run.
        step: Steps the run has done; the client's step where there is no run.
        planned: Steps the run is to do.
        elapsed: Seconds since the run started, or that it took.
        eta: Seconds it will still take, judged by its last steps.
        queued: Operations waiting or running.
        operation: The one that runs.
        operation_seconds: For how long.
        reason: Why run or client failed.
        active: Whether more is to come by itself: worth a heartbeat.
    """

    client: str
    state: str
    run_id: str | None
    step: int
    planned: int | None
    elapsed: float | None
    eta: float | None
    queued: int
    operation: str | None
    operation_seconds: float | None
    reason: str | None
    active: bool

    @property
    def run_number(self) -> str | None:
        return self.run_id and self.run_id.rpartition("/")[2]

    @property
    def run_ended(self) -> bool:
        return self.run_id is not None and RunStatus(self.state).ended


@dataclass(slots=True)
class _RunRecord:
    started_at: float | None = None
    ended_at: float | None = None
    reason: str | None = None
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=ETA_STEPS))


class Feed:
    """Listens to one training client and wakes the members that show it.

    Args:
        client: Whom to listen to.
        view: Who flushes the members.
        clock: The time by which its events are stamped, in Unix seconds; of a recording, that of its latest event.
    """

    def __init__(self, client: Watched, view: View = VIEW, clock: Callable[[], float] = time.time) -> None:
        self.client, self.view, self._clock = client, view, clock
        self._members: list[Member] = []
        self._records: dict[str, _RunRecord] = {}
        self._operation: OperationStarted | None = None
        self._closed = client.refresh().status == ClientStatus.TERMINATED
        self.measured_at = 0.0  # Unix seconds of the latest metrics
        self.landmarks = Landmarks()
        self._noting = threading.Lock()
        self._early: list[Event] | None = []  # what happens while the past is read
        client.subscribe(self._on_event)
        self._catch_up()

    def _catch_up(self) -> None:
        """Read what was left along the curves before anybody watched."""
        known = self.client.history.last_seq
        for event in self.client.history.events(kinds=KINDS):
            if event.seq <= known:
                self.landmarks.note(event)
        with self._noting:
            early, self._early = self._early or [], None
            for event in early:
                if event.seq > known:
                    self._note(event)

    def watch(self, member: Member) -> None:
        """Have a member flushed after every event from now on."""
        self._members.append(member)
        self.view.wake(member)

    def settle(self, timeout: float) -> bool:
        """Wait until everything that shows this client has shown its end; False if it has not in time."""
        return self.view.settle(self._members, timeout)

    @property
    def latest(self) -> TrainingRun | None:
        """The run started last."""
        return self.client.runs[-1] if self.client.runs else None

    @property
    def over(self) -> bool:
        """Whether nothing can come any more: client closed, runs ended."""
        return self._closed and all(run.state.ended for run in self.client.runs)

    @property
    def curve(self) -> str:
        """The metric to watch: the run's own; of a client without a run, the reward if there is one, else the loss."""
        if self.latest is not None:
            return self.latest.curve
        return "reward" if "reward" in self.client.history else "loss"

    @property
    def marks(self) -> tuple[str, ...]:
        """What it is not: a recording is no live run, what a mock made up is no measurement."""
        return (*self.client.marks, *(("MOCK",) if self.landmarks.mocked else ()))

    @property
    def is_private(self) -> bool:
        """Whether it trains with differential privacy: then curves and texts are for its operator only."""
        return self.client.config.dp_config is not None

    def decode(self) -> Callable[[Sequence[int]], list[str]] | None:
        """Return what turns token ids into texts; None where there is no tokenizer."""
        tokenizer = getattr(self.client, "tokenizer", None) if self.client.steerable else None
        return None if tokenizer is None else lambda ids: [tokenizer.decode([token]) for token in ids]

    def count_saving(self, change: int) -> None:
        """A checkpoint that a button asked for is on its way, or there."""
        with self._noting:
            self.landmarks.saving += change
            self.landmarks.changes["rows"] += 1
        self._wake()

    def learn(self, details: Mapping[str, Mapping[str, Any]]) -> None:
        """Take in what was looked up of checkpoints."""
        with self._noting:
            self.landmarks.details.update(details)
            self.landmarks.changes["rows"] += 1
        self._wake()

    @property
    def description(self) -> str:
        """What is trained, in a few words."""
        config = self.client.config
        adapter = f"LoRA r{config.lora_config.rank}" if config.lora_config else "all weights"
        return f"{config.model_ref} · {adapter}"

    def facts(self, run: TrainingRun | None = None) -> Facts:
        """Return what is known now, of the run given or of the latest."""
        info = self.client.refresh()
        run = run or self.latest
        operation = self._operation
        record = _RunRecord() if run is None else self._records.get(run.run_id, _RunRecord())
        return Facts(
            client=info.status,
            state=info.status if run is None else str(run.state),
            run_id=None if run is None else run.run_id,
            step=info.step if run is None else run.steps_done,
            planned=None if run is None else run.planned_steps,
            elapsed=_elapsed(record, run, self._clock()),
            eta=None if run is None else _eta(run, record),
            queued=info.queue_depth,
            operation=None if operation is None else operation.operation,
            operation_seconds=None if operation is None else self._clock() - operation.time,
            reason=info.reason if run is None else _reason(run, record) or info.reason,
            active=not self._closed and (info.queue_depth > 0 or (run is not None and not run.state.ended)),
        )

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Progress):
            return
        with self._noting:
            if self._early is not None:
                self._early.append(event)
            else:
                self._note(event)
        self._wake()

    def _wake(self) -> None:
        for member in self._members:
            self.view.wake(member)

    def _note(self, event: Event) -> None:
        self.landmarks.note(event)
        match event:
            case Metrics(time=moment):
                self.measured_at = moment
            case OperationStarted():
                self._operation = event
            case OperationFinished() | OperationFailed() | OperationCancelled():
                if self._operation is not None and self._operation.future_id == event.future_id:
                    self._operation = None
            case RunStep(run_id=run_id, duration=duration):
                self._record(run_id).durations.append(duration)
            case RunState(run_id=run_id, state=state, reason=reason):
                record = self._record(run_id)
                record.reason = reason
                if RunStatus(state).ended:
                    record.ended_at = event.time
                elif record.started_at is None and state == RunStatus.RUNNING and not record.durations:
                    record.started_at = event.time
            case StatusChanged(status=ClientStatus.TERMINATED):
                self._closed = True

    def _record(self, run_id: str) -> _RunRecord:
        return self._records.setdefault(run_id, _RunRecord())


Source = TrainingRun | RunRecord | RecordedRun | Watched | Feed
_feeds: dict[Watched | RunRecord, Feed] = {}


def feed_of(source: Source) -> Feed:
    """Return the one feed of a training client, of a run's client, or of a recorded run."""
    if isinstance(source, Feed):
        return source
    subject = _subject(source)
    if subject not in _feeds:
        _feeds[subject] = _listen(subject)
    return _feeds[subject]


def settle(source: Source, timeout: float) -> bool:
    """Wait until everything that shows a client has shown its end; True at once where nothing shows it."""
    feed = source if isinstance(source, Feed) else _feeds.get(_subject(source))
    return feed is None or feed.settle(timeout)


def _subject(source: TrainingRun | RunRecord | RecordedRun | Watched) -> Watched | RunRecord:
    return cast(Watched, source.client) if isinstance(source, TrainingRun | RecordedRun) else source


def _listen(subject: Watched | RunRecord) -> Feed:
    if isinstance(subject, RunRecord):
        recording = Recording(subject, "RECORDED")
        feed = Feed(recording, clock=recording.now)
        recording.tell_all()
        return feed
    return Feed(subject, clock=subject.now) if isinstance(subject, Recording) else Feed(subject)


def _elapsed(record: _RunRecord, run: TrainingRun | None, now: float) -> float | None:
    started_at = record.started_at or (None if run is None else run.started_at)
    return None if started_at is None else (record.ended_at or now) - started_at


def _eta(run: TrainingRun, record: _RunRecord) -> float | None:
    if run.planned_steps is None or run.steps_done <= ETA_AFTER or run.state is not RunStatus.RUNNING:
        return None
    return median(record.durations) * (run.planned_steps - run.steps_done) if record.durations else None


def _reason(run: TrainingRun, record: _RunRecord) -> str | None:
    """Return why a run failed, also where its end was not witnessed."""
    if run.state is not RunStatus.FAILED or record.reason or not run.done():
        return record.reason
    try:
        run.result(0)
    except TGTinkerError as error:
        return str(error)
    return None
