"""What is kept of a comparison: its arms, its seeds and its runs. What these have measured is in their own logs."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tensafe_nb import widgets
from tensafe_nb.checks import checked
from tensafe_nb.comparing.arms import Arm
from tensafe_nb.comparing.racing import Left, measured
from tensafe_nb.comparing.results import ComparisonResult, Measure, Standings, Track, plain
from tensafe_nb.comparing.showing import shown_of
from tensafe_nb.display import Facts, Listing, as_given, visible
from tensafe_nb.errors import RunNotFoundError, ValidationError, nearest
from tensafe_nb.history.log import UNREADABLE
from tensafe_nb.history.table import Table, Tabular
from tensafe_nb.locks import is_being_written
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
        earlier: The runs that it goes on with, each with the client's step up to which.
    """

    arm: str
    seed: int
    run_id: str | None
    state: str
    done: int
    reason: str | None
    begun_at: int
    earlier: tuple[tuple[str, int], ...] = ()


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
        steps: After how many runs were to be stopped, if that was asked.
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
    steps: int | None = None

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
        lock = lock_of(self.comparison_id)
        return self.kept.state if lock.exists() and is_being_written(lock) else "INTERRUPTED"

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

    @property
    def measure(self) -> Measure | None:
        """What is compared; None before anything was measured."""
        kept = self.kept
        return None if kept.metric is None else Measure(kept.metric, kept.window, kept.higher, kept.planned)

    def result(self) -> ComparisonResult:
        """Return what may be said of it, from what its runs have recorded."""
        return self.standings().result()

    def standings(self) -> Standings:
        """Return how its arms stood at the end, or stand."""
        kept, runs = self.kept, self.runs
        measure = self.measure
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

    @checked
    def save_page(self, to: str | Path, title: str | None = None) -> Path:
        """Save its chart, table and words as one HTML file; see `Comparison.save_page`."""
        page: Path = widgets.save_comparison(self, to, title)
        return page


def track_of(lane: KeptLane, run: RunRecord | None, measure: Measure | None) -> Track:
    """Return what is known of an arm with a seed: what was kept, and what its run has recorded."""
    track = Track(lane.arm, lane.seed, lane.run_id, lane.state, lane.done, lane.reason)
    if run is None:
        gone = lane.reason or ("its run is not in this home folder any more" if lane.run_id else None)
        return replace(track, reason=gone)
    if not RunStatus(lane.state if lane.state in list(RunStatus) else "RUNNING").ended:
        track = replace(track, state=str(run.state), done=run.steps_done, reason=run.reason)
    left = left_by(track, lane.earlier, measure, lane.begun_at) if lane.earlier else None
    return measured(track, run.history, measure, lane.begun_at, left)


def left_by(track: Track, runs: tuple[tuple[str, int], ...], measure: Measure | None, begun_at: int) -> Left:
    """Return what runs have measured that were gone on with, each up to a step of its client.

    Raises:
        RunNotFoundError: One of them is not in this home folder any more.
    """
    found, before = replace(track, steps=track.steps[:0], values=track.values[:0]), None
    for number, (run_id, step) in enumerate(runs, 1):
        found = measured(found, load_run(run_id).history, measure, begun_at, before)
        known = found.steps <= step - begun_at
        found = replace(found, steps=found.steps[known], values=found.values[known])
        before = Left(found, begun_at, runs[:number])
    return Left(found, begun_at, runs)


def what_is_left(
    record: ComparisonRecord, arms: Sequence[Arm], seeds: Sequence[int]
) -> dict[tuple[str, int], Left]:
    """Return what a comparison that ended in the middle has left: by arm and seed, without those that begin anew.

    What had ended as planned, or was given up, stays as it is. What can go on from a checkpoint does.

    Raises:
        ValidationError: It has not ended or is complete, other arms or seeds are given, or what is private would begin
            anew.
    """
    kept, known = record.kept, f"The comparison {record.kept.name or record.comparison_id}"
    if record.state in ("RUNNING", "PAUSED"):
        raise ValidationError(f"{known} is still under way: stop() it first.")
    if kept.parents:
        raise ValidationError(
            f"{known} cannot be gone on with: the arm {as_given(next(iter(kept.parents)))} was forked in mid-race, and "
            f"where from is not known any more. What stood is in load_comparison({as_given(record.comparison_id)})."
        )
    was = {arm: dict(varied) for arm, varied in kept.arms.items()}
    given = {arm.name: {name: plain(value) for name, value in arm.varied.items()} for arm in arms}
    if was != given or list(dict.fromkeys(lane.seed for lane in kept.lanes)) != list(seeds):
        seeds_then = ", ".join(str(seed) for seed in dict.fromkeys(lane.seed for lane in kept.lanes))
        raise ValidationError(
            f"{known} had the arms {', '.join(was)} and the seeds {seeds_then}: go on with just these, or compare anew."
        )
    standings, runs, ideas = record.standings(), record.runs, {arm.name: arm.idea for arm in arms}
    left: dict[tuple[str, int], Left] = {}
    for lane, track in zip(kept.lanes, standings.tracks, strict=True):
        key, run = (lane.arm, lane.seed), runs.get((lane.arm, lane.seed))
        complete = kept.planned is not None and track.done >= kept.planned and not track.failed
        if track.state == RunStatus.FINISHED or complete or lane.arm in kept.given_up:
            left[key] = Left(track, lane.begun_at, lane.earlier)
        elif run is not None and run.last_checkpoint is not None and ideas[lane.arm].resumes:
            step = run.history.state.checkpoints[run.last_checkpoint].step
            earlier = (*lane.earlier, (run.run_id, step))
            at = replace(track, state="waiting", done=step - lane.begun_at, run_id=None, reason=None)
            found = left_by(at, earlier, record.measure, lane.begun_at)
            left[key] = replace(found, checkpoint=run.last_checkpoint)
        elif track.epsilon:
            raise ValidationError(
                f"{known} cannot be gone on with: {lane.arm}, seed {lane.seed}, is a private training without a "
                f"checkpoint, and begun anew its ε would not count what it has spent already. Compare anew, and add "
                f"that; checkpoint_every saves as a run goes."
            )
    if len(left) == len(kept.lanes) and all(one.checkpoint is None for one in left.values()):
        raise ValidationError(
            f"{known} is complete: load_comparison({as_given(record.comparison_id)}) has it."
        )
    return left


def lock_of(comparison_id: str) -> Path:
    """Return the file whose lock tells that a comparison is under way."""
    return Home.of_environment().comparisons() / f"{comparison_id}.lock"


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
