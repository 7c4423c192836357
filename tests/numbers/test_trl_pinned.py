"""What TRL's own code computes on the loss fixture A3 of the RLVR design, and on rewards, pinned against ours.

Source: trl 1.16.0 in float64, `GRPOTrainer._compute_loss`, `GRPOTrainer._generate_and_score_completions` and the
latter of `RLOOTrainer`. `make trl-parity` runs them again and compares all three: TRL, ours, and these figures.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest

from tensafe_nb.rlvr.algorithms.advantages import advantages, token_weights
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
KL = {"beta": 0.04, "use_bias_correction_kl": False}  # True, TRL's default, multiplies its k3 by the ratio
MEASURED = {"loss_type": "dapo", "epsilon": 0.2, **KL}
LOSSES = [
    pinned(0.007027794603, 0.171965490758, "grpo", epsilon=0.2),
    pinned(0.006066395327, 0.203056058507, "dapo", epsilon=0.2),
    pinned(0.006066395327, 0.203056058507, "bnpo", epsilon=0.2),
    pinned(0.004549796495, 0.152292043881, "dr_grpo", epsilon=0.2),
    pinned(0.013649389486, 0.456876131642, "luspo", epsilon=0.2),
    pinned(-0.001422435244, 0.199829987102, "grpo", epsilon=0.2, epsilon_high=0.28),
    pinned(-0.005200577802, 0.244232167735, "dapo", epsilon=0.2, epsilon_high=0.28),
    pinned(-0.003900433351, 0.183174125801, "dr_grpo", epsilon=0.2, epsilon_high=0.28),
    pinned(-0.011701300054, 0.549522377403, "luspo", epsilon=0.2, epsilon_high=0.28),
    pinned(-0.058847161777, 0.147138048011, "grpo", epsilon=0.2, **SEQUENCE),
    pinned(-0.075885548677, 0.163050310919, "dapo", epsilon=0.2, **SEQUENCE),
    pinned(-0.056914161507, 0.12228773319, "dr_grpo", epsilon=0.2, **SEQUENCE),
    pinned(0.002910660969, 0.123504134199, "grpo", epsilon=3e-4, epsilon_high=4e-4, **SEQUENCE),
    pinned(0.001188071542, 0.146736193059, "dapo", epsilon=3e-4, epsilon_high=4e-4, **SEQUENCE),
    pinned(0.000891053656, 0.110052144794, "dr_grpo", epsilon=3e-4, epsilon_high=4e-4, **SEQUENCE),
    pinned(-0.052346038693, 0.249000404057, "grpo", epsilon=math.inf),
    pinned(-0.06949649479, 0.311688823681, "dapo", epsilon=math.inf),
    pinned(-0.052122371093, 0.233766617761, "dr_grpo", epsilon=math.inf),
    pinned(-0.156367113278, 0.701299853282, "luspo", epsilon=math.inf),
    pinned(-0.006327043898, 0.149515235861, "dapo", epsilon=0.2, delta=1.5),
    pinned(0.102618176436, 0.311688823681, "cispo", epsilon_high=5.0),
    pinned(0.00627323205, 0.202688521088, "dapo", epsilon=0.2, **KL),
    pinned(0.007234631326, 0.171918851549, "grpo", epsilon=0.2, **KL),
    pinned(-0.000220720203, 0.202904260127, "dapo", epsilon=0.2, entropy_coef=0.01),
]
METRICS = {
    "clip_ratio/low_mean": 0.222222223878,
    "clip_ratio/high_mean": 0.222222223878,
    "clip_ratio/region_mean": 0.444444447756,
    "kl": 0.005170918076,
}

REWARDS = np.array([[1, 0, 0, 0], [1, 1, 0, math.nan], [0.5, 0.5, 0.5, 0.5], [0.25, -1, 2, 0.75]])
# fmt: off
ADVANTAGES = {  # by scale_rewards, and of RLOO
    "group": [
        1.499700037645, -0.499900012548, -0.499900012548, -0.499900012548,
        0.577250286507, 0.577250286507, -1.154500573014, 0.0,
        0.0, 0.0, 0.0, 0.0,
        -0.201330598654, -1.207983591925, 1.207983591925, 0.201330598654,
    ],
    "batch": [
        1.112728479936, -0.370909493312, -0.370909493312, -0.370909493312,
        0.494545991083, 0.494545991083, -0.989091982165, 0.0,
        0.0, 0.0, 0.0, 0.0,
        -0.370909493312, -2.225456959872, 2.225456959872, 0.370909493312,
    ],
    "none": [
        0.75, -0.25, -0.25, -0.25,
        0.333333333333, 0.333333333333, -0.666666666667, 0.0,
        0.0, 0.0, 0.0, 0.0,
        -0.25, -1.5, 1.5, 0.25,
    ],
    "rloo": [
        1.0, -0.333333333333, -0.333333333333, -0.333333333333,
        0.5, 0.5, -1.0, 0.0,
        0.0, 0.0, 0.0, 0.0,
        -0.333333333333, -2.0, 2.0, 0.333333333333,
    ],
}
# fmt: on


def our_loss(
    loss_type: str,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    importance_sampling_level: str = "token",
    beta: float = 0.0,
    use_bias_correction_kl: bool = False,
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
        assert not use_bias_correction_kl, "ours has no k3 times the ratio"
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
    return ", ".join(
        str(value) if name == "loss_type" else f"{name}={value}" for name, value in options.items()
    )


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: title(loss.options))
def test_our_loss_is_trls_under_the_options_that_mean_the_same(loss):
    value, gradient, _ = our_loss(**loss.options)
    assert value == pytest.approx(loss.value, abs=1e-12)
    assert np.linalg.norm(gradient) == pytest.approx(loss.gradient, abs=1e-12)


def test_our_metrics_are_trls_by_the_same_names():
    found = our_loss(**MEASURED)[2]
    assert found == pytest.approx(METRICS, abs=1e-7)


@pytest.mark.parametrize("scale", ADVANTAGES)
def test_our_advantages_are_trls(scale):
    assert our_advantages(scale) == pytest.approx(ADVANTAGES[scale], abs=1e-7)
