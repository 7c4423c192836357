"""Stored rollouts under another reward: nothing is sampled, nothing is trained."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensafe_nb.checks import checked
from tensafe_nb.protocol.batch import Array
from tensafe_nb.rlvr.algorithms.advantages import centre
from tensafe_nb.rlvr.environments.replay import scorer_of
from tensafe_nb.rlvr.rollouts.trajectories import NO_SIGNAL, RolloutGroup, TrajectoryBatch, mean
from tensafe_nb.rlvr.scoring.scorer import unscored


@dataclass(frozen=True, slots=True, repr=False)
class Rescored:
    """Stored rollouts with the rewards they had, and with those of another function.

    Attributes:
        steps: Which steps they are from.
        before: With the rewards they were trained on.
        after: The same rollouts in the same order, with the new rewards.
    """

    steps: tuple[int, ...]
    before: TrajectoryBatch
    after: TrajectoryBatch

    @property
    def gained_signal(self) -> float:
        """Share of the groups that taught nothing and now would."""
        return self._share_of_groups(lambda old, new: new.has_signal and not old.has_signal)

    @property
    def lost_signal(self) -> float:
        """Share of the groups that taught something and no longer would."""
        return self._share_of_groups(lambda old, new: old.has_signal and not new.has_signal)

    @property
    def rank_flips(self) -> float:
        """Share of the pairs within groups, ranked by both rewards, that now stand the other way round."""
        signs = [_orders(old.rewards) * _orders(new.rewards) for old, new in self._groups()]
        ranked = np.concatenate([sign[np.isfinite(sign) & (sign != 0)] for sign in signs])
        return mean(ranked < 0)

    @property
    def errors(self) -> int:
        """Rollouts on which the new function failed; `after` says why, in `reward_error`."""
        return sum(trajectory.reward_error is not None for trajectory in self.after)

    @property
    def advantages(self) -> Array:
        """(N, 2) old and new rewards, each against the mean of its group: what would push a rollout up or down."""
        groups = np.repeat(np.arange(len(self.before.groups)), [len(g.rollouts) for g in self.before.groups])
        return np.stack([centre(batch.rewards, groups) for batch in (self.before, self.after)], axis=1)

    def __repr__(self) -> str:
        old, new, flips = self.before, self.after, "no pair that both of them rank"
        if not math.isnan(self.rank_flips):
            flips = f"{self.rank_flips:.0%} of pairs change places"
        return (
            f"<Rescored {len(new)} rollouts of {len(self.steps)} steps: mean reward {old.mean_reward:.3f} → "
            f"{new.mean_reward:.3f}, groups with signal {1 - old.frac_zero_signal:.0%} → "
            f"{1 - new.frac_zero_signal:.0%} ({self.gained_signal:.0%} gain it), {flips}, {self.errors} errors>"
        )

    def _groups(self) -> list[tuple[RolloutGroup, RolloutGroup]]:
        return list(zip(self.before.groups, self.after.groups, strict=True))

    def _share_of_groups(self, which: Any) -> float:
        return mean(np.array([which(old, new) for old, new in self._groups()], dtype=float))


@checked
def rescore(
    batch: TrajectoryBatch,
    reward: Any,
    *,
    timeout: float | None = 5.0,
    processes: int | None = None,
    cluster: Any = None,
) -> TrajectoryBatch:
    """Return a copy of a batch with the rewards that another function gives; nothing is sampled again.

    An environment is played over what was said: see `Replayer`.

    Args:
        batch: Stays as it is.
        reward: What scores: a name, a function, a resolved reward, or an environment.
        timeout: Seconds a call may take; None calls everything here, without a limit.
        processes: In which it is called, as for `Scorer`.
        cluster: Where these are, as for `Scorer`.
    """
    copy = unscored(batch)
    with scorer_of(reward, timeout, processes, cluster) as scorer:
        scorer.score(copy)
    return copy


def rescore_steps(
    stored: Sequence[tuple[int, TrajectoryBatch]],
    reward: Any,
    timeout: float | None,
    processes: int | None = None,
    cluster: Any = None,
) -> Rescored:
    """Score the stored rollouts of some steps anew.

    Args:
        stored: (step, rollouts), as a `RolloutStore` returns them.
        reward: What scores: a name, a function, or a resolved reward.
        timeout: Seconds a call may take.
        processes: In which it is called, as for `Scorer`.
        cluster: Where these are, as for `Scorer`.
    """
    before = TrajectoryBatch([group for _, batch in stored for group in batch.groups], stored[-1][1].sampling)
    after = rescore(before, reward, timeout=timeout, processes=processes, cluster=cluster)
    return Rescored(tuple(step for step, _ in stored), before, after)


def _orders(rewards: Array) -> Array:
    """Return, for each pair of rollouts, 1 or −1 as the first has more or less; 0 if equal, NaN if unscored."""
    first, second = np.triu_indices(rewards.size, 1)  # (G (G − 1) / 2,) each
    difference = rewards[first] - rewards[second]
    # 0 times NaN stays NaN: a pair that was not scored is not a tie.
    return np.where(np.abs(difference) <= NO_SIGNAL, 0.0 * difference, np.sign(difference))
