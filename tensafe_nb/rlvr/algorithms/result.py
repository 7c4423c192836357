"""The result of an update: what its forward passes and steps measured, added up and given the history's names."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from tensafe_nb.protocol.codec import tagged
from tensafe_nb.protocol.results import ForwardBackwardResult, OptimStepResult
from tensafe_nb.rlvr.rollouts.trajectories import MOCK, TrajectoryBatch

MOCK_NOTE = "off-policy: mock data"
Row: TypeAlias = dict[str, float]
SUMS = {  # a loss's sums, and the metrics that their per-token means are
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
    "clipped": "clip_ratio/region_mean",
    "entropy": "entropy_trained",
    "value_loss": "value/loss",
    "value_clipped": "value/clip_ratio",
    "sampler_difference": "sampling/sampling_logp_difference/mean",
    "sampler_ratio": "sampling/importance_sampling_ratio/mean",
    "sampler_capped": "sampling/importance_sampling_ratio/capped",
    "mismatch_kl": "sampling/mismatch_kl",
}
SMALLEST_RATIO = (
    "sampling/importance_sampling_ratio/min"  # comes as its inverse: the core knows largest values only
)
FURTHEST = "policy/log_ratio_max"
MAXIMA = {
    "log_ratio_max": FURTHEST,
    "sampler_difference_max": "sampling/sampling_logp_difference/max",
    "sampler_ratio_max": "sampling/importance_sampling_ratio/max",
    "sampler_ratio_inverse_max": SMALLEST_RATIO,
}


@dataclass(frozen=True, slots=True)
class Move:
    """How far an update took the policy, on a sample of its rollouts.

    Attributes:
        kl: KL(old ‖ new) per token, k3 estimate.
        furthest: Largest |log π_new − log π_old|.
    """

    kl: float
    furthest: float


@tagged("update_result")
@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What an update did. Means are over the tokens in the loss, of all its optimiser steps.

    Attributes:
        step: The client's optimiser step after it.
        policy_version: Version of the weights after it.
        mean_reward: Over the scored rollouts.
        policy_loss: The weighted sum that was differentiated, mean over the optimiser steps; no measure of progress.
        value_loss: Half the squared error of the value head; None without one.
        entropy: Exact, in nats, of the whole batch as it was sampled, mean over its tokens; None where a sampler
            did not say. That of the tokens in the loss is `metrics["entropy_trained"]`.
        kl: KL to the reference, k3 estimate; None when none was measured.
        approx_kl: KL(old ‖ new) after the last step, k3 estimate on a sample of the rollouts in the loss; 0 when no
            step was taken, or one of the value head alone; NaN where it was not measured: of updates of fewer than
            12,000 tokens one is, until together they have so many, or ten were queued; and none of which the weights
            it began with are not known, since another update was queued before it.
        clip_ratio: Share of tokens at which a clip acted; 0 where nothing clips.
        grad_norm: Before clipping, mean over the optimiser steps.
        param_delta_norm: Norm of the change of the weights, summed over the optimiser steps.
        tokens: Tokens in the loss.
        epochs_run: Passes over the batch.
        early_stopped: Whether `target_kl` ended it before the last pass.
        skipped: Why nothing was queued; None when a step was taken.
        notes: What to know about this update, such as "off-policy: mock data", or rollouts of another policy version.
        metrics: Further metrics, by the names they have in the history.
    """

    step: int
    policy_version: int
    mean_reward: float
    policy_loss: float = 0.0
    value_loss: float | None = None
    entropy: float | None = None
    kl: float | None = None
    approx_kl: float = 0.0
    clip_ratio: float = 0.0
    grad_norm: float = 0.0
    param_delta_norm: float = 0.0
    tokens: int = 0
    epochs_run: int = 0
    early_stopped: bool = False
    skipped: Literal["no signal", "all truncated"] | None = None
    notes: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


def read_results(
    gradients: Sequence[ForwardBackwardResult],
    steps: Sequence[OptimStepResult],
    *,
    mean_reward: float,
    epochs_run: int,
    early_stopped: bool,
    entropy: float | None,
    move: "Move | None",
    notes: tuple[str, ...],
    metrics: Mapping[str, float],
) -> UpdateResult:
    """Combine the results of an update's optimiser steps.

    Args:
        gradients: One for each step.
        steps: As many.
        mean_reward: Of the batch.
        epochs_run: Passes over it.
        early_stopped: Whether a pass was left out.
        entropy: Of the batch.
        move: How far the last step took the policy; None where it did not change.
        notes: On the batch.
        metrics: What was measured before.
    """
    # Over all passes: a token counts once for each gradient it was in.
    tokens = sum(result.metrics["tokens"] for result in gradients)
    names = {name for result in gradients for name in result.metrics if name.endswith("_sum")}
    means = {
        name.removesuffix("_sum"): sum(result.metrics.get(name, 0.0) for result in gradients)
        / max(tokens, 1.0)
        for name in names
    }
    metrics = {**metrics, **{name: means[key] for key, name in SUMS.items() if key in means}}
    for key, name in MAXIMA.items():
        found = [result.metrics[key] for result in gradients if key in result.metrics]
        metrics |= {name: max(found)} if found else {}
    if SMALLEST_RATIO in metrics:
        metrics[SMALLEST_RATIO] = 1 / metrics[SMALLEST_RATIO] if metrics[SMALLEST_RATIO] else 0.0
    if move is not None and FURTHEST in metrics:
        metrics[FURTHEST] = max(metrics[FURTHEST], move.furthest)
        if math.isnan(move.kl) and len(gradients) == 1:  # a first gradient compares the policy with itself
            del metrics[FURTHEST]
    return UpdateResult(
        steps[-1].step,
        steps[-1].policy_version,
        mean_reward,
        policy_loss=float(np.mean([result.loss for result in gradients])),
        value_loss=means.get("value_loss"),
        entropy=entropy,
        kl=means.get("kl"),
        approx_kl=0.0 if move is None else move.kl,
        clip_ratio=means.get("clipped", 0.0),
        grad_norm=float(np.mean([step.grad_norm for step in steps])),
        param_delta_norm=float(sum(step.param_delta_norm for step in steps)),
        tokens=int(tokens),
        epochs_run=epochs_run,
        early_stopped=early_stopped,
        notes=notes,
        metrics={**metrics, "policy/epochs_run": float(epochs_run)},
    )


def mock_notes(batch: TrajectoryBatch) -> tuple[str, ...]:
    """Return what to know about a batch that no model wrote."""
    return (MOCK_NOTE,) if any(trajectory.policy_version == MOCK for trajectory in batch) else ()


def staleness(versions: Sequence[int], current: int, tis_cap: float | None) -> tuple[Row, tuple[str, ...]]:
    """Return how many versions the policy is away from those that sampled, as metrics, and what to know about it.

    Args:
        versions: Of the rollouts that say so.
        current: Of the weights whose gradient is taken.
        tis_cap: The cap of the correction; None corrects nothing.
    """
    if not versions:
        return {}, ()
    away = np.abs(np.array(versions) - current)
    found = {"staleness/mean": float(away.mean()), "staleness/max": float(away.max())}
    if not away.any():
        return found, ()
    oldest, how = (
        versions[int(away.argmax())],
        f"corrected by tis_cap={tis_cap:g}" if tis_cap else "not corrected",
    )
    return found, (
        f"off-policy: {int((away > 0).sum())} of {len(versions)} rollouts are of another policy version (of {oldest}, "
        f"and the weights were at {current}), {how}",
    )
