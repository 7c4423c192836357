"""Forwarding: hands what is measured to a sink, on a thread of its own, so that no training ever waits for one."""

import atexit
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Self

from tensafe_nb.display import Facts, as_markdown, shown
from tensafe_nb.errors import StorageError, TGTinkerError, ValidationError
from tensafe_nb.events import (
    Alarm,
    ClientCreated,
    Event,
    Metrics,
    Rollouts,
    RunConfigured,
    RunDescribed,
    RunState,
    StatusChanged,
)
from tensafe_nb.history.log import RunHistory
from tensafe_nb.history.sinks.sink import Sink, SinkRun, flat
from tensafe_nb.protocol.results import ClientStatus, RunStatus
from tensafe_nb.registry import load_dotted

logger = logging.getLogger(__name__)

TOLD = (  # the events that a sink hears of
    ClientCreated,
    Metrics,
    RunState,
    RunConfigured,
    RunDescribed,
    Alarm,
    Rollouts,
    StatusChanged,
)
MOST_WAITING = 100_000  # events, for a sink that is slower than the training
CLOSE_SECONDS = 30.0  # how long close() waits for a sink to take what is left
LONGEST_SAMPLE = 2_000  # characters of a prompt or an answer
Report = Callable[[str | None, int, str], None]  # the run under way, its step, and what is wrong


class Teller:
    """Tells a sink of events, one after the other: each run by its name, with its configuration.

    Args:
        sink: Who is told.
        history: Whose events they are.
        only: Of this run alone; None of all.
        samples: So many prompts of each step, with their answers.
        described: How the only run is called, where all events are there already: then it ends after the last of them,
            not at its end.
    """

    def __init__(
        self,
        sink: Sink,
        history: RunHistory,
        only: str | None,
        samples: int,
        described: RunDescribed | None = None,
    ) -> None:
        self._sink, self._history, self._only, self._samples = sink, history, only, samples
        self._whole = described is not None
        self._described = {} if described is None else {described.run_id: described}
        self._configured: dict[str, Mapping[str, Any]] = {}
        self._states: dict[str, str] = {}  # of runs that have ended
        self._config: dict[str, Any] = {}
        self._client = ""
        self._runs: dict[str, SinkRun] = {}
        self.under_way: str | None = None
        self.over = False  # the only run has ended
        self.step = self.seq = self.points = 0

    def take(self, event: Event) -> None:
        """Tell of an event."""
        if event.seq <= self.seq:
            return  # it was in the log already
        self.seq = event.seq
        match event:
            case ClientCreated():
                self._client = event.training_client_id
                self._config = {"training": self._history.config.model_dump(mode="json")}
            case RunConfigured():
                self._configured[event.run_id] = event.config
            case RunDescribed():
                self._describe(event)
            case RunState(run_id=run_id, state=state):
                ended = RunStatus(state).ended
                self.under_way = None if ended else run_id
                run = self._run_of(run_id) if ended else None  # a run that begins has not been described yet
                if run is not None:
                    self._states[run_id] = state
                    if not self._whole:
                        self._sink.end(self._runs.pop(run_id), state)
                        self.over = self._only is not None
            case Metrics():
                run = self._run_of(event.run_id or self.under_way)
                if run is not None:
                    self.step = event.step
                    self.points += len(event.values)
                    self._sink.metrics(run, event.step, dict(event.values), event.time)
            case Alarm():
                run = self._run_of(event.run_id)
                if run is not None:
                    text = f"**{event.level}** {as_markdown(event.message)} {as_markdown(event.remedy)}"
                    self._sink.text(run, event.step, f"alarms/{event.name}", text, event.time)
            case Rollouts():
                run = self._run_of(event.run_id) if self._samples else None
                if run is not None:
                    self._sink.text(run, event.step, "samples", self._sampled(event), event.time)

    def end(self) -> None:
        """Nothing follows: what has no end of its own ends here."""
        for run in self._runs.values():
            going_on = "INTERRUPTED" if run.run_id == self.under_way else "FINISHED"
            self._sink.end(run, self._states.get(run.run_id, going_on))
        self._runs.clear()
        self._sink.close()

    def _describe(self, event: RunDescribed) -> None:
        """Take note of what a run is called; one that the sink knows already is told so, where the sink can be."""
        if self._whole:
            return  # the latest description of it is known
        self._described[event.run_id] = event
        begun = self._runs.get(event.run_id)
        describe = getattr(self._sink, "describe", None)
        if begun is not None and callable(describe):
            name = event.name or event.run_id
            self._runs[event.run_id] = replace(begun, name=name, tags=event.tags, notes=event.notes)
            describe(self._runs[event.run_id])

    def _run_of(self, run_id: str | None) -> SinkRun | None:
        """Return the run that something belongs to, begun if it is new; None if nobody wants to hear of it."""
        found = run_id or self._client
        if self._only not in (None, found):
            return None
        if found not in self._runs:
            told = self._described.get(found) or RunDescribed(run_id=found)
            later = " (later)" if found in self._states else ""  # the sink's own has been ended
            run = SinkRun(
                run_id=found,
                name=(told.name or found) + later,
                config=dict(flat({**self._config, **self._configured.get(found, {})})),
                tags=told.tags,
                notes=told.notes,
            )
            self._sink.begin(run)
            self._runs[found] = run
        return self._runs[found]

    def _sampled(self, event: Rollouts) -> str:
        """Return the first prompts of a step, with their answers and rewards, as Markdown."""
        path = self._history.rollouts_file(event)
        if not path.exists():
            return "The rollouts of this step are not on the disk any more."
        kind: Any = load_dotted("tensafe_nb.rlvr.rollouts.trajectories:TrajectoryBatch")
        parts = []
        for group in kind.load(path).groups[: self._samples]:
            parts.append(f"**{as_markdown(group.prompt[:LONGEST_SAMPLE])}**\n")
            parts += [
                f"- {t.reward if t.reward is not None else 'no score'}: {as_markdown(t.response[:LONGEST_SAMPLE])}"
                for t in group.rollouts
            ]
        return "\n".join(parts)


@shown
class Forwarding:
    """Metrics on their way to a sink: of `tc.log_to(…)` and `run.log_to(…)`. It ends with its training client.

    A sink that fails is told nothing more, and the run has an alarm that says so; the training goes on.

    Attributes:
        sink: The name of the sink.
        error: Why it ended early; None if it did not.

    Example:
        >>> with tc.log_to("tensorboard", "runs"):
        ...     await tc.fit(batches, steps=100)
    """

    def __init__(
        self, name: str, sink: Sink, history: RunHistory, report: Report, *, only: str | None, samples: int
    ) -> None:
        self.sink = name
        self.error: BaseException | None = None
        self._report, self._history = report, history
        self._teller = Teller(sink, history, only, samples)
        self._waiting: deque[Event] = deque()
        self._changed = threading.Condition()
        self._idle = self._closing = self._ended = self._behind = False
        self._unsubscribe: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._serve, name="tsnb-sink", daemon=True)

    def start(self, watch: Callable[[Callable[[Event], None]], Callable[[], None]]) -> Self:
        """Begin with what the log holds, then go on with what happens."""
        self._unsubscribe = watch(self.hear)
        self._thread.start()
        atexit.register(self.close)
        return self

    def hear(self, event: Event) -> None:
        """Take an event, on whatever thread it happens; it is told later."""
        if self._ended or not isinstance(event, TOLD):
            return
        with self._changed:
            self._behind = self._behind or len(self._waiting) >= MOST_WAITING
            if not self._behind:
                self._waiting.append(event)
            self._idle = False
            self._changed.notify_all()

    @property
    def done(self) -> bool:
        """Whether it has ended: it was closed, its training client was, or its sink failed."""
        return self._ended

    def flush(self, timeout: float = CLOSE_SECONDS) -> bool:
        """Wait until the sink has been told of everything so far; returns whether it has in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._idle or self._ended, timeout)

    def stop(self) -> None:
        """End as soon as the sink has been told what is left; does not wait for that."""
        self._unsubscribe()
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Tell the sink what is left, and end; idempotent. Waits so many seconds at most."""
        self.stop()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)
            if self._thread.is_alive():
                logger.warning("The sink %s has not taken everything after %s s.", self.sink, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _facts(self) -> Facts:
        return {
            "sink": self.sink,
            "values": self._teller.points,
            "state": "failed" if self.error is not None else "ended" if self._ended else "under way",
            **({"error": f"{type(self.error).__name__}: {self.error}"} if self.error is not None else {}),
        }

    def __repr__(self) -> str:
        facts = self._facts()
        return f"<Forwarding to {self.sink}, {facts['values']} values, {facts['state']}>"

    def _serve(self) -> None:
        try:
            self._tell(self._history.events(kinds=TOLD))
            while self._tell(self._next()):
                pass
            self._teller.end()
        except Exception as error:  # noqa: BLE001  # a sink is somebody else's code, and may raise anything
            self.error = error
            self._report(self._teller.under_way, self._teller.step, self._complaint(error))
        finally:
            self._unsubscribe()
            atexit.unregister(self.close)
            with self._changed:
                self._ended = True
                self._waiting.clear()
                self._changed.notify_all()

    def _tell(self, events: Iterable[Event] | None) -> bool:
        """Tell of events; returns whether more may follow."""
        for event in events or ():
            self._teller.take(event)
            if self._teller.over or (
                isinstance(event, StatusChanged) and event.status == ClientStatus.TERMINATED
            ):
                return False
        return events is not None

    def _next(self) -> list[Event] | None:
        """Wait for events, and return them; None once it is to end and has told all."""
        with self._changed:
            self._idle = not self._waiting
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or self._closing)
            events = list(self._waiting)
            self._waiting.clear()
            if self._behind:
                raise StorageError(f"it was {MOST_WAITING:,} events behind")
            return events or None

    def _complaint(self, error: BaseException) -> str:
        return f"The sink {self.sink} failed and is told nothing more: {type(error).__name__}: {error}."


def check_samples(samples: int) -> None:
    """Refuse a number of prompts below 0."""
    if samples < 0:
        raise ValidationError(f"log_to: samples={samples} must be 0 or more prompts of each step.")


def reporter(publish: Callable[[Event], object]) -> Report:
    """Return what tells of a sink that failed: an alarm of the run under way, else a warning."""

    def report(run_id: str | None, step: int, complaint: str) -> None:
        remedy = "The training goes on. Mend the sink and call log_to again: it begins with what it missed."
        if run_id is None:
            logger.warning("%s %s", complaint, remedy)
            return
        alarm = Alarm(
            run_id=run_id, step=step, name="sink_failed", level="amber", message=complaint, remedy=remedy
        )
        with suppress(TGTinkerError):  # the client has been closed meanwhile
            publish(alarm)

    return report


def replay_into(sink: Sink, name: str, history: RunHistory, run: RunDescribed, samples: int) -> int:
    """Tell a sink of all that a log says of a run, and close it; returns how many values there were.

    Raises:
        StorageError: The sink failed.
    """
    teller = Teller(sink, history, run.run_id, samples, run)
    try:
        for event in history.events(kinds=TOLD):
            teller.take(event)
        teller.end()
    except TGTinkerError:
        raise
    except Exception as error:
        raise StorageError(f"The sink {name} failed: {type(error).__name__}: {error}.") from error
    return teller.points
