"""A finished run, replayed from its event log: told event by event, all at once or at a pace."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import final

from tensafe_nb.config import TrainingConfig
from tensafe_nb.errors import ValidationError
from tensafe_nb.events import ClientCreated, Event, RunState, StatusChanged
from tensafe_nb.history.log import RunHistory
from tensafe_nb.history.state import RunSoFar
from tensafe_nb.protocol.codec import decode
from tensafe_nb.protocol.results import ClientStatus, RunStatus
from tensafe_nb.runs.record import RunRecord


@final
@dataclass(slots=True, eq=False)
class RecordedRun:
    """The run of a recording, as far as the events of its log were told."""

    client: "Recording"
    record: RunRecord

    @property
    def run_id(self) -> str:
        return self.record.run_id

    @property
    def planned_steps(self) -> int | None:
        return self.record.planned_steps

    @property
    def curve(self) -> str:
        return self.record.curve

    @property
    def started_at(self) -> float:
        return self.record.started_at

    @property
    def steps_done(self) -> int:
        return self._told.steps_done

    @property
    def state(self) -> RunStatus:
        return self._told.state

    def done(self) -> bool:
        """Whether its end was told."""
        return self.state.ended

    @property
    def _told(self) -> RunSoFar:
        return self.client.history.state.runs.get(self.run_id) or RunSoFar(self.run_id)


@final
class Recording:
    """A training client read from its log: it knows what it was told of it, and no button reaches it.

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
        self.config = config_of(record)
        self.history: RunHistory = ToldHistory(record)
        self.run = RecordedRun(self, record)
        self._now = record.started_at
        self._record = record
        self._subscribers: list[Callable[[Event], None]] = []

    @property
    def started(self) -> bool:
        """Whether the run's own first event was told."""
        return self.run.run_id in self.history.state.runs

    def now(self) -> float:
        """Return the time of the latest event told, in Unix seconds: the only time a recording knows."""
        return self._now

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
            yield completed(last, self._record)
            if isinstance(last, RunState) and last.run_id == self.run.run_id and RunStatus(last.state).ended:
                break
        else:  # the log has no end: its process died
            yield interruption_of(self._record, last.time)
        yield StatusChanged(status=ClientStatus.TERMINATED, time=last.time)

    def tell(self, event: Event) -> None:
        """Take in an event, and pass it on; one without a number is not in the log."""
        self._now = max(self._now, event.time)  # clocks are set back, recordings are not
        self.history.add(event)
        for subscriber in tuple(self._subscribers):
            subscriber(event)

    def tell_all(self) -> None:
        """Tell everything at once."""
        for event in self.events():
            self.tell(event)

    def break_off(self, reason: str) -> None:
        """End without the rest of the log."""
        run, step = self.run, self.history.state.step
        self.tell(RunState(run_id=run.run_id, state=RunStatus.INTERRUPTED, step=step, reason=reason))
        self.tell(StatusChanged(status=ClientStatus.TERMINATED))


class ToldHistory(RunHistory):
    """A history that reads no further in its log than it was told.

    Args:
        record: Of the run whose log it is.
    """

    def __init__(self, record: RunRecord) -> None:
        super().__init__(record.log)
        self._record = record

    def events(self, after: int = 0, kinds: Sequence[type[Event]] = ()) -> Iterator[Event]:
        told = takewhile(lambda event: event.seq <= self.last_seq, super().events(after, kinds))
        return (completed(event, self._record) for event in told)


def completed(event: Event, record: RunRecord) -> Event:
    """Return an event with what version 0.1 did not write: the curve of the run, which its whole log tells."""
    if isinstance(event, RunState) and event.run_id == record.run_id and event.curve is None:
        return replace(event, curve=record.curve)
    return event


def interruption_of(record: RunRecord, moment: float) -> RunState:
    """Return the event that the process of an interrupted run could not write any more."""
    return RunState(
        run_id=record.run_id,
        state=RunStatus.INTERRUPTED,
        step=record.step,
        reason=record.way_on,
        time=moment,
        done=record.steps_done,
    )


def config_of(record: RunRecord) -> TrainingConfig:
    """Return what was trained: a log begins with it."""
    created = next(RunHistory(record.log).events(), None)
    config = decode(dict(created.config)) if isinstance(created, ClientCreated) else None
    if not isinstance(config, TrainingConfig):
        raise ValidationError(
            f"{record.log} does not begin with what was trained: it is not the whole log of a training client."
        )
    return config
