"""The row of numbers that each step leaves: what was sampled, how it scored, what the update did.

A name stands for one quantity everywhere. What a step did not measure is NaN here and absent from its row.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np

from tensafe_nb.protocol.batch import Array
from tensafe_nb.rlvr.algorithms.packing import entropy_of
from tensafe_nb.rlvr.algorithms.result import UpdateResult
from tensafe_nb.rlvr.rollouts.choosing import PromptRecord
from tensafe_nb.rlvr.rollouts.trajectories import GOOD, RolloutGroup, Trajectory, TrajectoryBatch, mean

Signal: TypeAlias = Literal["mixed", "all_good", "all_bad"]
KINDS: tuple[Signal, ...] = get_args(Signal)
Row: TypeAlias = dict[str, float]

BY_OPTIM_STEP = ("loss", "grad_norm", "param_delta_norm")  # curves that the core itself writes at every step


@dataclass(frozen=True, slots=True)
class Goal:
    """When an answer is right: the part marked `true=True`, or the reward where no part is, reaches a threshold.

    A sum of parts is no measure of that: 0.6 for the form passes a wrong answer, 0.4 for the right one fails it.

    Attributes:
        true: Name of the part; None for the reward itself.
        threshold: What it has to reach.
    """

    true: str | None = None
    threshold: float = GOOD

    def scores(self, rollouts: Sequence[Trajectory]) -> Array:
        """Return what decides, for each rollout; NaN where it was not scored."""
        if self.true is None:
            found = [rollout.reward for rollout in rollouts]
        else:
            found = [(rollout.reward_parts or {}).get(self.true) for rollout in rollouts]
        return np.array([math.nan if value is None else value for value in found], dtype=np.float64)


def signal_of(group: RolloutGroup, goal: Goal | None = None) -> Signal | None:
    """Return whether a group's rewards differ, or whether all are good or bad; None with nothing scored."""
    goal = goal or Goal()
    if group.has_signal:
        return "mixed"
    if math.isnan(group.mean):
        return None
    scores = goal.scores(group.rollouts)
    usual = mean(scores[np.isfinite(scores)])
    return "all_good" if (group.mean if math.isnan(usual) else usual) >= goal.threshold else "all_bad"


def rollout_metrics(batch: TrajectoryBatch, goal: Goal | None = None) -> Row:
    """Return what a scored batch says about rewards, signal, lengths and entropy."""
    logprobs = np.array([logprob for t in batch for logprob in t.sampled_logprobs])
    entropy = {"entropy": _or_nan(entropy_of(batch)), "entropy_sampled": -mean(logprobs)}
    return reward_metrics(batch, goal) | length_metrics(batch) | entropy


def reward_metrics(batch: TrajectoryBatch, goal: Goal | None) -> Row:
    """Return how high rewards are, and how they differ: over the batch, and within the groups."""
    spread = batch.reward_std_by_group
    signals = [signal for group in batch.groups if (signal := signal_of(group, goal)) is not None]
    return {
        "reward": batch.mean_reward,
        "reward_std": batch.std_reward,
        "group/reward_std": mean(spread[np.isfinite(spread)]),
        "frac_reward_zero_std": batch.frac_zero_signal,
        **{f"by_group/frac_{kind}": mean(np.array([s == kind for s in signals], float)) for kind in KINDS},
    }


def choice_metrics(
    record: PromptRecord, sampled: Sequence[RolloutGroup], thrown_away: int, rounds: int | None
) -> Row:
    """Return what is known of the prompts, and what was sampled and thrown away, where a policy does that.

    Args:
        record: The prompts.
        sampled: All groups of the step, those that were thrown away too.
        thrown_away: How many were.
        rounds: In which they were replaced; None where none ever is.
    """
    rates = record.solve_rate
    row = {"prompts/seen": mean(record.times > 0), "prompts/solve_rate": mean(rates[np.isfinite(rates)])}
    if rounds is None:
        return row
    rewards = np.concatenate([group.rewards for group in sampled])
    return row | {
        "resample/groups": float(thrown_away),
        "resample/rounds": float(rounds),
        "resample/reward": mean(rewards[np.isfinite(rewards)]),
    }


def length_metrics(batch: TrajectoryBatch) -> Row:
    """Return how long completions are, in tokens, and how many were cut."""
    lengths = batch.lengths
    ended = lengths[[not trajectory.truncated for trajectory in batch]]
    return {
        "completions/mean_length": mean(lengths),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/mean_terminated_length": mean(ended),
        "completions/clipped_ratio": batch.clipped_ratio,
    }


def update_metrics(update: UpdateResult) -> Row:
    """Return what an update did; where no step was taken, nothing but that no weight moved."""
    row = {
        "policy_version": float(update.policy_version),
        "grad_norm": update.grad_norm,
        "param_delta_norm": update.param_delta_norm,
        **update.metrics,
    }
    if update.skipped:
        return row
    return row | {
        "loss": update.policy_loss,
        "kl": _or_nan(update.kl),
        "policy/approx_kl": update.approx_kl,
    }


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def known(row: Mapping[str, float], without: Sequence[str] = ()) -> Row:
    """Return what was measured: the numbers of a row that are not NaN."""
    return {
        name: float(value) for name, value in row.items() if not math.isnan(value) and name not in without
    }
