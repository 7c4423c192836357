"""The state of a training client: what its events add up to, wherever they are read.

This is the one reducer. A live client, a log read back, a replay and a remote client that take in the same events reach
the same state; panel, records, retention and pictures read it and ask the core nothing.
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from statistics import median
from typing import TypeAlias

from tensafe_nb.events import (
    UNRECORDED,
    Alarm,
    ArtifactDeleted,
    CheckpointSaved,
    ClientCreated,
    Event,
    Forked,
    LineChanged,
    LineState,
    Metrics,
    MockTookPart,
    OperationCancelled,
    OperationFailed,
    OperationFinished,
    OperationQueued,
    OperationStarted,
    PrivacySpent,
    Progress,
    ReplicasChanged,
    Rollouts,
    RunConfigured,
    RunDescribed,
    RunState,
    RunStep,
    StateLoaded,
    StatusChanged,
)
from tensafe_nb.protocol.results import ClientStatus, RunStatus

LATEST_STEPS = 20  # of a run, whose durations are kept
LATEST_ALARMS = 50
ETA_AFTER = 5  # steps
REWARD_VERSION = "reward_version"  # the curve that numbers the reward functions of a run
OperationEvent: TypeAlias = (
    OperationQueued | OperationStarted | Progress | OperationFinished | OperationFailed | OperationCancelled
)


@dataclass(slots=True)
class OperationQueue:
    """The operations of a client that wait or run; it is empty once the client is closed.

    Attributes:
        submitted: Their verbs, by future id, in the order in which they came.
        running: Those that run, by future id, in the order in which they began: one, or several samples.
        progress: How far the first of them is, (done, total). Not recorded: a log that is read back does not know it.
    """

    submitted: dict[str, str] = field(default_factory=dict)
    running: dict[str, OperationStarted] = field(default_factory=dict)
    progress: tuple[int, int] | None = field(default=None, compare=False)

    @property
    def depth(self) -> int:
        """The number of those that wait or run."""
        return len(self.submitted)

    @property
    def first(self) -> OperationStarted | None:
        """The one that has run longest."""
        return next(iter(self.running.values()), None)

    def apply(self, event: OperationEvent) -> None:
        is_first = next(iter(self.running), None) == event.future_id
        match event:
            case Progress():
                self.progress = (event.done, event.total) if is_first else self.progress
            case OperationQueued():
                self.submitted[event.future_id] = event.operation
            case OperationStarted():
                self.running[event.future_id] = event
            case _:  # it has ended
                self.submitted.pop(event.future_id, None)
                self.running.pop(event.future_id, None)
                self.progress = None if is_first else self.progress


@dataclass(slots=True)
class RunSoFar:
    """A run as far as it is told.

    Attributes:
        run_id: `<training_client_id>/<n>`.
        planned_steps: Steps of its own that it is to do; None has no end.
        curve: The metric to watch; None in logs of version 0.1: see `rewarded`.
        started_at: Unix seconds.
        ended_at: Unix seconds; None while it is under way.
        state: As it was last told.
        reason: Why it came to that, where it is not as planned.
        steps_done: Where it stands in its plan.
        step: The client's optimiser step; that of its end, once it has ended.
        checkpoint: The artifact it saved last.
        rewarded: Whether rewards were measured in it.
        described: What it is called and what is said of it.
        durations: Seconds of its latest steps.
        prompts: What is to be known of how its prompts were chosen, if anything is.
    """

    run_id: str
    planned_steps: int | None = None
    curve: str | None = None
    started_at: float = 0.0
    ended_at: float | None = None
    state: RunStatus = RunStatus.RUNNING
    reason: str | None = None
    steps_done: int = 0
    step: int = 0
    checkpoint: str | None = None
    rewarded: bool = False
    described: RunDescribed | None = None
    durations: "deque[float]" = field(default_factory=lambda: deque(maxlen=LATEST_STEPS))
    prompts: str = ""
    done_at: int = 0  # the client's step when `steps_done` was told
    begun_at: int = 0  # the client's step at the run's first event
    counted_from: int = 0  # the client's step where it began, or where it went back to
    given_up: int = 0  # optimiser steps before the last time it went back
    told_taken: int | None = None
    tells_done: bool = False  # logs of version 0.1 tell steps one by one, not where a run stands

    @classmethod
    def begun(cls, event: RunState) -> "RunSoFar":
        """Return the run whose first event it is."""
        at = event.step
        return cls(
            event.run_id,
            event.planned_steps,
            event.curve,
            event.time,
            done_at=at,
            begun_at=at,
            counted_from=at,
        )

    @property
    def steps_taken(self) -> int:
        """Optimiser steps, those that a rollback gave up among them."""
        if self.state.ended and self.told_taken is not None:
            return self.told_taken
        return self.given_up + self.step - self.counted_from

    @property
    def steps_done_if_killed(self) -> int:
        """Steps of its plan if its process died: without rewards each optimiser step was one, told or not."""
        return self.steps_done if self.rewarded else self.steps_done + self.step - self.done_at

    def elapsed(self, now: float) -> float | None:
        """Return the seconds since it began, or that it took; None before it has begun."""
        return (self.ended_at or now) - self.started_at if self.started_at else None

    @property
    def eta(self) -> float | None:
        """Seconds it will still take, judged by its last steps; None where that cannot be judged."""
        if self.planned_steps is None or self.steps_done <= ETA_AFTER or self.state is not RunStatus.RUNNING:
            return None
        latest = list(self.durations)
        return median(latest) * (self.planned_steps - self.steps_done) if latest else None

    def turned(self, event: RunState) -> None:
        """It entered a state. From an end nothing leads back, whoever says so."""
        if self.state.ended:
            return
        self.state, self.reason, self.step = RunStatus(event.state), event.reason, event.step
        self.told_taken = event.taken
        self.ended_at = event.time if self.state.ended else None
        if event.done is not None:
            self.tells_done, self.steps_done, self.done_at = True, event.done, event.step

    def stepped(self, event: RunStep, step: int) -> None:
        """It finished a step of its own; the client is at `step`."""
        self.steps_done, self.done_at = event.done, step
        self.durations.append(event.duration)

    def went_back(self, before: int, step: int) -> None:
        """Its client was at `before`, and took the state of `step`."""
        self.given_up, self.counted_from = self.given_up + before - self.counted_from, step
        self.done_at = step
        if not self.tells_done:
            self.steps_done = max(step - self.begun_at, 0)


@dataclass(slots=True)
class ClientState:
    """The state of a training client: `apply` takes in its events, one after the other.

    Attributes:
        training_client_id: Whose state it is, once its log has said so.
        seq: Number of the latest recorded event.
        counts: How many events of each kind there were: tells whether anything is new.
        entered: The status it last entered for a while; see `status`.
        reason: Why it is in ERROR, or was.
        step: Optimiser steps taken.
        measured_at: When the latest metrics were measured, in Unix seconds.
        queue: Its operations.
        runs: By id, in the order in which they began.
        checkpoints: Those there are, by artifact id, oldest first.
        loaded: The state it took last.
        forks: From it, and the one it came from.
        alarms: The latest.
        privacy: The privacy account; None before it was told of.
        replicas: What last happened to its replicas; None where it is not on a cluster.
        replica_changes: How often what has happened to them.
        rollouts: By step: the latest of each.
        held_out: By step: the latest answers to the held-out prompts.
        rewards: (step, number) of each reward function, where it first scored.
        mocked: Whether a mock took part: then nothing here is a measurement.
        line: That the line to the server broke off, and when; None while it is open, or there is none. Not recorded, so
            a log that is read back does not know it.
    """

    training_client_id: str | None = None
    seq: int = 0
    counts: "Counter[type[Event]]" = field(default_factory=Counter)
    entered: ClientStatus = ClientStatus.INITIALIZING
    reason: str | None = None
    step: int = 0
    measured_at: float = 0.0
    queue: OperationQueue = field(default_factory=OperationQueue)
    runs: dict[str, RunSoFar] = field(default_factory=dict)
    checkpoints: dict[str, CheckpointSaved] = field(default_factory=dict)
    loaded: StateLoaded | None = None
    forks: list[Forked] = field(default_factory=list)
    alarms: "deque[Alarm]" = field(default_factory=lambda: deque(maxlen=LATEST_ALARMS))
    privacy: PrivacySpent | None = None
    replicas: ReplicasChanged | None = None
    replica_changes: "Counter[str]" = field(default_factory=Counter)
    rollouts: dict[int, Rollouts] = field(default_factory=dict)
    held_out: dict[int, Rollouts] = field(default_factory=dict)
    rewards: list[tuple[int, float]] = field(default_factory=list)
    mocked: bool = False
    line: LineChanged | None = field(default=None, compare=False)

    @property
    def status(self) -> ClientStatus:
        """READY and BUSY take turns without an event of their own: the queue tells."""
        busy = self.entered is ClientStatus.READY and self.queue.depth > 0
        return ClientStatus.BUSY if busy else self.entered

    @property
    def closed(self) -> bool:
        return self.entered is ClientStatus.TERMINATED

    @property
    def latest_run(self) -> RunSoFar | None:
        """The run that began last."""
        return next(reversed(self.runs.values()), None)

    def apply(self, event: Event) -> None:
        """Take in the next event. What is not recorded changes nothing but `queue.progress` and `line`."""
        if isinstance(event, OperationEvent):
            self.queue.apply(event)
            if not isinstance(event, UNRECORDED):
                self.count(event)
            return  # it changes nothing else, and three of them come with each operation
        if isinstance(event, LineChanged):
            self.line = None if event.state == LineState.OPEN else event
        if isinstance(event, UNRECORDED):
            return
        self.count(event)
        before, self.step = self.step, self.step_after(event)  # first: where a run stands is told by both
        self.follow_runs(event, before)
        match event:
            case ClientCreated():
                self.training_client_id = event.training_client_id
            case StatusChanged():
                self.entered, self.reason = ClientStatus(event.status), event.reason or self.reason
                self.queue = OperationQueue() if self.closed else self.queue
            case Metrics():
                self.measured_at = event.time
                number = event.values.get(REWARD_VERSION)
                if number is not None and (not self.rewards or self.rewards[-1][1] != number):
                    self.rewards.append((event.step, number))
            case CheckpointSaved():
                self.checkpoints[event.artifact_id] = event
            case ArtifactDeleted():
                self.checkpoints.pop(event.artifact_id, None)
            case StateLoaded():
                self.loaded = event
            case Forked():
                self.forks.append(event)
            case Alarm():
                self.alarms.append(event)
            case ReplicasChanged():
                self.replicas = event
                self.replica_changes[event.change] += 1
            case PrivacySpent():
                self.privacy = event  # what was spent stays spent: no rollback is an event of this kind
            case Rollouts():
                (self.held_out if event.held_out else self.rollouts)[event.step] = event
            case MockTookPart():
                self.mocked = True

    def count(self, event: Event) -> None:
        """Take note that there is one more."""
        self.seq = max(self.seq, event.seq)
        self.counts[type(event)] += 1

    def step_after(self, event: Event) -> int:
        """Return the client's optimiser step after an event; what loops measure is numbered by their own steps."""
        match event:
            case RunState(run_id=run_id) if run_id in self.runs and self.runs[run_id].state.ended:
                return self.step  # of somebody who has not heard of the end
            case StateLoaded(step=found) | RunState(step=found):
                return found
            case Metrics(step=found, run_id=None) | CheckpointSaved(step=found):
                return max(self.step, found)
        return self.step

    def follow_runs(self, event: Event, before: int) -> None:
        """Bring the runs up to an event, before which the client was at step `before`."""
        match event:
            case RunState():
                if event.run_id not in self.runs:
                    self.runs[event.run_id] = RunSoFar.begun(event)
                self.runs[event.run_id].turned(event)
            case RunDescribed(run_id=run_id) if run_id in self.runs:
                self.runs[run_id].described = event
            case RunConfigured(run_id=run_id, config={"trainer": {"prompt_bias": str(bias)}}) if (
                run_id in self.runs
            ):
                self.runs[run_id].prompts = bias
            case RunStep(run_id=run_id) if run_id in self.runs:
                self.runs[run_id].stepped(event, self.step)
            case CheckpointSaved(run_id=str(run_id)) if run_id in self.runs:
                self.runs[run_id].checkpoint = event.artifact_id
            case Metrics(values=values, run_id=run_id) if "reward" in values and self.runs:
                (self.runs.get(run_id or "") or next(reversed(self.runs.values()))).rewarded = True
        latest = self.latest_run
        if latest is not None and not latest.state.ended:
            if isinstance(event, StateLoaded):
                latest.went_back(before, self.step)
            latest.step = self.step  # once it has ended, the client goes on without it
