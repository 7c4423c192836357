"""What is kept of a comparison: its arms, its seeds and its runs. What these have measured is in their own logs."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tensafe_nb import widgets
from tensafe_nb.checks import checked
from tensafe_nb.comparing.racing import measured
from tensafe_nb.comparing.results import ComparisonResult, Measure, Standings, Track
from tensafe_nb.comparing.showing import shown_of
from tensafe_nb.display import Facts, Listing, as_given, visible
from tensafe_nb.errors import RunNotFoundError, ValidationError, nearest
from tensafe_nb.history.log import UNREADABLE
from tensafe_nb.history.table import Table, Tabular
from tensafe_nb.protocol.codec import decode, encode, tagged
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.runs.record import RunRecord, load_run
from tensafe_nb.store.disk import write_whole
from tensafe_nb.store.home import Home
from tensafe_nb.widgets.still.race import Shown


@tagged("comparison_lane")
@dataclass(frozen=True, slots=True)
class KeptLane:
    """One arm with one seed.

    Attributes:
        arm: The arm's name.
        seed: The seed.
        run_id: Its run; None where none was started.
        state: That of the run, when this was written.
        done: Steps taken.
        reason: Why it failed or did not go as planned.
        begun_at: The client's step before the run's first.
    """

    arm: str
    seed: int
    run_id: str | None
    state: str
    done: int
    reason: str | None
    begun_at: int


@tagged("comparison")
@dataclass(frozen=True, slots=True)
class Kept:
    """A comparison, as a file keeps it.

    Attributes:
        comparison_id: Names it.
        name: What its user calls it.
        started_at: Unix seconds.
        state: RUNNING, PAUSED, FINISHED, STOPPED or FAILED.
        reason: Why it ended as it did.
        metric: What is compared; None before anything was measured.
        window: As for `Measure`, like `higher` and `planned`.
        higher: Whether a greater value is better.
        planned: Steps of each run.
        baseline: The arm that others are compared with.
        arms: By name: what is different about each, in words where it is no plain value.
        given_up: By arm: at which step, and why.
        parents: By forked arm: where from, and at which step.
        lanes: One for each arm and seed.
    """

    comparison_id: str
    name: str | None
    started_at: float
    state: str
    reason: str | None
    metric: str | None
    window: int | None
    higher: bool
    planned: int | None
    baseline: str | None
    arms: Mapping[str, Mapping[str, Any]]
    given_up: Mapping[str, tuple[int, str]]
    parents: Mapping[str, tuple[str, int]]
    lanes: tuple[KeptLane, ...]

    def write(self) -> None:
        """Write it, in place of what was there.

        Raises:
            StorageError: It could not be written.
        """
        folder = Home.of_environment().comparisons()
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(encode(self), allow_nan=False)
        write_whole(folder / f"{self.comparison_id}.json", text)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ComparisonRecord(Tabular):
    """A comparison that is recorded in the home folder, in whatever process it ran; made by `load_comparison`.

    Its table is made anew from what its runs have recorded.

    Example:
        >>> record = tn.load_comparison("cmp-7f3a2b")
        >>> print(record.result())
    """

    kept: Kept

    @property
    def comparison_id(self) -> str:
        """Its id."""
        return self.kept.comparison_id

    @property
    def name(self) -> str | None:
        """What it is called; None has no name."""
        return self.kept.name

    @property
    def state(self) -> str:
        """RUNNING, PAUSED, FINISHED, STOPPED or FAILED; INTERRUPTED if its process ended in the middle."""
        if self.kept.state not in ("RUNNING", "PAUSED"):
            return self.kept.state
        alive = any(not run.state.ended for run in self.runs.values())
        return self.kept.state if alive else "INTERRUPTED"

    @property
    def runs(self) -> dict[tuple[str, int], RunRecord]:
        """Its runs by arm and seed, those that are still in the home folder."""
        found = {}
        for lane in self.kept.lanes:
            try:
                if lane.run_id is not None:
                    found[lane.arm, lane.seed] = load_run(lane.run_id)
            except (RunNotFoundError, *UNREADABLE):
                continue
        return found

    def result(self) -> ComparisonResult:
        """Return what may be said of it, from what its runs have recorded."""
        return self.standings().result()

    def standings(self) -> Standings:
        """Return how its arms stood at the end, or stand."""
        kept, runs = self.kept, self.runs
        measure = (
            None if kept.metric is None else Measure(kept.metric, kept.window, kept.higher, kept.planned)
        )
        tracks = [track_of(lane, runs.get((lane.arm, lane.seed)), measure) for lane in kept.lanes]
        return Standings(
            kept.name or kept.comparison_id,
            measure,
            kept.arms,
            tracks,
            self.state,
            kept.baseline,
            kept.given_up,
            kept.parents,
            kept.reason,
        )

    def table(self) -> Table:
        """Return one row for each arm; see `ComparisonResult.table`."""
        return self.result().table()

    def plot(self, axes: Any = None) -> Any:
        """Draw its curves; see `ComparisonResult.plot`."""
        return self.result().plot(axes)

    def __repr__(self) -> str:
        named = f" {visible(self.name)!r}" if self.name else ""
        size = f"{len(self.kept.arms)} arms, {len(self.kept.lanes)} runs"
        return f"<ComparisonRecord {self.comparison_id}{named} {self.state}, {size}>"

    def _repr_mimebundle_(self, **_: Any) -> Any:
        return widgets.comparison_bundle(self)

    def _mime_(self) -> tuple[str, str]:
        """Return what marimo shows."""
        return widgets.comparison_mime(self)

    def shown(self) -> Shown:
        """Return what chart and table show of it."""
        return shown_of(self.result(), self.comparison_id, active=False, steer=False, reason=self.kept.reason)

    def watch(self, watcher: Callable[[], None]) -> Callable[[], None]:
        """Nothing changes any more: there is nothing to call back for."""
        return lambda: None

    def freeze(self) -> None:
        """Put a picture and the table of it into the calling cell."""
        widgets.freeze_comparison(self)


def track_of(lane: KeptLane, run: RunRecord | None, measure: Measure | None) -> Track:
    """Return what is known of an arm with a seed: what was kept, and what its run has recorded."""
    track = Track(lane.arm, lane.seed, lane.run_id, lane.state, lane.done, lane.reason)
    if run is None:
        gone = lane.reason or ("its run is not in this home folder any more" if lane.run_id else None)
        return replace(track, reason=gone)
    if not RunStatus(lane.state if lane.state in list(RunStatus) else "RUNNING").ended:
        track = replace(track, state=str(run.state), done=run.steps_done, reason=run.reason)
    return measured(track, run.history, measure, lane.begun_at)


@checked
def load_comparison(comparison: str) -> ComparisonRecord:
    """Return a recorded comparison.

    Args:
        comparison: Its id, or its name: then the newest of that name.

    Raises:
        RunNotFoundError: There is none.

    Example:
        >>> tn.load_comparison("learning rates").to_csv("rates.csv")
    """
    everything = list_comparisons()
    for record in reversed(everything):
        if comparison in (record.comparison_id, record.name):
            return record
    known = [name for record in everything for name in (record.comparison_id, record.name) if name]
    raise RunNotFoundError(
        f"There is no comparison {as_given(comparison)} under {Home.of_environment().comparisons()}."
        f"{nearest(comparison, known)}"
    )


def list_comparisons() -> list[ComparisonRecord]:
    """Return the comparisons that are recorded in the home folder, oldest first; a notebook shows them as a table."""
    records = []
    for path in sorted(Home.of_environment().comparisons().glob("*.json")):
        try:
            kept = decode(json.loads(path.read_text(encoding="utf-8")), Kept)
        except (ValueError, ValidationError, TypeError, KeyError):
            continue
        records.append(ComparisonRecord(kept))
    return Listing(sorted(records, key=lambda record: record.kept.started_at), row_of)


def row_of(record: ComparisonRecord) -> Facts:
    """Return the columns of a comparison in a table of them."""
    return {
        "comparison": record.comparison_id,
        "name": record.name,
        "state": record.state,
        "metric": record.kept.metric,
        "arms": ", ".join(record.kept.arms),
        "seeds": len({lane.seed for lane in record.kept.lanes}),
        "started_at": record.kept.started_at,
    }
