"""What TRL's own code computes on the loss fixture A3 of the RLVR design, and on rewards, pinned against ours.

Source: trl 1.16.0 in float64, `GRPOTrainer._compute_loss`, `GRPOTrainer._generate_and_score_completions` and the
latter of `RLOOTrainer`. `make trl-parity` runs them again and compares all three: TRL, ours, and these figures.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest

from tensafe_nb.rlvr.advantages import advantages, token_weights
from tests.numbers.test_rlvr_identities import MASK, NEW, evaluate

REFERENCE = NEW + 0.1
AGGREGATION = {  # ours, by TRL's loss_type
    "grpo": "seq_mean",
    "dapo": "token_mean",
    "bnpo": "token_mean",
    "dr_grpo": "const",
    "luspo": "sum",
    "cispo": "token_mean",
}


class Pinned(NamedTuple):
    """A loss of TRL: the options of GRPOConfig, the value, and the norm of its gradient by the log-probabilities."""

    options: dict[str, Any]
    value: float
    gradient: float


def pinned(value: float, gradient: float, loss_type: str, **options: Any) -> Pinned:
    return Pinned({"loss_type": loss_type, **options}, value, gradient)


SEQUENCE = {"importance_sampling_level": "sequence"}
LOSSES = [
    pinned(0, 0, "grpo", epsilon=0.2),
    pinned(0, 0, "dapo", epsilon=0.2),
    pinned(0, 0, "bnpo", epsilon=0.2),
    pinned(0, 0, "dr_grpo", epsilon=0.2),
    pinned(0, 0, "luspo", epsilon=0.2),
    pinned(0, 0, "grpo", epsilon=0.2, epsilon_high=0.28),
    pinned(0, 0, "dapo", epsilon=0.2, epsilon_high=0.28),
    pinned(0, 0, "dr_grpo", epsilon=0.2, epsilon_high=0.28),
    pinned(0, 0, "luspo", epsilon=0.2, epsilon_high=0.28),
    pinned(0, 0, "grpo", epsilon=0.2, **SEQUENCE),
    pinned(0, 0, "dapo", epsilon=0.2, **SEQUENCE),
    pinned(0, 0, "dr_grpo", epsilon=0.2, **SEQUENCE),
    pinned(0, 0, "grpo", epsilon=3e-4, epsilon_high=4e-4, **SEQUENCE),
    pinned(0, 0, "dapo", epsilon=3e-4, epsilon_high=4e-4, **SEQUENCE),
    pinned(0, 0, "dr_grpo", epsilon=3e-4, epsilon_high=4e-4, **SEQUENCE),
    pinned(0, 0, "grpo", epsilon=math.inf),
    pinned(0, 0, "dapo", epsilon=math.inf),
    pinned(0, 0, "dr_grpo", epsilon=math.inf),
    pinned(0, 0, "luspo", epsilon=math.inf),
    pinned(0, 0, "dapo", epsilon=0.2, delta=1.5),
    pinned(0, 0, "cispo", epsilon_high=5.0),
    pinned(0, 0, "dapo", epsilon=0.2, beta=0.04),
    pinned(0, 0, "grpo", epsilon=0.2, beta=0.04),
    pinned(0, 0, "dapo", epsilon=0.2, entropy_coef=0.01),
]
METRICS = {"clip_ratio/low_mean": 0.0, "clip_ratio/high_mean": 0.0, "clip_ratio/region_mean": 0.0, "kl": 0.0}

REWARDS = np.array([[1, 0, 0, 0], [1, 1, 0, math.nan], [0.5, 0.5, 0.5, 0.5], [0.25, -1, 2, 0.75]])
ADVANTAGES = {
    "group": [],
    "batch": [],
    "none": [],
    "rloo": [],
}


def our_loss(
    loss_type: str,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    importance_sampling_level: str = "token",
    beta: float = 0.0,
    entropy_coef: float = 0.0,
) -> tuple[float, np.ndarray, dict[str, float]]:
    """Compute with ours what TRL means by options of GRPOConfig: value, gradient (9,), metrics per token."""
    high = epsilon if epsilon_high is None else epsilon_high
    if loss_type == "cispo":
        name, kwargs = "policy_cispo", {"ratio_min": 0.0, "ratio_max": high}
    elif math.isinf(epsilon):
        name, kwargs = "policy_is", {}
    else:
        clip = {"clip_low": epsilon, "clip_high": high, "dual_clip": delta}
        name, kwargs = "policy_clip", clip | {"ratio": importance_sampling_level}
    if beta:
        kwargs |= {"kl": {"coef": beta, "estimator": "k3"}, "more": {"ref_logprobs": REFERENCE}}
    weights = token_weights(MASK, AGGREGATION[loss_type], MASK.shape[1])
    weights = weights / len(MASK) if loss_type == "luspo" else weights  # the mean of the rollouts' sums
    value, gradient = evaluate(name, weights, entropy_coef=entropy_coef, **kwargs)
    sums = {"clip_low": "low_mean", "clip_high": "high_mean", "clipped": "region_mean"}
    names = {f"{ours}_sum": f"clip_ratio/{theirs}" for ours, theirs in sums.items()} | {"kl_sum": "kl"}
    found = {names[key]: total / MASK.sum() for key, total in value.metrics.items() if key in names}
    return value.total.item(), gradient, found


def our_advantages(scale: str) -> np.ndarray:
    """Compute with ours what TRL means by `scale_rewards`, or by its RLOO."""
    rewards, groups = REWARDS.ravel(), np.repeat(np.arange(len(REWARDS)), REWARDS.shape[1])
    if scale == "rloo":
        return advantages(rewards, groups, baseline="rloo")
    return advantages(rewards, groups, baseline="group", scale=scale)  # type: ignore[arg-type]


def title(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: title(loss.options))
def test_our_loss_is_trls_under_the_options_that_mean_the_same(loss):
    value, gradient, _ = our_loss(**loss.options)
    assert value == pytest.approx(loss.value, abs=1e-12)
    assert np.linalg.norm(gradient) == pytest.approx(loss.gradient, abs=1e-12)


def test_our_metrics_are_trls_by_the_same_names():
    found = our_loss("dapo", epsilon=0.2, beta=0.04)[2]
    assert found == pytest.approx(METRICS, abs=1e-12)


@pytest.mark.parametrize("scale", ADVANTAGES)
def test_our_advantages_are_trls(scale):
    assert our_advantages(scale) == pytest.approx(ADVANTAGES[scale], abs=1e-12)
