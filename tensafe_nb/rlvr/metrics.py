"""The row of numbers that each step leaves: what was sampled, how it scored, what the update did.

A name stands for one quantity everywhere. What a step did not measure is NaN here and absent from its row.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np

from tensafe_nb.rlvr.rollouts import GOOD, RolloutGroup, TrajectoryBatch, mean
from tensafe_nb.rlvr.updates import UpdateResult

Signal: TypeAlias = Literal["mixed", "all_good", "all_bad"]
Row: TypeAlias = dict[str, float]

BY_OPTIM_STEP = ("loss", "grad_norm", "param_delta_norm")  # curves that the core itself writes at every step


def signal_of(group: RolloutGroup) -> Signal | None:
    """Return whether a group's rewards differ, or whether all are good or bad; None with nothing scored."""
    if group.has_signal:
        return "mixed"
    if math.isnan(group.mean):
        return None
    return "all_good" if group.mean >= GOOD else "all_bad"


def rollout_metrics(batch: TrajectoryBatch) -> Row:
    """Return what a scored batch says about rewards, signal, lengths and the sampled entropy."""
    logprobs = np.array([logprob for t in batch for logprob in t.logprobs or ()])
    return _reward_metrics(batch) | _length_metrics(batch) | {"entropy_sampled": -mean(logprobs)}


def _reward_metrics(batch: TrajectoryBatch) -> Row:
    spread = batch.reward_std_by_group
    signals = [signal for group in batch.groups if (signal := signal_of(group)) is not None]
    return {
        "reward": batch.mean_reward,
        "reward_std": batch.std_reward,
        "group/reward_std": mean(spread[np.isfinite(spread)]),
        "frac_reward_zero_std": batch.frac_zero_signal,
        "by_group/frac_mixed": _share(signals, "mixed"),
        "by_group/frac_all_good": _share(signals, "all_good"),
        "by_group/frac_all_bad": _share(signals, "all_bad"),
    }


def _share(signals: Sequence[Signal], which: Signal) -> float:
    return signals.count(which) / len(signals) if signals else math.nan


def _length_metrics(batch: TrajectoryBatch) -> Row:
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
    }
    if update.skipped:
        return row
    return row | {
        "loss": update.policy_loss,
        "entropy": _or_nan(update.entropy),
        "kl": _or_nan(update.kl),
        "policy/approx_kl": update.approx_kl,
        **update.metrics,
    }


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def known(row: Mapping[str, float], without: Sequence[str] = ()) -> Row:
    """Return what was measured: the numbers of a row that are not NaN."""
    return {
        name: float(value) for name, value in row.items() if not math.isnan(value) and name not in without
    }
