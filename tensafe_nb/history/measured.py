"""What was measured, as rows: the way by which the weights came to be what they are, and what rollbacks gave up."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from tensafe_nb.checks import checked
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError, nearest
from tensafe_nb.events import CheckpointSaved, Event, Metrics, Rollouts, RunState, StateLoaded
from tensafe_nb.history.table import Table
from tensafe_nb.protocol.batch import Array
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.registry import load_dotted

Axis: TypeAlias = Literal["step", "tokens", "time"]
Names: TypeAlias = str | Sequence[str | Sequence[str]]
TOLD = (Metrics, Rollouts, RunState, CheckpointSaved, StateLoaded)  # the events that rows are made of
FIXED = ("run", "step", "time", "seconds", "abandoned")  # columns that are no metrics


@dataclass(slots=True, eq=False)
class MeasuredRow:
    """What was measured of one state of the weights.

    Attributes:
        run: The run that was under way; None where operations were called one by one.
        step: As the events number it.
        time: Unix seconds, of what was measured first.
        values: By metric.
        before: The row before it, on the way of the weights.
        rollouts: What was sampled for this step; such a row has no values.
        own: Whether the run itself has added to it, so that the next step of the core is another row.
    """

    run: str | None
    step: int
    time: float
    values: dict[str, float]
    before: "MeasuredRow | None"
    rollouts: Path | None = None
    own: bool = False


@dataclass(slots=True)
class Measurements:
    """Takes the events of a log, one after the other, and puts what was measured together, row by row.

    What the core measures at an optimiser step and what the run measures at the same step are one row. Rows are joined
    by what came before them: a checkpoint remembers the row it was saved behind, and whoever loads it goes on from
    there, so that what was measured in between lies beside the way.

    Attributes:
        rows: All of them, in the order in which they were measured.
        tip: The row behind which the weights stand.
        tips: The same, at the end of each run.
        saved: By artifact: the row it was saved behind, and the event.
        resumed: By run: the checkpoint it began with.
    """

    rollouts_file: Callable[[Rollouts], Path]
    elsewhere: "Callable[[str], Measurements | None]"  # finds what another log tells of a checkpoint
    rows: list[MeasuredRow] = field(default_factory=list)
    tip: MeasuredRow | None = None
    tips: dict[str, MeasuredRow | None] = field(default_factory=dict)
    saved: dict[str, tuple[MeasuredRow | None, CheckpointSaved]] = field(default_factory=dict)
    resumed: dict[str, str] = field(default_factory=dict)
    savers: dict[str, str | None] = field(default_factory=dict)  # by artifact: the run that saved it
    under_way: str | None = None
    core: MeasuredRow | None = None  # the latest of the core
    own: dict[str, MeasuredRow] = field(default_factory=dict)  # the latest of each run

    @classmethod
    def read(
        cls,
        events: Iterable[Event],
        rollouts_file: Callable[[Rollouts], Path],
        elsewhere: "Callable[[str], Measurements | None]",
    ) -> "Measurements":
        """Return what the events of a log add up to."""
        rows = cls(rollouts_file, elsewhere)
        for event in events:
            rows.take(event)
        return rows

    def take(self, event: Event) -> None:
        """Take in the next event."""
        match event:
            case Metrics():
                self.measure(event)
            case Rollouts():
                path = self.rollouts_file(event)
                self.tip = MeasuredRow(event.run_id, event.step, event.time, {}, self.tip, path)
                self.rows.append(self.tip)
            case RunState():
                ended = RunStatus(event.state).ended
                self.tips[event.run_id] = self.tip
                self.under_way = None if ended else event.run_id
            case CheckpointSaved():
                self.saved[event.artifact_id] = self.tip, event
                self.savers[event.artifact_id] = event.run_id
            case StateLoaded():
                self.go_back(event)
        if self.under_way is not None:
            self.tips[self.under_way] = self.tip

    def measure(self, event: Metrics) -> None:
        """Add to the row that this belongs to, or begin one."""
        by_core, run = event.run_id is None, event.run_id or self.under_way
        candidates = [] if by_core else [self.own.get(event.run_id or "")]
        candidates += [self.core] if self.core is not None and not self.core.own else []
        for row in candidates:
            fits = row is not None and (row.run, row.step) == (run, event.step)
            if row is not None and fits and not row.values.keys() & event.values.keys():
                row.values.update(event.values)
                break
        else:
            row = self.tip = MeasuredRow(run, event.step, event.time, dict(event.values), self.tip)
            self.rows.append(row)
        if by_core:
            self.core = row
        elif event.run_id is not None:
            row.own, self.own[event.run_id] = True, row

    def go_back(self, event: StateLoaded) -> None:
        """The weights are those of a checkpoint again: what follows was measured behind its row."""
        run = self.under_way
        if run is not None and not any(row.run == run for row in self.rows):
            self.resumed[run] = event.artifact_id
        self.core = None
        self.own.clear()
        if event.artifact_id in self.saved:
            self.tip = self.saved[event.artifact_id][0]
            return
        found = self.elsewhere(event.artifact_id)
        if found is not None:
            self.tip = found.saved[event.artifact_id][0]
            self.resumed, self.savers = found.resumed | self.resumed, found.savers | self.savers
            return
        self.tip = None  # of another client: nothing here led to it

    def chain_of(self, run: str) -> list[str]:
        """Return the runs that a run goes on with what they began, itself first: each resumed the next."""
        chain: list[str] = []
        following: str | None = run
        while following is not None and following not in chain:
            chain.append(following)
            following = self.savers.get(self.resumed.get(following, ""))
        return chain

    def way(self, tip: MeasuredRow | None) -> list[MeasuredRow]:
        """Return the rows on the way to one, oldest first."""
        found: list[MeasuredRow] = []
        while tip is not None:
            found.append(tip)
            tip = tip.before
        return found[::-1]


@dataclass(frozen=True, slots=True)
class KeptRollouts:
    """Where the rollouts of a step lie, and whether a rollback gave it up."""

    run: str | None
    step: int
    path: Path
    abandoned: bool


@dataclass(slots=True)
class Reading:
    """The rows of a training client, or of one run, as they are taken along.

    Attributes:
        rows: In the order of their steps; those that rollbacks gave up in that of their measurement.
        given_up: Of `rows`, those beside the way.
        checkpoints: The row behind which each was saved.
        label: How it is told from others.
        curve: The metric to watch.
        private: Whether it tells of private training data.
    """

    rows: list[MeasuredRow]
    given_up: list[MeasuredRow]
    checkpoints: list[MeasuredRow]
    label: str
    curve: str
    private: bool

    @classmethod
    def of_client(cls, rows: Measurements, label: str, private: bool) -> "Reading":
        """Return all that a training client measured by itself."""
        return cls._of(rows, rows.tip, rows.rows, label, private)

    @classmethod
    def of_run(cls, rows: Measurements, run: str, private: bool) -> "Reading":
        """Return what a run measured; one that resumed another begins with that one's rows, up to the checkpoint."""
        tip, chain = rows.tips.get(run), rows.chain_of(run)
        earlier = [row for row in rows.way(tip) if row.run in chain[1:]]
        own = [row for row in rows.rows if row.run == run]
        return cls._of(rows, tip, [*earlier, *own], run, private)

    @classmethod
    def _of(
        cls,
        rows: Measurements,
        tip: MeasuredRow | None,
        chosen: Sequence[MeasuredRow],
        label: str,
        private: bool,
    ) -> "Reading":
        way = {id(row) for row in rows.way(tip)}
        # the first evaluation is told after the first step: within a run, rows stand by their steps
        order = {run: number for number, run in enumerate(dict.fromkeys(row.run for row in chosen))}
        kept = sorted((row for row in chosen if id(row) in way), key=lambda row: (order[row.run], row.step))
        there = {id(row) for row in kept}
        saved = [row for row, _ in rows.saved.values() if row is not None and id(row) in there]
        curve = "reward" if any("reward" in row.values for row in chosen) else "loss"
        given_up = [row for row in chosen if id(row) not in way]
        return cls(kept, given_up, saved, label, curve, private)

    @property
    def names(self) -> list[str]:
        """The metrics that were measured, the one to watch first."""
        found = {name for row in (*self.rows, *self.given_up) for name in row.values}
        first = [name for name in (self.curve, f"eval/{self.curve}") if name in found]
        return [*first, *sorted(found - set(first))]

    def has(self, name: str) -> bool:
        """Whether a metric was measured."""
        return any(name in row.values for rows in (self.rows, self.given_up) for row in rows)

    def check(self, names: Iterable[str]) -> None:
        """Refuse what was never measured.

        Raises:
            ValidationError: With the nearest name.
        """
        for name in names:
            if not self.has(name):
                raise ValidationError(
                    f"{self.label} has not measured {as_given(name)}.{nearest(str(name), self.names)}"
                )

    def table(self, names: str | Sequence[str] | None = None, abandoned: bool = False) -> Table:
        """Return the rows in which some metrics were measured as a table."""
        chosen = self.names if names is None else [names] if isinstance(names, str) else list(names)
        self.check(chosen)
        both = self.rows + (self.given_up if abandoned else [])
        rows = [row for row in both if any(name in row.values for name in chosen)]
        began = min((row.time for row in rows), default=0.0)
        left = {id(row) for row in self.given_up}
        columns: dict[str, list[Any]] = {
            "run": [row.run for row in rows],
            "step": [row.step for row in rows],
            "time": [datetime.fromtimestamp(row.time, UTC) for row in rows],
            "seconds": [row.time - began for row in rows],
        }
        if abandoned:
            columns["abandoned"] = [id(row) in left for row in rows]
        for name in chosen:
            title = f"{name} (metric)" if name in FIXED else name
            columns[title] = [row.values.get(name) for row in rows]
        return Table(columns, self.private)

    def latest(self) -> dict[str, float]:
        """Return the latest value of every metric."""
        found = {name: value for row in self.rows for name, value in row.values.items()}
        return {name: found[name] for name in self.names if name in found}

    def points(self, name: str, x: Axis) -> tuple[Array, Array]:
        """Return where a metric was measured, on an axis, and its values; both are (points,)."""
        places = self.places(x)
        found = [(places[id(row)], row.values[name]) for row in self.rows if name in row.values]
        return np.array([at for at, _ in found], dtype=float), np.array([v for _, v in found], dtype=float)

    def places(self, x: Axis) -> dict[int, float]:
        """Return where each row stands on an axis, by its identity: its step, tokens trained on, or seconds."""
        if x == "step":
            return {id(row): float(row.step) for row in self.rows}
        if x == "time":
            began = min((row.time for row in self.rows), default=0.0)
            return {id(row): row.time - began for row in self.rows}
        self.check(["tokens"])
        so_far = np.cumsum([row.values.get("tokens", 0.0) for row in self.rows])
        return {id(row): float(sum_) for row, sum_ in zip(self.rows, so_far, strict=True)}

    def breaks(self, name: str, x: Axis) -> list[float]:
        """Return where another function began to reward: nothing is averaged across."""
        if "reward" not in name:
            return []
        places, versions = self.places(x), [row for row in self.rows if "reward_version" in row.values]
        return [
            places[id(after)]
            for before, after in pairwise(versions)
            if before.values["reward_version"] != after.values["reward_version"]
        ]


class Measured(ABC):
    """Base of what has measured something: a training client's history, a run, the record of one."""

    __slots__ = ()

    @abstractmethod
    def reading(self) -> Reading:
        """Return what it measured, row by row, from its log."""

    @checked
    def table(self, names: str | Sequence[str] | None = None, *, abandoned: bool = False) -> Table:
        """Return what was measured as a table, one row for each state of the weights of which something was measured.

        The columns are `run`, `step`, `time`, `seconds` since the first row, and the metrics by their names in panel
        and events. What was not measured is None, never 0. Steps that a rollback gave up are left out.

        Args:
            names: The metrics, and only rows in which one of them was measured; None takes all.
            abandoned: Add the rows that rollbacks gave up, last, and a column that marks them.

        Raises:
            ValidationError: A metric that was never measured; says the nearest.
        """
        return self.reading().table(names, abandoned)

    @checked
    def to_pandas(self, names: str | Sequence[str] | None = None, *, abandoned: bool = False) -> Any:
        """Return what was measured as a pandas DataFrame; see `table`. What was not measured is NaN.

        Raises:
            ValidationError: A metric that was never measured, with the nearest; or pandas is not installed.
        """
        return self.table(names, abandoned=abandoned).to_pandas()

    @checked
    def to_csv(
        self, path: str | Path, names: str | Sequence[str] | None = None, *, abandoned: bool = False
    ) -> Path:
        """Write what was measured as a CSV file, and return its path; see `table`. It needs no further package.

        Raises:
            ValidationError: A metric that was never measured, with the nearest; under differential privacy, a name of a
                file that does not say "operator".
            StorageError: It could not be written.
        """
        return self.table(names, abandoned=abandoned).to_csv(path)

    @checked
    def to_parquet(
        self, path: str | Path, names: str | Sequence[str] | None = None, *, abandoned: bool = False
    ) -> Path:
        """Write what was measured as a Parquet file, and return its path; see `table`.

        Raises:
            ValidationError: As `to_csv`; or pyarrow is not installed.
            StorageError: It could not be written.
        """
        return self.table(names, abandoned=abandoned).to_parquet(path)

    @checked
    def rollouts(self, *, last: int | None = None, abandoned: bool = False) -> Any:
        """Return the rollouts that are kept, by step: each a `TrajectoryBatch`, all of them a table.

        Args:
            last: Of so many steps, the newest; None takes all.
            abandoned: In the table, those of steps that rollbacks gave up as well, marked.

        Raises:
            ValidationError: Not a number of steps.

        Example:
            >>> run.rollouts(last=10).to_csv("rollouts.csv")
        """
        if last is not None and last < 1:
            raise ValidationError(f"rollouts: last={last} must be a number of steps, at least 1.")
        reading = self.reading()
        both = [(row, False) for row in reading.rows] + [(row, True) for row in reading.given_up if abandoned]
        kept = [
            KeptRollouts(row.run, row.step, row.rollouts, left)
            for row, left in both
            if row.rollouts is not None
        ]
        newest = sorted({found.step for found in kept})[-(last or 0) :]
        made = load_dotted("tensafe_nb.rlvr.rollouts.recorded:RunRollouts")
        return made([found for found in kept if found.step in newest], reading.private)

    def final_metrics(self) -> dict[str, float]:
        """Return the latest value of every metric that was measured."""
        return self.reading().latest()

    @checked
    def plot(
        self,
        names: Names | None = None,
        *,
        x: Axis = "step",
        smoothing: float | None = None,
        log: bool = False,
        axes: Any = None,
    ) -> Any:
        """Draw curves, raw and smoothed, with the checkpoints marked, and return the matplotlib figure.

        It takes its colours and sizes from matplotlib's own settings. `tn.plot_runs` draws several runs, and bands.

        Args:
            names: Each metric has axes of its own, but `eval/NAME` joins `NAME`, and those of a tuple share theirs.
                None takes the metric to watch and its held-out twin.
            x: Over steps, tokens trained on, or seconds.
            smoothing: Weight of the past in the smoothed curve, from 0 for none to below 1; None takes 0.8.
            log: Values on a logarithmic scale.
            axes: Your own axes to draw into, as many as there would be.

        Raises:
            ValidationError: A metric that was never measured, with the nearest; or axes that do not fit.

        Example:
            >>> run.plot(["loss", "grad_norm"], x="tokens").savefig("run.png")
        """
        from tensafe_nb.history.figures import draw

        reading = self.reading()
        return draw({reading.label: [reading]}, names, x=x, smoothing=smoothing, log=log, axes=axes)
