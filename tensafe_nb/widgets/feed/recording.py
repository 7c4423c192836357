"""A run that was, as something to watch: what its log says, told event by event, all at once or at a pace."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, final

from tensafe_nb.config import TrainingConfig
from tensafe_nb.errors import ValidationError
from tensafe_nb.events import (
    ClientCreated,
    Event,
    OperationCancelled,
    OperationFailed,
    OperationFinished,
    OperationQueued,
    RunState,
    RunStep,
    StateLoaded,
    StatusChanged,
)
from tensafe_nb.history.log import RunHistory
from tensafe_nb.protocol.codec import decode
from tensafe_nb.protocol.results import ClientStatus, RunStatus, TrainingClientInfo
from tensafe_nb.runs.record import RunRecord


@final
@dataclass(slots=True, eq=False)
class RecordedRun:
    """What there is to see of a run that was; it changes as the events of its log are told."""

    client: "Recording"
    run_id: str
    planned_steps: int | None
    curve: str
    started_at: float
    steps_done: int = 0
    state: RunStatus = RunStatus.RUNNING

    def done(self) -> bool:
        """Whether its end was told."""
        return self.state.ended


@final
class Recording:
    """A training client that was: it knows what it was told of its log, and no button reaches it.

    Args:
        record: The run to show; of its client's log, all before it is told too, and nothing after it.
        mark: The word that says so wherever it is shown.

    Raises:
        ValidationError: The file is not the log of a training client.
    """

    steerable = False

    def __init__(self, record: RunRecord, mark: str) -> None:
        self.training_client_id = record.run_id.rpartition("/")[0]
        self.marks = (mark,)
        self.config = _config_of(record)
        self.history: RunHistory = _Told(record.log)
        self.run = RecordedRun(self, record.run_id, record.planned_steps, record.curve, record.started_at)
        self.started = False  # whether the run's own first event was told
        self.step = self._first_step = self._queued = 0
        self._now = record.started_at
        self._status = str(ClientStatus.READY)
        self._reason: str | None = None
        self._record = record
        self._subscribers: list[Callable[[Event], None]] = []

    @property
    def runs(self) -> tuple[Any, ...]:
        return (self.run,)

    def now(self) -> float:
        """Return the time of the latest event told, in Unix seconds: the only time a recording knows."""
        return self._now

    def refresh(self) -> TrainingClientInfo:
        return TrainingClientInfo(
            self.training_client_id,
            self.config.model_ref,
            self._status,
            self.step,
            self._queued,
            self._record.started_at,
            self._reason,
        )

    def subscribe(self, subscriber: Callable[[Event], None], after: int | None = None) -> Callable[[], None]:
        """Call `subscriber(event)` for what was told since event number `after`, then for what is told."""
        for event in self.history.events(after) if after is not None else ():
            subscriber(event)
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber)

    def watch(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        """Call `subscriber(event)` for what is told."""
        return self.subscribe(subscriber)

    def events(self) -> Iterator[Event]:
        """Iterate over what is to be told, up to the run's end: also one that its process could not write any more."""
        last: Event = Event()
        for last in RunHistory(self._record.log).events():
            yield last
            if isinstance(last, RunState) and last.run_id == self.run.run_id and RunStatus(last.state).ended:
                break
        else:
            yield self._interruption(last.time)
        yield StatusChanged(status=ClientStatus.TERMINATED, time=last.time)

    def tell(self, event: Event) -> None:
        """Take in an event, and pass it on; one without a number is not in the log."""
        self._now = max(self._now, event.time)
        if event.seq:
            self.history.add(event)
        self._note(event)
        for subscriber in tuple(self._subscribers):
            subscriber(event)

    def tell_all(self) -> None:
        """Tell everything at once."""
        for event in self.events():
            self.tell(event)

    def break_off(self, reason: str) -> None:
        """End without the rest of the log."""
        self.tell(
            RunState(
                run_id=self.run.run_id, state=RunStatus.INTERRUPTED, step=self.run.steps_done, reason=reason
            )
        )
        self.tell(StatusChanged(status=ClientStatus.TERMINATED))

    def _interruption(self, moment: float) -> RunState:
        record = self._record
        return RunState(
            run_id=record.run_id,
            state=RunStatus.INTERRUPTED,
            step=record.step,
            reason=record.way_on,
            time=moment,
            done=record.steps_done,
        )

    def _note(self, event: Event) -> None:
        run = self.run
        match event:
            case OperationQueued():
                self._queued += 1
            case OperationFinished() | OperationFailed() | OperationCancelled():
                self._queued -= 1
            case StatusChanged(status=status, reason=reason):
                self._status, self._reason = status, reason
                self._queued = 0 if status == ClientStatus.TERMINATED else self._queued
            case RunStep(run_id=run.run_id, done=done):
                run.steps_done = done
            case RunState(run_id=run.run_id, state=state, step=step, done=done):
                if not self.started:
                    self.started, self._first_step = True, step
                run.state, self.step = RunStatus(state), step
                if done is not None:
                    run.steps_done = done
            case StateLoaded(step=step) if self.started:
                run.steps_done, self.step = max(step - self._first_step, 0), step


class _Told(RunHistory):
    """A history that reads no further in the log than it was told."""

    def events(self, after: int = 0, kinds: Sequence[type[Event]] = ()) -> Iterator[Event]:
        return takewhile(lambda event: event.seq <= self.last_seq, super().events(after, kinds))


def _config_of(record: RunRecord) -> TrainingConfig:
    created = next(RunHistory(record.log).events(), None)
    config = decode(dict(created.config)) if isinstance(created, ClientCreated) else None
    if not isinstance(config, TrainingConfig):
        raise ValidationError(
            f"{record.log} does not begin with what was trained: it is not the whole log of a training client."
        )
    return config
