"""The event log of a training client: every event on disk, every metric as a curve, and the state they add up to."""

import difflib
import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from tensafe_nb.checks import checked
from tensafe_nb.config import TrainingConfig
from tensafe_nb.display import Facts, as_given, shown
from tensafe_nb.errors import LONGEST_NAME, TGTinkerError, ValidationError, nearest
from tensafe_nb.events import Alarm, ClientCreated, Event, Metrics, Rollouts
from tensafe_nb.history.branches import CLOCK, Branches, Span
from tensafe_nb.history.measured import TOLD, Measured, Measurements, Reading
from tensafe_nb.history.state import ClientState
from tensafe_nb.protocol.batch import Array
from tensafe_nb.protocol.codec import decode, tags_of

UNREADABLE = (
    TGTinkerError,
    ValueError,
    TypeError,
    KeyError,
)  # what reading a file that is no event log raises
USUAL = ("loss", "reward", "learning_rate", "grad_norm", "param_delta_norm", "tokens", "epsilon")
TIMED = "tokens"  # the curve whose points keep their moments as well, so that a rate can be told


@shown
class RunHistory(Measured):
    """The history of a training client: every metric as a curve, every event on disk.

    Curves are held as columns; events are read from the log when asked for, so memory does not grow with them.

    Args:
        path: The log, one event per line.

    Attributes:
        path: The log.
        state: How the client stands now.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = ClientState()
        # Columns by metric, which only grow: step and value of each point, and the event that brought the last.
        self._steps: dict[str, array[int]] = {}
        self._values: dict[str, array[float]] = {}
        self._measured: dict[str, int] = {}
        self._clock, self._began = (
            (array("q"), array("d")),
            0.0,
        )  # steps and seconds; Unix seconds of the first
        self._timed = array("d")
        self._branches = Branches(lambda: {**self._steps, CLOCK: self._clock[0]}, self.state)

    @property
    def last_seq(self) -> int:
        """Number of the latest recorded event."""
        return self.state.seq

    @classmethod
    def load(cls, path: Path) -> "RunHistory":
        """Read a log that another process wrote, or this one; a torn last line is ignored."""
        history = cls(path)
        for event in history.events():
            history.add(event)
        return history

    def __getitem__(self, name: str) -> Array:
        """Values of a metric, in order of time, those that a rollback gave up among them; none before the first.

        Raises:
            ValidationError: Others were measured, and this one never; says the nearest. Before anything is measured,
                a name that looks like a slip for one of the core's own. `series` is empty then.
        """
        if not self._values and name not in USUAL and str(name).replace("_", "").isalpha():
            close = difflib.get_close_matches(str(name)[:LONGEST_NAME].casefold(), USUAL, n=1, cutoff=0.85)
            if close:
                raise ValidationError(
                    f"Nothing is measured yet, and {as_given(name)} looks like a slip for {close[0]!r}. A metric of "
                    f"your own that is called so: history.series({as_given(name)})."
                )
        if not isinstance(name, str) or (name not in self and self._values):
            raise ValidationError(f"Nothing has measured {as_given(name)}.{nearest(str(name), self.names)}")
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

    def spans(self, name: str) -> list[Span]:
        """Return which points of a metric led to the client as it stands, as (from, to) in numbers of points.

        All of them, `[(0, None)]`, until a state is loaded; after that, those that led to that state and those measured
        since. What lies outside was trained and given up.
        """
        return self._branches.spans(name)

    def events(self, after: int = 0, kinds: Sequence[type[Event]] = ()) -> Iterator[Event]:
        """Iterate over the recorded events with a number above `after`: all, or those of some kinds, which is quick."""
        if not self.path.exists():
            return
        wanted = [
            f'"{tag}"' for kind in kinds for tag in tags_of(kind)
        ]  # looked for before a line is decoded
        with self.path.open(encoding="utf-8") as lines:
            for line in lines:
                if not line.endswith("\n"):  # torn: its process died while it wrote
                    return
                if wanted and not any(name in line for name in wanted):
                    continue
                event = decode(json.loads(line))
                if not isinstance(event, Event):
                    raise ValidationError(f"A line of {self.path} is no event: {as_given(event)}.")
                if event.seq > after and isinstance(event, tuple(kinds) or Event):
                    yield event

    @property
    def config(self) -> TrainingConfig:
        """What is trained: a log begins with it.

        Raises:
            ValidationError: The log does not: it is not the whole one of a training client.
        """
        created = next(self.events(), None)
        config = decode(dict(created.config)) if isinstance(created, ClientCreated) else None
        if not isinstance(config, TrainingConfig):
            raise ValidationError(
                f"{self.path} does not begin with what was trained: it is not the whole log of a training client."
            )
        return config

    @property
    def is_private(self) -> bool:
        """Whether it tells of a private training's data."""
        try:
            dp = self.config.dp_config
        except ValidationError:
            return False
        return dp is not None and dp.enabled

    def reading(self, run: str | None = None) -> Reading:
        """Return what the training client measured, or one of its runs, row by row, from the log."""
        rows = self.rows()
        if run is not None:
            return Reading.of_run(rows, run, self.is_private)
        return Reading.of_client(
            rows, self.state.training_client_id or self.path.parent.name, self.is_private
        )

    def rows(self, being_read: tuple[Path, ...] = ()) -> Measurements:
        """Return all that was measured, and how it hangs together with what other logs of the home folder tell."""

        def elsewhere(artifact_id: str) -> Measurements | None:
            for other in sorted(self.path.parent.parent.glob("*/events.jsonl")):
                if other in (self.path, *being_read) or artifact_id.encode() not in other.read_bytes():
                    continue
                with suppress(*UNREADABLE):
                    rows = RunHistory(other).rows((self.path, *being_read))
                    if artifact_id in rows.saved:
                        return rows
            return None

        return Measurements.read(self.events(kinds=TOLD), self.rollouts_file, elsewhere)

    def rollouts_file(self, event: Rollouts) -> Path:
        """Return where the texts of a step lie: beside the log, wherever it was moved to, and nowhere else."""
        number = Path(event.run_id.rpartition("/")[2]).name
        return self.path.parent / "rollouts" / number / Path(event.path).name

    @property
    def alarms(self) -> list[Alarm]:
        """The alarms so far, oldest first: what went wrong, why, and what helps."""
        return [event for event in self.events(kinds=(Alarm,)) if isinstance(event, Alarm)]

    def add(self, event: Event) -> None:
        """Take in the next event, on whatever thread publishes."""
        self.state.apply(event)
        self._branches.apply(event)
        if not isinstance(event, Metrics):
            return
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
