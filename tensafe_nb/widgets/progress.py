"""Progress where no panel can be: a tqdm bar in a terminal, plain lines in a log. Both only listen to events."""

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol, TextIO, cast

from tensafe_nb.events import Event, Metrics, RunState, RunStep, StatusChanged
from tensafe_nb.protocol.results import ClientStatus, RunStatus
from tensafe_nb.runs.run import TrainingRun
from tensafe_nb.widgets.feed.recording import RecordedRun
from tensafe_nb.widgets.renderer import in_kernel

SHOWN = ("reward", "loss", "eval/reward", "eval/loss")
LINE_SHARE = 0.05  # of the planned steps, between two lines
LINE_SECONDS = 10.0
WIDTH = 100  # characters of a bar where nobody knows how wide the terminal is


class Publisher(Protocol):
    """A training client as a listener needs it."""

    def subscribe(
        self, subscriber: Callable[[Event], None], after: int | None = None
    ) -> Callable[[], None]: ...


def show(run: TrainingRun | RecordedRun, stream: TextIO | None = None) -> None:
    """Follow a run on a stream (stderr): as a bar in a terminal or a notebook, else as lines."""
    stream = sys.stderr if stream is None else stream
    progress = Bar(run, stream) if stream.isatty() or in_kernel() else Lines(run, stream)
    progress.follow(cast(Publisher, run.client))


class Report(ABC):
    """Turns the events of one run into `advance` and `finish`; called on whatever thread publishes."""

    def __init__(self, run: TrainingRun | RecordedRun) -> None:
        self.run_id, self.planned = run.run_id, run.planned_steps
        self.marks = "".join(f"{mark} " for mark in run.client.marks) if isinstance(run, RecordedRun) else ""
        self.done = 0
        self.values: dict[str, float] = {}
        self._unsubscribe: Callable[[], None] = lambda: None

    def follow(self, client: Publisher) -> None:
        self._unsubscribe = client.subscribe(self.on_event)

    def on_event(self, event: Event) -> None:
        """Show an event, on whatever thread publishes it."""
        try:
            match event:
                case Metrics(values=values, run_id=None | self.run_id):
                    self.values.update({name: values[name] for name in SHOWN if name in values})
                case RunStep(run_id=self.run_id, done=done):
                    self.done = done
                    self.advance()
                case RunState(run_id=self.run_id, state=state, reason=reason) if RunStatus(state).ended:
                    self._end(state, None if reason is None else " ".join(reason.split()))
                case StatusChanged(status=ClientStatus.TERMINATED):
                    self._end("CLOSED", None)
        except (OSError, ValueError):  # the output was closed: that is no reason for a run to fail
            self._unsubscribe()

    def _end(self, state: str, reason: str | None) -> None:
        self._unsubscribe()
        self.finish(state, reason)

    @abstractmethod
    def advance(self) -> None:
        """Show that another step is done."""

    @abstractmethod
    def finish(self, state: str, reason: str | None) -> None:
        """Show how it ended."""


class Bar(Report):
    """A tqdm bar."""

    def __init__(self, run: TrainingRun | RecordedRun, stream: TextIO) -> None:
        from tqdm import tqdm

        super().__init__(run)
        self._stream = stream
        name = f"{self.marks}run {self.run_id.rpartition('/')[2]}"
        width: dict[str, Any] = {"dynamic_ncols": True} if tells_its_width(stream) else {"ncols": WIDTH}
        self._bar = tqdm(total=self.planned, desc=name, unit="step", file=stream, **width)

    def advance(self) -> None:
        self._bar.set_postfix_str(_listed(self.values), refresh=False)
        self._bar.update(self.done - self._bar.n)

    def finish(self, state: str, reason: str | None) -> None:
        if state != RunStatus.FINISHED:
            self._bar.set_description_str(f"{self._bar.desc.rstrip(': ')} {state.lower()}")
        self._bar.set_postfix_str(_listed(self.values))
        self._bar.close()
        if reason:
            self._stream.write(f"{self.marks}{self.run_id} {state.lower()}: {reason}\n")


class Lines(Report):
    """One line for every 5 % of the steps or every 10 s, and one at the end."""

    def __init__(
        self,
        run: TrainingRun | RecordedRun,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(run)
        self._stream, self._clock = stream, clock
        self._shown_step, self._shown_at = 0, clock()
        self._every = self.planned * LINE_SHARE if self.planned else float("inf")

    def advance(self) -> None:
        due = self.done - self._shown_step >= self._every or self._clock() - self._shown_at >= LINE_SECONDS
        if due and self.done != self.planned:
            self._write(_listed(self.values))

    def finish(self, state: str, reason: str | None) -> None:
        self._write(" ".join(filter(None, (_listed(self.values), state.lower(), reason and f"({reason})"))))

    def _write(self, text: str) -> None:
        self._shown_step, self._shown_at = self.done, self._clock()
        self._stream.write(
            f"{self.marks}{self.run_id} step {self.done}/{self.planned or '?'} {text}".rstrip() + "\n"
        )
        self._stream.flush()


def tells_its_width(stream: TextIO) -> bool:
    """Whether a terminal knows how wide it is: those of containers say 0, for which tqdm writes nothing at all."""
    with suppress(OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns > 0
    return False


def _listed(values: Mapping[str, float]) -> str:
    return " ".join(f"{name}={values[name]:.4g}" for name in SHOWN if name in values)
