"""What happened, in order: events, the bus that numbers them, and the log that outlives the process."""

import inspect
import json
import logging
import os
import sys
import threading
import time
import weakref
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import numpy as np

from tensafe_nb.checks import checked
from tensafe_nb.display import Facts, as_given, shown
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.batch import Array
from tensafe_nb.protocol.codec import decode, encode, tagged, tags_of

if sys.platform != "win32":  # there, a run of another process counts as interrupted
    import fcntl


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events; the bus fills in `seq` (1, 2, 3 … per training client) and `time` (Unix seconds)."""

    seq: int = 0
    time: float = 0.0


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
    """

    run_id: str
    state: str
    step: int
    planned_steps: int | None = None
    reason: str | None = None
    done: int | None = None
    taken: int | None = None


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
    """A step's rollouts were scored; their texts lie in `path`."""

    run_id: str
    step: int
    rollouts: int
    path: str


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


Subscriber: TypeAlias = Callable[[Event], None]
TIMED = "tokens"  # the curve whose points keep their moments as well, so that a rate can be told


@shown
class RunHistory:
    """The history of a training client: every metric as a curve, every event on disk.

    Curves are held as columns; events are read from the log when asked for, so memory does not grow with them.

    Args:
        path: The log, one event per line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._steps: dict[str, array[int]] = {}
        self._values: dict[str, array[float]] = {}
        self._measured: dict[str, int] = {}
        self._clock, self._began = (array("q"), array("d")), 0.0
        self._timed = array("d")
        self.last_seq = 0

    @classmethod
    def load(cls, path: Path) -> "RunHistory":
        """Read a log that another process wrote, or this one; a torn last line is ignored."""
        history = cls(path)
        for event in history.events():
            history.add(event)
        return history

    def __getitem__(self, name: str) -> Array:
        """Values of a metric, in order of time."""
        return self.series(name)[1]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {len(self._values[name])}" for name in self.names)
        return f"<RunHistory {self.last_seq} events; {sizes or 'no metrics yet'}>"

    def _facts(self) -> Facts:
        curves = {
            name: f"{len(values)} values, {values[0]:.4g} → {values[-1]:.4g}"
            for name, values in sorted(self._values.items())
        }
        return {"events": self.last_seq} | curves

    def _ipython_key_completions_(self) -> list[str]:
        return self.names

    @property
    def names(self) -> list[str]:
        """The metrics there are."""
        return sorted(self._values)

    @checked
    def series(self, name: str, start: int = 0) -> tuple[Array, Array]:
        """Return (steps, values) of a metric, from point number `start` on; empty when it was never measured."""
        return _columns(self._steps.get(name, array("q")), self._values.get(name, array("d")), start)

    def clock(self, start: int = 0) -> tuple[Array, Array]:
        """Return (steps, seconds since the first) of everything that was measured, from entry number `start` on."""
        return _columns(*self._clock, start)

    def moments(self, start: int = 0) -> Array:
        """Return when each point of the curve "tokens" was measured, in Unix seconds."""
        return np.array(self._timed[start:], dtype=np.float64)

    def last(self, after: int = 0) -> dict[str, float]:
        """Return the latest value of every metric measured since event number `after`."""
        return {name: self._values[name][-1] for name in self.names if self._measured[name] > after}

    def events(self, after: int = 0, kinds: Sequence[type[Event]] = ()) -> Iterator[Event]:
        """Iterate over the recorded events with a number above `after`: all, or those of some kinds, which is quick."""
        if not self.path.exists():
            return
        wanted = [f'"$": "{tag}"' for kind in kinds for tag in tags_of(kind)]
        with self.path.open(encoding="utf-8") as lines:
            for line in lines:
                if not line.endswith("\n"):
                    return
                if wanted and not any(name in line for name in wanted):
                    continue
                event = decode(json.loads(line))
                if event.seq > after:
                    yield event

    @property
    def alarms(self) -> "list[Alarm]":
        """The alarms so far, oldest first: what went wrong, why, and what helps."""
        return [event for event in self.events(kinds=(Alarm,)) if isinstance(event, Alarm)]

    def add(self, event: Event) -> None:
        self.last_seq = event.seq
        if isinstance(event, Metrics):
            self._clock[0].append(event.step)
            self._began = self._began or event.time
            self._clock[1].append(event.time - self._began)
            if TIMED in event.values:
                self._timed.append(event.time)
            for name, value in event.values.items():
                self._steps.setdefault(name, array("q")).append(event.step)
                self._values.setdefault(name, array("d")).append(value)
                self._measured[name] = event.seq


def _columns(steps: "array[int]", values: "array[float]", start: int) -> tuple[Array, Array]:
    """Copy the columns, which grow on another thread: as far as both reach."""
    count = min(len(values), len(steps))
    return (
        np.array(steps[start:count], dtype=np.int64),
        np.array(values[start:count], dtype=np.float64),
    )


def is_being_written(path: Path) -> bool:
    """Whether some process, this one included, holds the log open: its end is still to come."""
    if sys.platform == "win32":
        return False
    with path.open("r") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _hold(log: TextIO) -> None:
    if sys.platform != "win32":
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)


class EventBus:
    """Numbers, records and hands out the events of one training client.

    Args:
        path: The log; created with its folder, readable by its owner only.
    """

    def __init__(self, path: Path) -> None:
        self.history = RunHistory(path)
        self._seq = 0
        self._refused = False
        self._pid = os.getpid()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            opened = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        except OSError as error:
            raise ValidationError(
                f"The event log {path} cannot be written ({error.strerror}). "
                f"Set TENSAFE_HOME to a folder that can be."
            ) from error
        self._log: TextIO = os.fdopen(opened, "w", encoding="utf-8")
        _hold(self._log)
        self._lock = threading.RLock()
        self._subscribers: list[Subscriber] = []

    def publish(self, event: Event) -> Event:
        """Give an event its number and time, record it, and tell the subscribers."""
        with self._lock:
            self._seq += 1
            event = replace(event, seq=self._seq, time=time.time())
            if not isinstance(event, Progress) and not self._log.closed and os.getpid() == self._pid:
                self._write(json.dumps(encode(event), allow_nan=False) + "\n")
                self.history.add(event)
            for subscriber in tuple(self._subscribers):
                try:
                    subscriber(event)
                except (
                    Exception
                ):  # it would fail at every event to come, and be told of in whatever cell runs then
                    self._drop(subscriber)
                    logger.exception(
                        "The subscriber %s failed at %s and is told nothing more; the work goes on. Mend it, and "
                        "subscribe it again: tc.subscribe(…, after=%d) tells it what it missed.",
                        _name_of(subscriber),
                        type(event).__name__,
                        event.seq - 1,
                    )
        return event

    def _drop(self, subscriber: Subscriber) -> None:
        with self._lock, suppress(ValueError):
            self._subscribers.remove(subscriber)

    def _write(self, line: str) -> None:
        """Write a line. What a full disk refuses stays in the file's buffer and is tried again with the next one."""
        try:
            self._log.write(line)
            self._log.flush()
        except OSError as error:
            if not self._refused:
                logger.error(
                    "%s cannot be written (%s); it is tried again", self.history.path, error.strerror
                )
            self._refused = True
        else:
            self._refused = False

    def subscribe(self, subscriber: Subscriber, after: int | None = None) -> Callable[[], None]:
        """Call `subscriber(event)` for every event: recorded ones above `after` first, then live ones.

        A subscriber must be quick and must not wait for an operation. Without `after` only live events come. One that
        raises is reported once, and told no more.

        Returns:
            A function that ends the subscription.

        Raises:
            ValidationError: A subscriber that cannot be called, or is a coroutine function.
        """
        _check_subscriber(subscriber)
        with self._lock:
            if after is not None:
                for event in self.history.events(after):
                    subscriber(event)
            self._subscribers.append(subscriber)
        return partial(self._drop, subscriber)

    def sync(self) -> None:
        """Put everything recorded so far on the disk."""
        with self._lock:
            if not self._log.closed and os.getpid() == self._pid:
                os.fsync(self._log.fileno())

    def close(self) -> None:
        """Write out the log; later events are still handed to subscribers but recorded no more."""
        self.sync()
        with self._lock:
            self._log.close()

    def __del__(self) -> None:
        if hasattr(self, "_log"):  # it was opened
            try:  # noqa: SIM105  # at the interpreter's end, imported names are gone
                self._log.close()
            except OSError:
                pass


class Subscriptions:
    """The subscribers that one owner gave to a bus; they end with their owner.

    The bus belongs to a thread, which nothing frees while it runs. Were a subscriber in its hands, so were all that
    the subscriber refers to, for instance the training client it belongs to: no client could ever be let go.

    Args:
        bus: Tells them; refers to none of them.
    """

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self._subscribers: dict[object, Subscriber] = {}

    def add(self, subscriber: Subscriber, after: int | None = None) -> Callable[[], None]:
        """Subscribe; returns a function that ends the subscription. See `EventBus.subscribe`."""
        _check_subscriber(subscriber)
        key, held_by = object(), weakref.ref(self)

        def forward(event: Event) -> None:
            owner = held_by()
            if owner is not None and key in owner._subscribers:
                owner._subscribers[key](event)

        def unsubscribe() -> None:
            owner = held_by()
            if owner is not None:
                owner._subscribers.pop(key, None)
            end()

        forward.__qualname__ = _name_of(subscriber)
        self._subscribers[key] = subscriber
        end = self._bus.subscribe(forward, after)
        return unsubscribe


def _check_subscriber(subscriber: object) -> None:
    if not callable(subscriber) or inspect.iscoroutinefunction(subscriber):
        raise ValidationError(
            f"A subscriber is a plain function of one event, called where it happens, not {as_given(subscriber)}. "
            f"To await events: async for event in tc.events()."
        )


def _name_of(subscriber: object) -> str:
    return getattr(subscriber, "__qualname__", None) or repr(subscriber)
