"""The difference of two runs: what they were started with, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tensafe_nb.checks import checked
from tensafe_nb.display import as_given, listing, short
from tensafe_nb.errors import ValidationError
from tensafe_nb.history.table import Table, Tabular
from tensafe_nb.runs.description import flattened
from tensafe_nb.runs.record import RunRecord, load_run
from tensafe_nb.runs.run import TrainingRun


@dataclass(frozen=True, slots=True, repr=False)
class RunDiff(Tabular):
    """What differs between two runs; nothing else is told.

    Attributes:
        runs: How the two are called.
        config: By the path of the entry: its value in each, None where a run has none.
        metrics: By name: the latest value that each measured.
    """

    runs: tuple[str, str]
    config: Mapping[str, tuple[Any, Any]]
    metrics: Mapping[str, tuple[float | None, float | None]]

    def __bool__(self) -> bool:
        return bool(self.config or self.metrics)

    def table(self) -> Table:
        """Return one row for each difference."""
        return Table.of_rows(
            [
                {"what": what, "entry": name, self.runs[0]: one, self.runs[1]: other}
                for what, differences in (("config", self.config), ("metric", self.metrics))
                for name, (one, other) in differences.items()
            ]
        )

    def __repr__(self) -> str:
        rows = [[short(cell) for cell in row] for row in self.table().rows()]
        if not rows:
            return f"<RunDiff of {self.runs[0]} and {self.runs[1]}: nothing differs>"
        head = ["", "", *self.runs]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in [head, *rows]
        ]
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        one, other = self.runs
        rows = [
            {"": what, "entry": name, one: first, other: second}
            for what, name, first, second in self.table().rows()
        ]
        return listing(f"{len(rows)} differences" if rows else "nothing differs", rows)


@checked
def diff_runs(one: str | TrainingRun | RunRecord, other: str | TrainingRun | RunRecord) -> RunDiff:
    """Return what differs between two runs: entries of their configurations, and the metrics they measured last.

    Args:
        one: A run, its record, or its id.
        other: Another.

    Raises:
        RunNotFoundError: An id of no run.

    Example:
        >>> print(tn.diff_runs(first, second))
    """
    pair = [load_run(run) if isinstance(run, str) else run for run in (one, other)]
    first, second = pair
    if first.run_id == second.run_id:
        raise ValidationError(f"diff_runs: both are the run {as_given(first.run_id)}; give two.")
    configs = [flattened(run.config) for run in pair]
    metrics = [run.final_metrics() for run in pair]
    names = (first.name or first.run_id, second.name or second.run_id)
    if names[0] == names[1]:
        names = (first.run_id, second.run_id)
    return RunDiff(names, _differences(*configs), _differences(*metrics))


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (one.get(name), other.get(name))
        for name in sorted(one.keys() | other.keys())
        if repr(one.get(name)) != repr(other.get(name))  # NaN is not equal to itself
    }
