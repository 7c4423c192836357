"""The events of a training client: its core numbers them, its log keeps them, and whoever watches is told."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Self

import numpy as np

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.codec import tagged
from tensafe_nb.protocol.results import ClientStatus, RunStatus


def check_status(event: str, status: object, known: type[StrEnum]) -> None:
    """Refuse, before it is written, what no reader of the log would know."""
    if status not in list(known):
        raise ValidationError(f"{event}: {as_given(status)} is none of {', '.join(known)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events; the bus fills in `seq` (1, 2, 3 … per training client) and `time` (Unix seconds)."""

    seq: int = 0
    time: float = 0.0

    def numbered(self, seq: int, time: float) -> Self:
        """Fill in number and time, which an event has once: one that was told before stays as it is, and is copied."""
        if self.time:
            return replace(self, seq=seq, time=time)
        object.__setattr__(self, "seq", seq)
        object.__setattr__(self, "time", time)
        return self


@tagged("operation_queued")
@dataclass(frozen=True, slots=True, kw_only=True)
class OperationQueued(Event):
    future_id: str
    operation: str


@tagged("operation_started")
@dataclass(frozen=True, slots=True, kw_only=True)
class OperationStarted(Event):
    future_id: str
    operation: str


@tagged("progress")
@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(Event):
    """(done, total) micro-batches or tokens of a running operation; not persisted."""

    future_id: str
    done: int
    total: int


@tagged("operation_finished")
@dataclass(frozen=True, slots=True, kw_only=True)
class OperationFinished(Event):
    future_id: str
    operation: str
    duration: float


@tagged("operation_failed")
@dataclass(frozen=True, slots=True, kw_only=True)
class OperationFailed(Event):
    future_id: str
    operation: str
    code: str
    message: str


@tagged("operation_cancelled")
@dataclass(frozen=True, slots=True, kw_only=True)
class OperationCancelled(Event):
    future_id: str
    operation: str


@tagged("status_changed")
@dataclass(frozen=True, slots=True, kw_only=True)
class StatusChanged(Event):
    status: str
    reason: str | None = None

    def __post_init__(self) -> None:
        check_status("StatusChanged", self.status, ClientStatus)


@tagged("client_created")
@dataclass(frozen=True, slots=True, kw_only=True)
class ClientCreated(Event):
    """First event of a log: what this training client is (`config` as plain data)."""

    training_client_id: str
    config: Mapping[str, Any]


@tagged("metrics")
@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics(Event):
    """Values measured at an optimiser step."""

    step: int
    values: Mapping[str, float]
    run_id: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.step, int | np.integer):
            raise ValidationError(f"Metrics: the step is {as_given(self.step)}; it must be a whole number.")
        for name, value in self.values.items():
            if not isinstance(value, int | float | np.number):
                raise ValidationError(
                    f"Metrics: the value of {as_given(name)} is {as_given(value)}; a metric is a number."
                )


@tagged("run_state")
@dataclass(frozen=True, slots=True, kw_only=True)
class RunState(Event):
    """A run started, paused, resumed or ended.

    Attributes:
        run_id: The run.
        state: Which of RunStatus it entered.
        step: The client's optimiser step at that moment.
        planned_steps: How many steps of its own it is to have done at its end.
        reason: Why it came to that, where it is not as planned.
        done: Where it stands in its plan, in steps of its own; None in logs of version 0.1.
        taken: Optimiser steps it has taken, those that a rollback gave up among them; None in logs of version 0.1.
        curve: The metric to watch; None in logs of version 0.1.
        driver: Names, at random, what drives the run: of two kernels that start one at once, the log lists one first.
    """

    run_id: str
    state: str
    step: int
    planned_steps: int | None = None
    reason: str | None = None
    done: int | None = None
    taken: int | None = None
    curve: str | None = None
    driver: str | None = None

    def __post_init__(self) -> None:
        check_status("RunState", self.state, RunStatus)


@tagged("run_described")
@dataclass(frozen=True, slots=True, kw_only=True)
class RunDescribed(Event):
    """What a run is called and what its user says of it, in place of what was said before.

    Attributes:
        run_id: The run.
        name: One line; None has none.
        tags: Words to find it by.
        notes: A text.
    """

    run_id: str
    name: str | None = None
    tags: tuple[str, ...] = ()
    notes: str = ""


@tagged("run_configured")
@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfigured(Event):
    """What a run was started with, beside the configuration of its training client.

    Attributes:
        run_id: The run.
        config: The arguments of the call (`run`), reward and algorithm where there are any, `versions` of packages.
    """

    run_id: str
    config: Mapping[str, Any]


@tagged("run_step")
@dataclass(frozen=True, slots=True, kw_only=True)
class RunStep(Event):
    """A run finished its step number `done` (1, 2, 3 …), `duration` seconds after the one before."""

    run_id: str
    done: int
    duration: float


@tagged("checkpoint_saved")
@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved(Event):
    """A state was sealed as an artifact."""

    artifact_id: str
    step: int
    size_bytes: int
    content_hash: str
    name: str | None = None
    run_id: str | None = None


@tagged("state_loaded")
@dataclass(frozen=True, slots=True, kw_only=True)
class StateLoaded(Event):
    """The state of an artifact took the place of the client's own: its step is `step` from now on."""

    artifact_id: str
    step: int


@tagged("artifact_deleted")
@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactDeleted(Event):
    """A checkpoint of this client was deleted."""

    artifact_id: str


@tagged("forked")
@dataclass(frozen=True, slots=True, kw_only=True)
class Forked(Event):
    """The client `child` has started from a state of the client `parent`, which was at `step`; both are told."""

    parent: str
    artifact_id: str
    child: str
    step: int


@tagged("rollouts")
@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts(Event):
    """A step's rollouts were scored, or the answers to the held-out prompts.

    Attributes:
        run_id: The run.
        step: Its step.
        rollouts: How many there are.
        path: The file of their texts, in the folder `rollouts` beside the log; version 0.1 wrote where on its machine
            that was. `RunHistory.rollouts_file` finds either.
        held_out: Whether they answer the held-out prompts: of each the greedy answer first, then the sampled ones.
    """

    run_id: str
    step: int
    rollouts: int
    path: str
    held_out: bool = False


@tagged("mock_took_part")
@dataclass(frozen=True, slots=True, kw_only=True)
class MockTookPart(Event):
    """Weights were changed by what a `Mock…` object made up: every picture of this training says so."""


@tagged("alarm")
@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm(Event):
    """Something about a run needs a look: what, how bad ("amber" or "red"), why, and what helps."""

    run_id: str
    step: int
    name: str
    level: str
    message: str
    remedy: str
    rollouts: tuple[int, ...] = ()


@tagged("privacy_spent")
@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacySpent(Event):
    """How the privacy account stands after a step, a refused step, or an event that made its guarantee void.

    Attributes:
        step: The client's step.
        epsilon_spent: By this step; 0 for a step that was refused.
        total_epsilon: Of the account; infinite where there is no guarantee, and then for good.
        delta: At which epsilon is stated.
        target_epsilon: The budget; None has none.
        accountant: "rdp", "prv" or "gaussian".
        adjacency: What two neighbouring data sets differ by, in words.
        projected_step: The last step that the budget will pay for, at this rate; None if it has no end.
        refused: Whether this step was refused: the next would cost more than the budget.
        void: Why there is no guarantee; None while there is one.
    """

    step: int
    epsilon_spent: float
    total_epsilon: float
    delta: float
    target_epsilon: float | None
    accountant: str
    adjacency: str
    projected_step: int | None = None
    refused: bool = False
    void: str | None = None


class ReplicaChange(StrEnum):
    """What can happen to the replicas of a training client on a cluster."""

    WAITING = "WAITING"  # for a machine with room for it
    STARTED = "STARTED"  # all of them are there, for the first time
    LOST = "LOST"
    JOINED = "JOINED"  # in place of one that was lost
    MISSING = "MISSING"  # no other can be started: the rest goes on


@tagged("replicas_changed")
@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicasChanged(Event):
    """A training client on a cluster has lost a replica, or has it again.

    Attributes:
        change: Which of ReplicaChange.
        replicas: How many there are now.
        wanted: How many there should be.
        name: Of the replica, and where it is; empty where all are meant.
        reason: Why, for people.
    """

    change: str
    replicas: int
    wanted: int
    name: str = ""
    reason: str | None = None

    def __post_init__(self) -> None:
        check_status("ReplicasChanged", self.change, ReplicaChange)


class LineState(StrEnum):
    """The states of a line to a server."""

    OPEN = "OPEN"
    RECONNECTING = "RECONNECTING"  # it broke off, and this end tries again
    LOST = "LOST"  # nothing is known any more of what it led to


@dataclass(frozen=True, slots=True, kw_only=True)
class LineChanged(Event):
    """This end has lost its line to a training client of a server, or has it again.

    It is told at this end alone: it is not recorded, does not cross the line, and bears the number of the latest event
    that is known here.

    Attributes:
        state: Which of LineState it entered.
        reason: Why, for people; None where it is open.
    """

    state: str
    reason: str | None = None

    def __post_init__(self) -> None:
        check_status("LineChanged", self.state, LineState)


UNRECORDED = (Progress, LineChanged)
REPORTED = (
    Metrics,
    RunState,
    RunStep,
    RunDescribed,
    RunConfigured,
    Rollouts,
    Alarm,
    MockTookPart,
)  # what runs and producers of rollouts tell


def check_reported(event: object) -> None:
    """Refuse to take from a client what its core alone can know.

    Raises:
        ValidationError: Another event than those of `REPORTED`, or Metrics that say of no run to have measured them.
    """
    if not isinstance(event, REPORTED):
        raise ValidationError(
            f"publish() takes what a run tells ({', '.join(kind.__name__ for kind in REPORTED)}), not "
            f"{type(event).__name__}: that is the core's to tell."
        )
    if isinstance(event, Metrics) and event.run_id is None:
        raise ValidationError(
            "publish(Metrics(…)) needs run_id=…, the run that measured them, or a name of your own: without one they "
            "would pass for the core's measurements."
        )
