"""What the events of one training client add up to: the facts of badge, table and bar, ready at any moment."""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Protocol, cast

from tensafe_nb.config import TrainingConfig
from tensafe_nb.errors import TGTinkerError, ValidationError
from tensafe_nb.events import (
    Event,
    Metrics,
    OperationCancelled,
    OperationFailed,
    OperationFinished,
    OperationStarted,
    Progress,
    RunState,
    RunStep,
    StatusChanged,
)
from tensafe_nb.history.log import RunHistory
from tensafe_nb.protocol.results import ClientStatus, RunStatus, TrainingClientInfo
from tensafe_nb.runs.record import RunRecord
from tensafe_nb.runs.run import TrainingRun
from tensafe_nb.widgets.feed.annotations import KINDS, Landmarks
from tensafe_nb.widgets.feed.flusher import VIEW, Member, View
from tensafe_nb.widgets.feed.recording import RecordedRun, Recording

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
    def watch(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        """Call `subscriber(event)` on every event to come, also on those after the client itself was freed."""


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
class RunView:
    """What a panel knows of a run: enough to show it when run and client are long gone."""

    run_id: str
    planned_steps: int | None = None
    steps_done: int = 0
    state: RunStatus = RunStatus.RUNNING
    curve: str = "loss"
    started_at: float | None = None
    ended_at: float | None = None
    reason: str | None = None
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=ETA_STEPS))

    def done(self) -> bool:
        """Whether it has ended."""
        return self.state.ended


class Remains:
    """What is left to show of a training client that was freed: it can be looked at, and not steered."""

    steerable = False
    step = 0

    def __init__(self, client: Watched) -> None:
        self.training_client_id, self.config, self.history = (
            client.training_client_id, client.config, client.history
        )  # fmt: skip
        self.marks = client.marks
        self.info = client.refresh()
        self.runs: tuple[Any, ...] = ()

    def refresh(self) -> TrainingClientInfo:
        return self.info

    def watch(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        raise ValidationError(f"{self.training_client_id} is closed: nothing comes any more.")


class Feed:
    """Listens to one training client and wakes the members that show it.

    Panels stay for as long as their page may ask for them. So a feed refers to its client weakly, and keeps what is to
    be shown of it afterwards.

    Args:
        client: Whom to listen to.
        view: Who flushes the members.
        clock: The time by which its events are stamped, in Unix seconds; of a recording, that of its latest event.
    """

    def __init__(self, client: Watched, view: View = VIEW, clock: Callable[[], float] = time.time) -> None:
        self.view, self._clock = view, clock
        self._client: Callable[[], Watched | None] = (
            weakref.ref(client) if client.steerable else lambda: client
        )
        self._remains = Remains(client)
        self.panel: Any = None  # the one that shows all of it
        self.children: list[
            Any
        ] = []  # training clients that a button of its panel made; they last as long as this one
        self._members: list[Member] = []
        self._views: dict[str, RunView] = {}
        self._operation: OperationStarted | None = None
        self._closed = client.refresh().status == ClientStatus.TERMINATED
        self.measured_at = 0.0  # Unix seconds of the latest metrics
        self.landmarks = Landmarks()
        self._noting = threading.Lock()
        self._early: list[Event] | None = []  # what happens while the past is read
        client.watch(self._on_event)
        for run in client.runs:
            view_of = self._view_of(run.run_id)
            view_of.reason = _reason_of(run)
        self._catch_up(client.history)

    @property
    def client(self) -> Watched:
        """The training client; what is left of it, once it was freed."""
        client = self._client()
        return self._remains if client is None else client

    @property
    def is_freed(self) -> bool:
        """Whether the client is gone, and what is left of it is shown."""
        return self._client() is None

    def _catch_up(self, history: RunHistory) -> None:
        """Read what was left along the curves before anybody watched."""
        known = history.last_seq
        for event in history.events(kinds=KINDS):
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
    def latest(self) -> Any:
        """The run started last: the run itself, or what is known of it once its client was freed."""
        runs = self.client.runs
        return runs[-1] if runs else None

    def run(self, run_id: str | None) -> Any:
        """Return a run of the client, or what is known of it."""
        return next((run for run in self.client.runs if run.run_id == run_id), self._views.get(run_id or ""))

    @property
    def over(self) -> bool:
        """Whether nothing can come any more: client closed, runs ended."""
        return self._closed and all(run.state.ended for run in self.client.runs)

    @property
    def curve(self) -> str:
        """The metric to watch: the run's own; of a client without a run, the reward if there is one, else the loss."""
        if self.latest is not None:
            return str(self.latest.curve)
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

    def facts(self, run: Any = None) -> Facts:
        """Return what is known now, of the run given or of the latest."""
        info = self.client.refresh()
        run = run or self.latest
        operation = self._operation
        record = RunView("") if run is None else self._views.get(run.run_id, RunView(run.run_id))
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
            reason=info.reason if run is None else record.reason or info.reason,
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
            case RunStep(run_id=run_id, done=done, duration=duration):
                view = self._view_of(run_id)
                view.steps_done = done
                view.durations.append(duration)
            case RunState(run_id=run_id, state=state, reason=reason):
                view = self._view_of(run_id)
                view.state, view.reason = RunStatus(state), reason
                if event.done is not None:
                    view.steps_done = event.done
                if view.state.ended:
                    view.ended_at = event.time
                elif view.started_at is None and state == RunStatus.RUNNING and not view.durations:
                    view.started_at = event.time
            case StatusChanged(status=ClientStatus.TERMINATED, reason=reason):
                self._closed = True
                self._operation = None
                client = self._client()
                info = self._remains.info if client is None else client.refresh()
                self._remains.info = replace(
                    info, status=ClientStatus.TERMINATED, queue_depth=0, reason=reason or info.reason
                )

    def _view_of(self, run_id: str) -> RunView:
        """Return what is known of a run; at its first sign, take from the run itself what events do not tell."""
        if run_id not in self._views:
            view = self._views[run_id] = RunView(run_id)
            self._remains.runs = tuple(self._views.values())
            run = next((run for run in self.client.runs if run.run_id == run_id), None)
            if run is not None:
                view.planned_steps, view.curve = run.planned_steps, run.curve
                view.steps_done, view.state = run.steps_done, run.state
        return self._views[run_id]


Source = TrainingRun | RunRecord | RecordedRun | Watched | Feed
_recorded: "weakref.WeakValueDictionary[RunRecord, Feed]" = weakref.WeakValueDictionary()


def feed_of(source: Source) -> Feed:
    """Return the one feed of a training client, of a run's client, or of a recorded run."""
    if isinstance(source, Feed):
        return source
    subject = _subject(source)
    feed = _known(subject)
    if feed is not None:
        return feed
    if isinstance(subject, RunRecord):
        recording = Recording(subject, "RECORDED")
        feed = _recorded[subject] = Feed(recording, clock=recording.now)
        recording.tell_all()
        return feed
    feed = Feed(subject, clock=subject.now) if isinstance(subject, Recording) else Feed(subject)
    vars(subject)["_feed"] = feed  # it lasts as long as what it is the feed of
    return feed


def settle(source: Source, timeout: float) -> bool:
    """Wait until everything that shows a client has shown its end; True at once where nothing shows it."""
    feed = source if isinstance(source, Feed) else _known(_subject(source))
    return feed is None or feed.settle(timeout)


def _known(subject: Watched | RunRecord) -> Feed | None:
    return _recorded.get(subject) if isinstance(subject, RunRecord) else vars(subject).get("_feed")


def _subject(source: TrainingRun | RunRecord | RecordedRun | Watched) -> Watched | RunRecord:
    return cast(Watched, source.client) if isinstance(source, TrainingRun | RecordedRun) else source


def _elapsed(record: RunView, run: Any, now: float) -> float | None:
    started_at = record.started_at or (None if run is None else run.started_at)
    return None if started_at is None else (record.ended_at or now) - started_at


def _eta(run: Any, record: RunView) -> float | None:
    if run.planned_steps is None or run.steps_done <= ETA_AFTER or run.state is not RunStatus.RUNNING:
        return None
    return median(record.durations) * (run.planned_steps - run.steps_done) if record.durations else None


def _reason_of(run: Any) -> str | None:
    """Return why a run did not go as planned whose end was not witnessed."""
    if not isinstance(run, TrainingRun) or not run.done():
        return None
    try:
        return getattr(run.result(0), "reason", None)
    except TGTinkerError as error:
        return str(error)
