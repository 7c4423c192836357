"""What TRL's own code computes on the loss fixture A3 of the RLVR design, and on rewards, pinned against ours.

Source: trl 1.16.0 in float64, `GRPOTrainer._compute_loss`, `GRPOTrainer._generate_and_score_completions` and the
latter of `RLOOTrainer`, and `DPOTrainer._compute_loss`. `make trl-parity` runs them again and compares all three: TRL,
ours, and these figures.
"""

import math
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tensafe_nb.losses import resolve_loss
from tensafe_nb.rlvr.algorithms.advantages import advantages, token_weights
from tests.numbers.test_rlvr_identities import MASK, NEW, OLD, evaluate

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

PREFERENCES = [
    pinned(0.674798636437, 0.073434620707, "sigmoid", beta=0.1),
    pinned(0.609370277963, 0.338231882594, "sigmoid", beta=0.5),
    pinned(0.670111136437, 0.092181149504, "robust", beta=0.1, label_smoothing=0.1),
    pinned(0.468745277963, 0.899314096222, "robust", beta=0.5, label_smoothing=0.3),
    pinned(0.79625, 1.370523014522, "ipo", beta=0.5),
    pinned(0.17125, 0.66080758672, "ipo", beta=1.0),
]
PREFERENCE_METRICS = {
    "rewards/chosen": 0.0275,
    "rewards/rejected": -0.01,
    "rewards/accuracies": 0.5,
    "rewards/margins": 0.0375,
    "logps/chosen": -1.625,
    "logps/rejected": -2.45,
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


def our_preference(
    loss_type: str, beta: float = 0.1, label_smoothing: float = 0.0
) -> tuple[float, np.ndarray, dict[str, float]]:
    """Compute with ours what TRL means by options of DPOConfig: value, gradient (9,), metrics by TRL's names."""
    kwargs: dict[str, Any] = {"beta": beta}
    if loss_type == "robust":
        kwargs |= {"label_smoothing": label_smoothing, "robust": True}
    mask = torch.tensor(MASK).bool()
    new = torch.tensor(NEW)[mask].requires_grad_()  # (9,), rows 2i chosen, rows 2i+1 rejected
    rows = mask.nonzero()[:, 0]

    def sum_rows(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(MASK), dtype=values.dtype).index_add(0, rows, values)

    outputs = SimpleNamespace(logprobs=new, sum_rows=sum_rows, sequence_logprobs=sum_rows(new))
    batch = {"input_ids": torch.zeros(mask.shape), "reference_logprobs": torch.tensor((OLD * MASK).sum(1))}
    value = resolve_loss("ipo" if loss_type == "ipo" else "dpo", **kwargs)(outputs, batch)
    (value.total / value.weight).backward()
    names = {
        "reward_chosen": "rewards/chosen",
        "reward_rejected": "rewards/rejected",
        "accuracy": "rewards/accuracies",
        "reward_margin": "rewards/margins",
        "chosen_logprobs": "logps/chosen",
        "rejected_logprobs": "logps/rejected",
    }
    found = {names[name]: metric for name, metric in value.metrics.items()}
    return value.total.item() / value.weight, new.grad.numpy(), found


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


@pytest.mark.parametrize("loss", PREFERENCES, ids=lambda loss: title(loss.options))
def test_our_losses_of_preferences_are_trls(loss):
    value, gradient, _ = our_preference(**loss.options)
    assert value == pytest.approx(loss.value, abs=1e-12)
    assert np.linalg.norm(gradient) == pytest.approx(loss.gradient, abs=1e-12)


def test_our_metrics_of_preferences_are_trls():
    found = our_preference(**PREFERENCES[0].options)[2]
    assert found == pytest.approx(PREFERENCE_METRICS, abs=1e-7)


@pytest.mark.parametrize("scale", ADVANTAGES)
def test_our_advantages_are_trls(scale):
    assert our_advantages(scale) == pytest.approx(ADVANTAGES[scale], abs=1e-7)
