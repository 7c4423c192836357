"""The feed of a panel: it listens to one training client, reads its state, and wakes what shows it."""

import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from tensafe_nb.config import TrainingConfig
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.events import Event, Progress, ReplicaChange
from tensafe_nb.history.log import RunHistory
from tensafe_nb.history.state import ClientState, RunSoFar
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.runs.record import RunRecord
from tensafe_nb.runs.run import TrainingRun
from tensafe_nb.widgets.feed.annotations import Annotations
from tensafe_nb.widgets.feed.flusher import FLUSHER, Flusher, Member
from tensafe_nb.widgets.feed.recording import RecordedRun, Recording
from tensafe_nb.widgets.feed.rollouts import pieces


class Watched(Protocol):
    """A training client as far as it can be watched: its history, and what never changes."""

    @property
    def training_client_id(self) -> str: ...
    @property
    def config(self) -> TrainingConfig: ...
    @property
    def history(self) -> RunHistory: ...
    @property
    def marks(self) -> tuple[str, ...]:
        """Words that badge, picture and text carry, so that nobody takes it for something else: "REPLAY"."""

    @property
    def steerable(self) -> bool:
        """Whether buttons can reach it; where not, there are none."""

    def watch(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        """Call `subscriber(event)` on every event to come, also on those after the client itself was freed."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A training client, and one run of it, at one moment; None is unknown and shown as a dash.

    Attributes:
        client: Status of the client.
        state: State of the run; the client's status where there is no run.
        run_id: The run.
        name: What it is called.
        step: Steps the run has done; the client's step where there is no run.
        planned: Steps the run is to do.
        elapsed: Seconds since the run started, or that it took.
        eta: Seconds it will still take, judged by its last steps.
        queued: Operations waiting or running.
        operation: The one that runs.
        operation_seconds: For how long.
        reason: Why run or client failed.
        active: Whether more is to come by itself: worth a heartbeat.
        client_step: The client's own step where a run that has ended left it, and it has moved since; None where not.
        loaded: The artifact whose state it took after that run's end.
        line: "OPEN", "RECONNECTING" or "LOST": whether what is said here is still so is known only while it is open.
        line_reason: Why it is not.
        line_seconds: For how long it has not been.
        prompts: What is to be known of how the run's prompts were chosen.
        replicas: How many replicas compute it, of how many, their share, and what became of others, in words; None
            where it is not on a cluster, or closed.
    """

    client: str
    state: str
    run_id: str | None
    name: str | None
    step: int
    planned: int | None
    elapsed: float | None
    eta: float | None
    queued: int
    operation: str | None
    operation_seconds: float | None
    reason: str | None
    active: bool
    client_step: int | None
    loaded: str | None
    line: str
    line_reason: str | None
    line_seconds: float | None
    prompts: str
    replicas: str | None

    @classmethod
    def read(cls, state: ClientState, run: RunSoFar | None, now: float) -> "Standing":
        """Read it from a state, for one of its runs, at a moment in Unix seconds."""
        running, line = state.queue.first, state.line
        return cls(
            client=str(state.status),
            state=str(state.status if run is None else run.state),
            run_id=None if run is None else run.run_id,
            name=None if run is None or run.described is None else run.described.name,
            step=state.step if run is None else run.steps_done,
            planned=None if run is None else run.planned_steps,
            elapsed=None if run is None else run.elapsed(now),
            eta=None if run is None else run.eta,
            queued=state.queue.depth,
            operation=None if running is None else running.operation,
            operation_seconds=None if running is None else now - running.time,
            reason=state.reason if run is None else run.reason or state.reason,
            active=not state.closed and (state.queue.depth > 0 or (run is not None and not run.state.ended)),
            client_step=state.step if left_behind(state, run) else None,
            loaded=loaded_since(state, run),
            line="OPEN" if line is None else str(line.state),
            line_reason=None if line is None else line.reason,
            line_seconds=None if line is None else now - line.time,
            prompts="" if run is None else run.prompts,
            replicas=replicas_of(state),
        )

    @property
    def run_number(self) -> str | None:
        return self.run_id and self.run_id.rpartition("/")[2]

    @property
    def run_ended(self) -> bool:
        return self.run_id is not None and RunStatus(self.state).ended


def replicas_of(state: ClientState) -> str | None:
    """Say how many replicas there are, what share of a batch each computes, and how many were lost and have joined."""
    if state.replicas is None or state.closed:
        return None
    now, changes = state.replicas.replicas, state.replica_changes
    share = f", each computes about 1/{now} of a batch" if now > 1 else ""
    lost, joined = changes[ReplicaChange.LOST], changes[ReplicaChange.JOINED]
    befell = f" · {lost} lost, {joined} joined" if lost or joined else ""
    return f"{now} of {state.replicas.wanted} replicas{share}{befell}"


def left_behind(state: ClientState, run: RunSoFar | None) -> bool:
    """Whether a client has gone on, or back, after the end of its latest run."""
    if run is None or not run.state.ended or run is not state.latest_run:
        return False
    return state.step != run.step


def loaded_since(state: ClientState, run: RunSoFar | None) -> str | None:
    """Return the artifact whose state a client took after the end of its latest run."""
    loaded = state.loaded
    if run is None or run.ended_at is None or loaded is None or not left_behind(state, run):
        return None
    return loaded.artifact_id if loaded.time >= run.ended_at else None


class Remains:
    """The remains of a training client that was freed: it can be looked at, and not steered."""

    steerable = False

    def __init__(self, client: Watched) -> None:
        self.training_client_id, self.config, self.history = (
            client.training_client_id, client.config, client.history
        )  # fmt: skip
        self.marks = client.marks

    def watch(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        raise ValidationError(f"{self.training_client_id} is closed: nothing comes any more.")


class Feed:
    """Listens to one training client and wakes the members that show it. What they show they read from its state.

    Panels stay for as long as their page may ask for them: so a feed refers to its client weakly, and keeps its
    history.

    Args:
        client: Whom to listen to.
        flusher: Who flushes the members.
        clock: The time by which its events are stamped, in Unix seconds; of a recording, that of its latest event.

    Attributes:
        client_id: Of the client.
        history: Its curves and events.
        state: How it stands.
        annotations: What is shown along its curves.
        panel: The one that shows all of it.
        children: Training clients that a button of its panel made; they last as long as this one.
    """

    def __init__(
        self, client: Watched, flusher: Flusher = FLUSHER, clock: Callable[[], float] = time.time
    ) -> None:
        self.flusher, self._clock = flusher, clock
        self._client: Callable[[], Watched | None] = (
            weakref.ref(client) if client.steerable else lambda: client
        )
        self._remains = Remains(client)
        self.client_id, self.history, self.state = (
            client.training_client_id, client.history, client.history.state
        )  # fmt: skip
        self.annotations = Annotations(self.state)
        self.panel: Any = None
        self.children: list[Any] = []
        self._members: list[Member] = []
        self._expected: RunSoFar | None = None
        self._learning = threading.Lock()
        client.watch(self.hear)

    @property
    def client(self) -> Watched:
        """The training client; what is left of it, once it was freed."""
        client = self._client()
        return self._remains if client is None else client

    @property
    def is_freed(self) -> bool:
        """Whether the client is gone, and what is left of it is shown."""
        return self._client() is None

    def watch(self, member: Member) -> None:
        """Have a member flushed after every event from now on."""
        self._members.append(member)
        self.flusher.wake(member)

    def forget(self, member: Member) -> None:
        """Flush a member no more, and keep it no longer."""
        self._members = [other for other in self._members if other is not member]
        if self.panel is member:
            self.panel = None

    def settle(self, timeout: float) -> bool:
        """Wait until everything that shows this client has shown its end; False if it has not in time."""
        return self.flusher.settle(self._members, timeout)

    # what there is to read

    def expect(self, run: TrainingRun | RecordedRun) -> None:
        """Take note of a run whose first event is still to come, so that it can be shown already."""
        self._expected = RunSoFar(run.run_id, run.planned_steps, run.curve, run.started_at)

    @property
    def latest(self) -> RunSoFar | None:
        """The run started last, or about to start."""
        expected = self._expected
        begun = expected is None or expected.run_id in self.state.runs
        return self.state.latest_run if begun else expected

    def run(self, run_id: str | None) -> RunSoFar | None:
        """Return what is known of a run of the client."""
        expected = self._expected if self._expected and self._expected.run_id == run_id else None
        return self.state.runs.get(run_id or "", expected)

    @property
    def over(self) -> bool:
        """Whether nothing can come any more: client closed, runs ended."""
        return self.state.closed and (self.latest is None or self.latest.state.ended)

    @property
    def curve(self) -> str:
        """The metric to watch: the run's own; of a client without a run, the reward if there is one, else the loss."""
        if self.latest is not None and self.latest.curve is not None:
            return self.latest.curve
        return "reward" if "reward" in self.history else "loss"

    @property
    def marks(self) -> tuple[str, ...]:
        """Words for what it is not: a recording is no live run, what a mock made up is no measurement."""
        return (*self.client.marks, *(("MOCK",) if self.state.mocked else ()))

    @property
    def is_private(self) -> bool:
        """Whether it trains with differential privacy: then curves and texts are for its operator only."""
        return self.client.config.dp_config is not None

    @property
    def description(self) -> str:
        """The model and what is trained of it, in a few words."""
        config = self.client.config
        adapter = f"LoRA r{config.lora_config.rank}" if config.lora_config else "all weights"
        return f"{config.model_ref} · {adapter}"

    def standing(self, run: Any = None) -> Standing:
        """Return how things stand now with the run given, or with the latest."""
        found = self.latest if run is None else self.run(run.run_id)
        return Standing.read(self.state, found, self._clock())

    @property
    def silence(self) -> float | None:
        """Seconds since the run under way measured anything; None while that is no wonder: paused, or work waits."""
        latest = self.latest
        if latest is None or latest.state in (RunStatus.PAUSED, RunStatus.PAUSING) or self.state.queue.depth:
            return None
        return max(self._clock() - max(latest.started_at, self.state.measured_at), 0.0)

    def decode(self) -> Callable[[Sequence[int]], list[str]] | None:
        """Return what turns token ids into texts; None where there is no tokenizer."""
        tokenizer = getattr(self.client, "tokenizer", None) if self.client.steerable else None
        return None if tokenizer is None else lambda ids: pieces(tokenizer.decode, ids)

    # what panels learn besides events

    def count_saving(self, change: int) -> None:
        """A checkpoint that a button asked for is on its way, or there."""
        with self._learning:
            self.annotations.saving += change
            self.annotations.learned += 1
        self.wake()

    def learn(self, details: Mapping[str, Mapping[str, Any]]) -> None:
        """Take in what was looked up of checkpoints."""
        with self._learning:
            self.annotations.details.update(details)
            self.annotations.learned += 1
        self.wake()

    def wake(self) -> None:
        """Have everything that shows this client flushed."""
        for member in self._members:
            self.flusher.wake(member)

    def hear(self, event: Event) -> None:
        """Take note that something happened: the state knows it already. Progress of an operation is not shown."""
        if not isinstance(event, Progress):
            self.wake()


Source = TrainingRun | RunRecord | RecordedRun | Watched | Feed
_recorded: "weakref.WeakValueDictionary[RunRecord, Feed]" = weakref.WeakValueDictionary()


def feed_of(source: Source) -> Feed:
    """Return the one feed of a training client, of a run's client, or of a recorded run.

    Raises:
        ValidationError: It is none of these.
    """
    if isinstance(source, Feed):
        return source
    subject = _subject(source)
    if not isinstance(subject, RunRecord) and not hasattr(subject, "training_client_id"):
        raise ValidationError(
            f"A widget shows training clients, runs, and records of runs, not {as_given(source)}. "
            f"Of a run's id, load_run(run_id) makes a record."
        )
    feed = _known(subject)
    if feed is not None:
        return feed
    if isinstance(subject, RunRecord):
        recording = Recording(subject, "RECORDED")
        feed = _recorded[subject] = _feed_of_recording(recording)
        recording.tell_all()
        return feed
    feed = _feed_of_recording(subject) if isinstance(subject, Recording) else Feed(subject)
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


def _feed_of_recording(recording: Recording) -> Feed:
    feed = Feed(recording, clock=recording.now)
    feed.expect(recording.run)
    return feed
