"""Retention: when a run saves by itself, and which of its own checkpoints it deletes again."""

import re
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.futures import FutureHandle
from tensafe_nb.history.log import RunHistory
from tensafe_nb.protocol.results import SaveStateResult

SMALLER_IS_BETTER = {"loss", "perplexity", "error", "errors", "kl"}  # as a word of a metric's name


class Known(NamedTuple):
    """The score of a checkpoint, and the version of the reward that gave it, if one did."""

    score: float
    reward: float | None


class Checkpoints:
    """The rules by which a run saves by itself, and deletes again. Checkpoints a user asked for are never deleted.

    Args:
        every: Steps between checkpoints; None saves none.
        keep_last: How many of the newest to keep; None keeps all, unless `keep_best` is given.
        keep_best: A metric; the checkpoint with its best value is kept besides the newest. Metrics named after a
            loss, an error, a perplexity or a KL divergence are better when small, all others when large. Where the
            reward of a run was replaced, the best is that since then: scores of two rewards cannot be compared.

    Raises:
        ValidationError: A number below 1, or something to keep while nothing is saved.
    """

    def __init__(
        self, every: int | None = None, keep_last: int | None = None, keep_best: str | None = None
    ) -> None:
        for name, value in (("checkpoint_every", every), ("keep_last", keep_last)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValidationError(f"{name}={as_given(value)} must be a whole number, at least 1.")
        if every is None and (keep_last is not None or keep_best is not None):
            raise ValidationError(
                "keep_last and keep_best need checkpoint_every: nothing is saved without it."
            )
        if keep_best is not None and not isinstance(keep_best, str):
            raise ValidationError(
                f"keep_best={as_given(keep_best)} must be the name of a metric, such as 'eval/loss'."
            )
        self._every, self._keep_last, self._keep_best = every, keep_last, keep_best
        self._saving: deque[tuple[FutureHandle[SaveStateResult], Known | None]] = deque()
        self._kept: list[tuple[str, Known]] = []  # scores are signed: what is good is large
        self._last_index = 0

    def due(self, index: int, planned: int | None) -> bool:
        """Whether to save after step number `index` (1, 2, 3 …)."""
        if self._every is None or (index % self._every and index != planned):
            return False
        self._last_index = index
        return True

    def missing(self, index: int) -> bool:
        """Whether the last step, which nobody knew to be the last, is still to be saved."""
        return self._every is not None and index > self._last_index

    def add(self, handle: FutureHandle[SaveStateResult], history: RunHistory, *, measured: bool) -> None:
        """Take note of a checkpoint under way; `measured` says that the metrics of its step are there already."""
        self._saving.append((handle, self._score_now(history) if measured else None))

    def settled(self, wait: bool) -> Iterator[tuple[SaveStateResult, Known | None]]:
        """Yield the checkpoints that have been written since, with their metric; wait for the rest if asked to."""
        while self._saving and (wait or self._saving[0][0].done()):
            handle, known = self._saving.popleft()
            yield handle.result(), known

    def keep(self, saved: SaveStateResult, known: Known | None, history: RunHistory) -> list[str]:
        """Count in a checkpoint; return the ids of those that are no longer needed."""
        known = Known(self._score_at(saved.step, history), None) if known is None else known
        self._kept.append((saved.artifact_id, known))
        if self._keep_last is None and self._keep_best is None:
            return []
        newest = {artifact_id for artifact_id, _ in self._kept[-(self._keep_last or 1) :]}
        if self._keep_best is not None:
            # Scores of two rewards cannot be compared: the best is that since the present one.
            comparable = [kept for kept in self._kept if kept[1].reward == known.reward]
            newest.add(max(comparable, key=lambda kept: kept[1].score)[0])
        gone = [artifact_id for artifact_id, _ in self._kept if artifact_id not in newest]
        self._kept = [kept for kept in self._kept if kept[0] in newest]
        return gone

    def _score_now(self, history: RunHistory) -> "Known | None":
        """Return the metric as it was last measured; the worst there is where another reward scored then."""
        steps, values = history.series(self._keep_best or "")
        if not values.size:
            return None
        scored, rewards = history.series("reward_version")
        reward = float(rewards[-1]) if rewards.size else None
        by_another = scored[rewards != reward]  # steps
        stale = by_another.size and steps[-1] <= by_another[-1]
        return Known(-np.inf if stale else self._signed(float(values[-1])), reward)

    def _score_at(self, step: int, history: RunHistory) -> float:
        """Return what is to be large: the metric as it was last measured by that step."""
        if self._keep_best is None:
            return 0.0
        steps, values = history.series(self._keep_best)
        finite = np.isfinite(values)
        by_then: Any = values[finite & (steps <= step)]
        known = by_then if by_then.size else values[finite]  # nothing by then: what was measured since
        if not known.size:
            raise ValidationError(
                f"keep_best={as_given(self._keep_best)}: no such metric has been measured. "
                f"There are: {', '.join(history.names) or 'none'}."
            )
        return self._signed(float(known[-1]))

    def _signed(self, value: float) -> float:
        """Return a value that is large when the checkpoint is good."""
        if self._keep_best is None or not np.isfinite(value):
            return -np.inf
        return -value if small_is_good(self._keep_best) else value


def small_is_good(metric: str) -> bool:
    """Whether a metric is better when small: one that is named after a loss, an error, a perplexity or a KL."""
    return bool(SMALLER_IS_BETTER & set(re.split("[/_ ]", metric.lower())))


def checkpoint_of(step: int, history: RunHistory) -> str:
    """Return the id of the newest checkpoint of an optimiser step.

    Raises:
        ValidationError: There is none; says of which steps there are.
    """
    saved = {found.step: found.artifact_id for found in history.state.checkpoints.values()}
    if step not in saved:
        raise ValidationError(f"There is no checkpoint of step {step}; there are those of {sorted(saved)}.")
    return saved[step]
