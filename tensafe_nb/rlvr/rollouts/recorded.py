"""The rollouts of a run as its files keep them, and as a table: one row for each."""

from collections.abc import Iterator, Mapping
from typing import Any

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.history.measured import KeptRollouts
from tensafe_nb.history.table import Table, Tabular
from tensafe_nb.rlvr.rollouts.trajectories import TrajectoryBatch


class RunRollouts(Tabular, Mapping[int, TrajectoryBatch]):
    """The rollouts of a run by step: read when they are asked for. Of a long run, the oldest are no longer there.

    Args:
        kept: Where they lie.
        operator_view: Whether they answer private prompts.

    Example:
        >>> run.rollouts()[3].mean_reward
        >>> run.rollouts(last=5).to_pandas()
    """

    def __init__(self, kept: list[KeptRollouts], operator_view: bool) -> None:
        self._kept = [found for found in kept if found.path.exists()]
        self._paths = {found.step: found.path for found in self._kept if not found.abandoned}
        self._operator_view = operator_view

    def __getitem__(self, step: int) -> TrajectoryBatch:
        if step not in self._paths:
            known = f"{min(self._paths)} to {max(self._paths)}" if self._paths else "none"
            raise ValidationError(f"There are no rollouts of step {as_given(step)}. Kept: {known}.")
        batch = TrajectoryBatch.load(self._paths[step])
        batch.operator_view |= self._operator_view  # of version 0.1, files do not say it
        return batch

    def __iter__(self) -> Iterator[int]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, step: object) -> bool:
        return step in self._paths

    def __repr__(self) -> str:
        return f"<RunRollouts of {len(self)} steps>"

    def table(self) -> Table:
        """Return one row for each rollout: whose step it is, what was asked and answered, how it scored and taught.

        `rewards/NAME` is what a part of the reward gave, `advantage` the mean over tokens where each has its own; what
        was not scored has no reward, never 0.
        """
        marked = any(found.abandoned for found in self._kept)
        rows: list[dict[str, Any]] = []
        for found in self._kept:
            place = {"run": found.run, "step": found.step} | (
                {"abandoned": found.abandoned} if marked else {}
            )
            rows += [place | row for row in TrajectoryBatch.load(found.path).flat_rows()]
        return Table.of_rows(rows, self._operator_view)
