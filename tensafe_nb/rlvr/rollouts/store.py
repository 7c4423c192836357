"""The rollouts of a run, beside its event log: one file per step, and never more of them than fit a limit."""

from collections import deque
from pathlib import Path

from tensafe_nb.errors import StorageError, ValidationError
from tensafe_nb.rlvr.rollouts.trajectories import TrajectoryBatch

HELD_OUT = "held-out"  # how the files of answers to held-out prompts begin
LIMIT = 100_000_000  # bytes of rollouts that a run keeps


class RolloutStore:
    """Keeps the rollouts of a run, the newest ones; `TrajectoryBatch.load` reads the files.

    Args:
        run_id: Whose rollouts they are.
        beside: The folder of its training client's log; the files lie in `rollouts/<number of the run>`.
        limit: Bytes. Once there are more, the oldest files go; that of the last step always stays.
    """

    def __init__(self, run_id: str, beside: Path, limit: int = LIMIT) -> None:
        self.folder = beside / "rollouts" / run_id.rpartition("/")[2]
        self._run_id, self._limit = run_id, limit
        self._kept: deque[tuple[int, Path, int]] = deque()  # step, file, bytes; oldest first

    def add(self, step: int, batch: TrajectoryBatch, *, held_out: bool = False) -> Path:
        """Write the rollouts of a step, or its answers to the held-out prompts.

        Raises:
            StorageError: They could not be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StorageError(
                f"The folder {self.folder} for rollouts could not be made ({error.strerror}). "
                f"Set TENSAFE_HOME to a folder that can be written."
            ) from error
        path = batch.save(self.free_name(f"{HELD_OUT if held_out else 'step'}-{step:06d}"))
        self._kept.append((step, path, path.stat().st_size))
        while len(self._kept) > 1 and sum(size for *_, size in self._kept) > self._limit:
            _, oldest, _ = self._kept.popleft()
            oldest.unlink(missing_ok=True)
        return path

    def last(self, steps: int) -> list[tuple[int, TrajectoryBatch]]:
        """Return (step, rollouts) of the last so many steps, oldest first.

        Raises:
            ValidationError: Not a number of steps, or there are no rollouts yet.
        """
        if not isinstance(steps, int) or steps < 1:
            raise ValidationError(f"last={steps!r} must be a whole number of steps, at least 1.")
        kept = [(step, path) for step, path, _ in self._kept if not path.name.startswith(HELD_OUT)]
        if not kept:
            raise ValidationError(f"The run {self._run_id} has no rollouts yet: let it take a step.")
        return [(step, TrajectoryBatch.load(path)) for step, path in kept[-steps:]]

    def free_name(self, name: str) -> Path:
        """Return a new path: a step that is taken again after a rollback has a second file."""
        number = 1
        while (path := self.folder / (f"{name}.jsonl" if number == 1 else f"{name}-{number}.jsonl")).exists():
            number += 1
        return path
