"""The runs of a home folder: found by name, tags, model, state and age, and taken along as a table or one figure."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any, SupportsIndex, TypeAlias

from tensafe_nb.checks import checked
from tensafe_nb.display import Listing, as_given
from tensafe_nb.errors import ValidationError, nearest
from tensafe_nb.history.figures import Band, draw
from tensafe_nb.history.log import UNREADABLE
from tensafe_nb.history.measured import Axis, Measured, Names, Reading
from tensafe_nb.history.table import Table, Tabular
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.runs.description import entry, flattened
from tensafe_nb.runs.record import RunRecord, load_run, records_of, row_of
from tensafe_nb.runs.run import TrainingRun
from tensafe_nb.store.home import Home

logger = logging.getLogger(__name__)

Run: TypeAlias = TrainingRun | RunRecord
GLOB = frozenset("*?[")
LATEST = 253402300800  # Unix seconds of the year 10000, where dates end


class RunList(Listing[RunRecord], Tabular):
    """Runs, oldest first: a list, a table in a notebook, a CSV file, a frame, a figure.

    Example:
        >>> tn.list_runs(tags="sweep").plot("eval/loss", by="learning_rate").savefig("sweep.png")
    """

    def __init__(self, runs: Iterable[RunRecord]) -> None:
        super().__init__(runs, row_of)

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        found = super().__getitem__(index)
        return RunList(found) if isinstance(found, list) else found

    def table(self) -> Table:
        """Return one row for each run: how it stands, its latest metrics, and its configuration, entry by entry."""
        readings = [run.reading() for run in self]
        rows = [table_row(run, reading) for run, reading in zip(self, readings, strict=True)]
        return Table.of_rows(rows, operator_view=any(reading.private for reading in readings))

    def plot(
        self,
        names: Names | None = None,
        *,
        by: str | Callable[[Run], object] | None = None,
        x: Axis = "step",
        smoothing: float | None = None,
        log: bool = False,
        band: Band = "std",
        axes: Any = None,
    ) -> Any:
        """Draw them in one figure; see `plot_runs`."""
        return plot_runs(self, names, by=by, x=x, smoothing=smoothing, log=log, band=band, axes=axes)


@checked
def list_runs(
    *,
    name: str | None = None,
    tags: str | Sequence[str] = (),
    model: str | None = None,
    state: str | None = None,
    since: str | datetime | timedelta | float | None = None,
) -> RunList:
    """Return the runs that are recorded in the home folder, oldest first: a list, which a notebook shows as a table.

    Args:
        name: What they are called; `*` and `?` stand for any characters: "lr *".
        tags: Words that they must all have.
        model: What was trained: a model reference, `*` and `?` as in names.
        state: "FINISHED", "FAILED", "INTERRUPTED" or another of `RunStatus`, in capitals or not.
        since: When they began, at the earliest: a date ("2026-11-30"), a datetime, Unix seconds, or a timedelta for so
            long ago.

    Raises:
        ValidationError: A state that there is not, a date that cannot be read, or a name, tag or model that no run has
            and that is nearly that of one.

    Example:
        >>> tn.list_runs(name="lr *", tags=["sweep"], state="finished")
    """
    wanted = None if state is None else state_of(state)
    begun = None if since is None else seconds_of(since)
    words = [tags] if isinstance(tags, str) else list(tags)
    everything = all_runs()
    named = [run for run in everything if name is None or fnmatchcase(run.name or "", name)]
    of_model = [run for run in named if model is None or fnmatchcase(run.model, model)]
    found = [run for run in of_model if set(words) <= set(run.tags)]
    if not found:
        for what, given, known in (
            ("name", [name] if name else [], {run.name for run in everything if run.name}),
            ("model", [model] if model else [], {run.model for run in everything}),
            ("tag", words, {tag for run in everything for tag in run.tags}),
        ):
            refuse_misspelt(what, given, known)
    return RunList(
        run
        for run in found
        if (wanted is None or run.state is wanted) and (begun is None or run.started_at >= begun)
    )


def all_runs() -> list[RunRecord]:
    """Return every run recorded in the home folder, oldest first; a log that cannot be read is left out, and named."""
    records = []
    for log in Home.of_environment().event_logs():
        try:
            records += records_of(log)
        except UNREADABLE as error:
            logger.warning("the log %s cannot be read and is left out: %s", log, error)
    return sorted(records, key=lambda record: record.started_at)


def state_of(given: str) -> RunStatus:
    """Return the state that a text means.

    Raises:
        ValidationError: There is none; says the nearest.
    """
    if given.upper() not in list(RunStatus):
        raise ValidationError(
            f"list_runs: there is no state {as_given(given)}.{nearest(given.upper(), map(str, RunStatus))}"
        )
    return RunStatus(given.upper())


def seconds_of(since: object) -> float:
    """Return a moment in Unix seconds.

    Raises:
        ValidationError: It cannot be read as one.
    """
    if isinstance(since, timedelta):
        return (datetime.now() - since).timestamp()
    if isinstance(since, str):
        try:
            return datetime.fromisoformat(since).timestamp()
        except ValueError as error:
            raise ValidationError(
                f"list_runs: since={as_given(since)} is no date: write it as 2026-11-30 or 2026-11-30T12:00."
            ) from error
    if isinstance(since, datetime):
        return since.timestamp()
    if isinstance(since, int | float) and not isinstance(since, bool) and abs(since) < LATEST:
        return float(since)
    raise ValidationError(
        f"list_runs: since={as_given(since)} must be a date, a datetime, Unix seconds or a timedelta."
    )


def refuse_misspelt(what: str, given: Iterable[str], known: set[str]) -> None:
    """Refuse what no run has and what is nearly what one has: nobody means to find nothing.

    Raises:
        ValidationError: With the nearest.
    """
    for text in given:
        hint = "" if text in known or GLOB & set(text) else nearest(text, known)
        if "Did you mean" in hint:
            raise ValidationError(f"list_runs: no run has the {what} {as_given(text)}.{hint}")


def table_row(record: RunRecord, reading: Reading) -> dict[str, Any]:
    """Return all that is known of a run, for a table to take along."""
    facts = {name: value for name, value in row_of(record).items() if name != "started_at"}
    facts["state"] = str(record.state)
    facts["started_at"] = datetime.fromtimestamp(record.started_at).astimezone()
    return {**facts, **reading.latest(), **flattened(record.config)}


@checked
def plot_runs(
    runs: Any,
    names: Names | None = None,
    *,
    by: str | Callable[[Run], object] | None = None,
    x: Axis = "step",
    smoothing: float | None = None,
    log: bool = False,
    band: Band = "std",
    axes: Any = None,
) -> Any:
    """Draw several runs in one figure, and return the matplotlib figure.

    Runs of one label are one line: their mean at each step, in a band that says how far they lie apart, as for the
    seeds of an experiment. Without `by`, runs of one name are such runs, and a run without a name is its own line.

    Args:
        runs: Runs, records, ids or training clients; or a dict of them, or of lists of them, by label.
        names: As for `run.plot`.
        by: What labels them: an entry of their configuration ("learning_rate", "training.optimizer.learning_rate"),
            "name", "model", or a function of a run.
        x: Over steps, tokens trained on, or seconds.
        smoothing: As for `run.plot`; bands are of values as they were measured, unless it is given.
        log: Values on a logarithmic scale.
        band: Around the mean: "std" (n − 1), "sem" for its standard error, or "range" from the least to the greatest.
        axes: Your own axes to draw into.

    Raises:
        ValidationError: Nothing to draw, an unknown metric or entry, with the nearest.
        RunNotFoundError: An id of no run.

    Example:
        >>> tn.plot_runs(tn.list_runs(name="lr *"), "eval/loss", by="learning_rate", band="range")
    """
    if isinstance(runs, Mapping):
        given = {str(label): _each(group) for label, group in runs.items()}
    else:
        given = {}
        for run in _each(runs):
            given.setdefault(label_of(run, by), []).append(run)
    lines: dict[str, list[Reading]] = {
        label: [run.reading() for run in group] for label, group in given.items()
    }
    return draw(lines, names, x=x, smoothing=smoothing, log=log, band=band, axes=axes)


def _each(runs: Any) -> list[Measured]:
    """Return what was given as a list of what can be drawn."""
    several = runs if isinstance(runs, Sequence) and not isinstance(runs, str) else [runs]
    found = []
    for run in several:
        loaded = load_run(run) if isinstance(run, str) else run
        drawable = loaded if isinstance(loaded, Measured) else getattr(loaded, "history", None)
        if not isinstance(drawable, Measured):
            raise ValidationError(
                f"plot_runs takes runs, records, ids of runs or training clients, not {as_given(run)}."
            )
        found.append(drawable)
    return found


def label_of(run: Measured, by: str | Callable[[Run], object] | None) -> str:
    """Return the label of a run: its name, an entry of its configuration, or what a function says of it.

    Raises:
        ValidationError: An entry that its configuration does not have; says the nearest.
    """
    if not isinstance(run, TrainingRun | RunRecord):
        return run.reading().label
    if callable(by):
        try:
            return str(by(run))
        except Exception as error:  # the function is the user's: it may raise anything
            raise ValidationError(
                f"plot_runs: by={as_given(by)} failed at the run {run.run_id}: {type(error).__name__}: {error}"
            ) from error
    if by in (None, "name"):
        return run.name or run.run_id
    assert isinstance(by, str)
    config = run.config
    known = {**flattened(config), "model": config["training"]["model_ref"]}
    path = by if by in known else entry(config, by)
    if path is None:
        short = {name.rpartition(".")[2] for name in known}
        raise ValidationError(f"{run.run_id} has no entry {as_given(by)} in its config.{nearest(by, short)}")
    return f"{by.rpartition('.')[2]}={known[path]}"
