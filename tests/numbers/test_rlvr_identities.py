"""Pinned identities of policy-gradient learning, in float64: A1, A2, A3, A5 and A6 of the RLVR design, section 9.1.

Sources: A1 and A2 are arithmetic and enumeration; A3 is float64 arithmetic, three rows of which TRL's own float32 loss
reproduced within 5e-8; A5 and A6 are algebra.
"""

import itertools

import numpy as np
import pytest
import torch

from tensafe_nb.config import SamplingConfig
from tensafe_nb.losses import resolve_loss
from tensafe_nb.losses.policy import policy_reinforce
from tensafe_nb.rlvr import RolloutGroup, Trajectory, TrajectoryBatch
from tensafe_nb.rlvr.algorithms.advantages import advantages, centre, rloo, scale_by_group, token_weights

pytestmark = pytest.mark.filterwarnings("error")


def one_group(rewards):
    return np.array(rewards, dtype=np.float64), np.zeros(len(rewards))


def grpo(rewards, groups, eps=1e-4):
    return scale_by_group(centre(rewards, groups), rewards, groups, eps)


# A1: advantages


@pytest.mark.parametrize(
    ("eps", "expected"),
    [(1e-4, [1.4997, -0.4999, -0.4999, -0.4999]), (1e-6, [1.499997, -0.499999, -0.499999, -0.499999])],
)
def test_a1_grpo_of_one_success_in_four(eps, expected):
    half_a_digit = 5e-5 if eps == 1e-4 else 5e-7
    assert grpo(*one_group([1, 0, 0, 0]), eps) == pytest.approx(expected, abs=half_a_digit)


def test_a1_dr_grpo_and_rloo_of_one_success_in_four():
    assert centre(*one_group([1, 0, 0, 0])) == pytest.approx([0.75, -0.25, -0.25, -0.25], abs=1e-12)
    assert rloo(*one_group([1, 0, 0, 0])) == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3], abs=1e-12)


def test_a1_grpo_of_two_successes_in_eight_uses_bessels_standard_deviation():
    values = grpo(*one_group([1, 1, 0, 0, 0, 0, 0, 0]))
    assert values == pytest.approx([1.619835] * 2 + [-0.539945] * 6, abs=5e-7)
    assert values[0] != pytest.approx(1.731651, abs=1e-2)  # what the population's would give


@pytest.mark.parametrize("baseline", ["rloo", "group"])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_a1_equal_rewards_have_advantage_exactly_zero(baseline, scale):
    assert not advantages(*one_group([0.1] * 7), baseline=baseline, scale=scale).any()


def test_a1_rloo_is_g_over_g_minus_one_times_the_centred_reward():
    rewards, groups = one_group(np.random.default_rng(0).normal(size=8))
    assert rloo(rewards, groups) == pytest.approx(8 / 7 * centre(rewards, groups), abs=1e-12)
    others = np.array([(rewards.sum() - reward) / 7 for reward in rewards])
    assert rloo(rewards, groups) == pytest.approx(rewards - others, abs=1e-12)


@pytest.mark.parametrize("baseline", ["none", "ema", "rloo", "group"])
def test_a1_a_missing_reward_has_advantage_zero_and_is_left_out_of_the_mean(baseline):
    rewards, groups = one_group([1, float("nan"), 0, 0])
    values = advantages(rewards, groups, baseline=baseline)
    assert values[1] == 0
    assert values[[0, 2, 3]] == pytest.approx(advantages(*one_group([1, 0, 0]), baseline=baseline), abs=1e-12)


# A2: is the expected gradient the true one? Every possible group, weighted by its probability.

POLICY = np.array([0.5, 0.3, 0.15, 0.05])
REWARD = np.array([0.0, 1.0, 0.0, 1.0])
TRUE_GRADIENT = np.array([-0.175, 0.195, -0.0525, 0.0325])  # of J = Σ π R = .35 by the logits


def expected_gradient(group_size, advantage):
    """Return E[mean_i A_i ∇log π(y_i)] over all group_size-tuples of actions."""
    total = np.zeros(4)
    for actions in itertools.product(range(4), repeat=group_size):
        chosen = list(actions)
        score = np.eye(4)[chosen] - POLICY  # (G, 4): ∇_logits log π
        values = advantage(REWARD[chosen], np.zeros(group_size))
        total += POLICY[chosen].prod() * (values[:, None] * score).mean(0)
    return total


def test_a2_the_fixture_is_what_the_design_says():
    value = POLICY @ REWARD
    assert value == pytest.approx(0.35)
    assert POLICY * (REWARD - value) == pytest.approx(TRUE_GRADIENT, abs=1e-12)


@pytest.mark.parametrize("group_size", [2, 4])
@pytest.mark.parametrize(
    ("name", "advantage", "factor"),
    [
        ("none", lambda r, g: advantages(r, g, baseline="none"), lambda size: 1.0),
        ("constant", lambda r, g: r - 0.7, lambda size: 1.0),
        ("rloo", rloo, lambda size: 1.0),
        ("centre", centre, lambda size: (size - 1) / size),
        ("grpo", grpo, {2: 0.707007, 4: 1.408297}.get),
    ],
)
def test_a2_the_expected_gradient_is_the_true_one_times_a_known_factor(name, advantage, factor, group_size):
    expected = factor(group_size) * TRUE_GRADIENT
    assert expected_gradient(group_size, advantage) == pytest.approx(expected, abs=1e-6)


# A3: the losses on one fixture, (4, 3) tokens

ADVANTAGES = np.array([1, -0.5, 0.25, -0.75])
MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
OLD = np.array([[-1, -0.5, -2], [-0.7, -1.2, 0], [-0.3, 0, 0], [-1.5, -0.9, -0.4]])
NEW = np.array([[-0.8, -0.6, -1.5], [-1.1, -1, 0], [-0.35, 0, 0], [-1, -1.4, -0.4]])
TOKENS = MASK.astype(bool)
TABLE = {
    ("clip", 0.2, 0.2): {"seq_mean": 0.00702779, "token_mean": 0.00606640, "const": 0.00454980, "sum": 0.05459756},
    ("clip", 0.2, 0.28): {
        "seq_mean": -0.00142244, "token_mean": -0.00520058, "const": -0.00390043, "sum": -0.04680520
    },
    ("clip", 0.2, 0.2, "sequence"): {
        "seq_mean": -0.05884716, "token_mean": -0.07588555, "const": -0.05691416, "sum": -0.68296994,
    },
    ("clip", 3e-4, 4e-4, "sequence"): {
        "seq_mean": 0.00291066, "token_mean": 0.00118807, "const": 0.00089105, "sum": 0.01069264,
    },
    ("is",): {"seq_mean": -0.05234604, "token_mean": -0.06949649, "const": -0.05212237, "sum": -0.62546845},
}  # fmt: skip
CELLS = [(loss, aggregation, value) for loss, row in TABLE.items() for aggregation, value in row.items()]


class TwoTokenOutputs:
    """Logits (N, 2) under which label 0 has the given log-probability."""

    def __init__(self, logprobs):
        self.leaf = torch.tensor(logprobs, dtype=torch.float64).requires_grad_()
        self.logits = torch.stack([self.leaf, torch.log1p(-self.leaf.exp())], -1)

    @property
    def logprobs(self):
        return self.logits.log_softmax(-1)[:, 0]

    def map_logits(self, function):
        return function(self.logits, torch.zeros(len(self.logits), dtype=torch.long))


def evaluate(name, weights, advantage=ADVANTAGES, old=OLD, new=NEW, more=None, **kwargs):
    """Return the loss's value with its gradient by the new log-probabilities, (N,), at hand."""
    outputs = TwoTokenOutputs(new[TOKENS])
    batch = {
        "labels": torch.zeros(TOKENS.sum(), dtype=torch.long),
        "advantages": torch.tensor(np.broadcast_to(advantage[:, None], MASK.shape)[TOKENS]),
        "weights": torch.tensor(weights[TOKENS]),
        "input_ids": torch.zeros(4, 3),
        "sequence_index": torch.tensor(np.nonzero(TOKENS)[0]),
        **{name: torch.tensor(values[TOKENS]) for name, values in (more or {}).items()},
    }
    if old is not None:
        batch["old_logprobs"] = torch.tensor(old[TOKENS])
    value = resolve_loss(name, **kwargs)(outputs, batch)
    value.total.backward()
    return value, outputs.leaf.grad.numpy()


def policy_loss(loss, weights, **changes):
    name, *bounds = loss
    kwargs = dict(zip(("clip_low", "clip_high", "ratio"), bounds, strict=False))
    value, _ = evaluate(f"policy_{name}", weights, **kwargs, **changes)
    return value.total.item()


@pytest.mark.parametrize(("loss", "aggregation", "expected"), CELLS)
def test_a3_clip_and_importance_sampling_under_every_aggregation(loss, aggregation, expected):
    assert policy_loss(loss, token_weights(MASK, aggregation, 3)) == pytest.approx(expected, abs=5e-9)


@pytest.mark.parametrize(("loss", "aggregation", "expected"), CELLS)
def test_a3_holds_with_the_weights_moved_into_the_advantages(loss, aggregation, expected):
    weights = token_weights(MASK, aggregation, 3)
    per_row = (weights.sum(1) / MASK.sum(1)) * ADVANTAGES  # a rollout's tokens share one weight
    assert policy_loss(loss, MASK.astype(float), advantage=per_row) == pytest.approx(expected, abs=5e-9)


@pytest.mark.parametrize(
    ("bounds", "aggregation", "expected"),
    [
        ((0, 5), "token_mean", 0.10261818),
        ((0.8, 1.2), "sum", 0.30613503),
        ((0.8, 1.2), "token_mean", 0.03401500),
    ],
)
def test_a3_cispo(bounds, aggregation, expected):
    value, _ = evaluate(
        "policy_cispo", token_weights(MASK, aggregation, 3), ratio_min=bounds[0], ratio_max=bounds[1]
    )
    assert value.total.item() == pytest.approx(expected, abs=5e-9)


def test_a3_the_metrics_are_sums_over_the_tokens_in_the_loss():
    metrics = evaluate("policy_clip", token_weights(MASK, "const", 3), clip_low=0.2, clip_high=0.2)[0].metrics
    assert metrics["tokens"] == 9
    counts = [metrics[f"{name}_sum"] for name in ("clip_low", "clip_high", "clipped")]
    assert counts == [2, 2, 4]  # 2/9, 2/9, 4/9
    assert metrics["approx_kl_sum"] / 9 == pytest.approx(0.0581295, abs=5e-8)
    assert OLD[TOKENS].mean() - metrics["logprob_sum"] / 9 == pytest.approx(-0.0388889, abs=5e-8)


# A5: with one pass over fresh rollouts, all of them are REINFORCE

ON_POLICY = [
    ("policy_reinforce", {}),
    ("policy_is", {}),
    ("policy_clip", {}),
    ("policy_clip", {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None}),
    ("policy_cispo", {"ratio_min": 0.0, "ratio_max": 5.0}),
]


@pytest.mark.parametrize(("name", "kwargs"), ON_POLICY)
@pytest.mark.parametrize(("aggregation", "total"), [("token_mean", 9), ("const", 4 * 3)])
def test_a5_at_ratio_one_every_policy_loss_has_the_gradient_of_reinforce(name, kwargs, aggregation, total):
    weights = token_weights(MASK, aggregation, 3)
    _, reinforce = evaluate("policy_reinforce", weights, old=None)
    _, gradient = evaluate(name, weights, old=None, **kwargs)
    assert np.abs(gradient - reinforce).max() == 0
    expected = -np.broadcast_to(ADVANTAGES[:, None], MASK.shape)[TOKENS] / total
    probability = np.exp(NEW[TOKENS])  # logits are (x, log(1 − eˣ)): ∂ log π / ∂x is exactly 1
    assert probability.max() < 1 and gradient == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("name", "kwargs"), ON_POLICY[1:])
def test_a5_old_logprobs_equal_to_the_present_ones_change_nothing(name, kwargs):
    weights = token_weights(MASK, "token_mean", 3)
    _, without = evaluate(name, weights, old=None, **kwargs)
    value, given = evaluate(name, weights, old=NEW, **kwargs)
    assert given == pytest.approx(without, abs=1e-12)
    assert value.metrics["approx_kl_sum"] == pytest.approx(0, abs=1e-12)


def test_a_ratio_is_clamped_against_overflow_only():
    far = np.where(TOKENS, -700.0, 0)
    value, _ = evaluate("policy_is", MASK.astype(float), old=far)
    assert value.total.item() == pytest.approx(-(ADVANTAGES @ MASK.sum(1)) * np.exp(20))


# entropy and temperature


def random_outputs(vocabulary=7, tokens=5):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64).requires_grad_()
    outputs = TwoTokenOutputs([-1.0])
    outputs.logits, outputs.map_logits = logits, lambda function: function(logits, torch.arange(tokens))
    batch = {
        "labels": torch.arange(tokens),
        "advantages": torch.linspace(-1, 1, tokens, dtype=torch.float64),
        "weights": torch.full((tokens,), 0.1, dtype=torch.float64),
    }
    return outputs, batch


def test_the_entropy_is_exact_and_its_bonus_is_differentiated():
    outputs, batch = random_outputs()
    batch["advantages"] = torch.zeros(5, dtype=torch.float64)
    answer = policy_reinforce(outputs, batch, entropy_coef=0.01)
    answer["loss"].backward()
    p = outputs.logits.detach().softmax(-1)
    entropy = -(p * p.log()).sum(-1, keepdim=True)
    assert answer["metrics"]["entropy_sum"] == pytest.approx(entropy.sum().item(), abs=1e-12)
    assert answer["loss"].item() == pytest.approx(-0.01 * 0.1 * entropy.sum().item(), abs=1e-12)
    gradient = 0.01 * 0.1 * p * (p.log() + entropy)  # −coef · w · ∂H/∂z,  ∂H/∂z = −p (log p + H)
    assert outputs.logits.grad.numpy() == pytest.approx(gradient.numpy(), abs=1e-12)


def test_the_temperature_divides_the_logits_as_in_sampling():
    outputs, batch = random_outputs()
    metrics = policy_reinforce(outputs, batch, temperature=2.0)["metrics"]
    tempered = (outputs.logits.detach() / 2).log_softmax(-1)
    assert metrics["logprob_sum"] == pytest.approx(tempered.diagonal().sum().item(), abs=1e-12)


def test_tokens_of_weight_zero_have_no_gradient_and_are_not_counted():
    outputs, batch = random_outputs()
    batch["weights"][2] = 0
    answer = policy_reinforce(outputs, batch, entropy_coef=0.5)
    answer["loss"].backward()
    assert not outputs.logits.grad[2].any()
    assert outputs.logits.grad[[0, 1, 3, 4]].any(1).all()
    assert answer["metrics"]["tokens"] == 4


# A6: how often a group teaches nothing

ZERO_SIGNAL = {
    0.05: {2: 0.905, 4: 0.8145, 8: 0.6634, 16: 0.4401},
    0.1: {2: 0.82, 4: 0.6562, 8: 0.4305, 16: 0.1853},
    0.5: {2: 0.5, 4: 0.125, 8: 0.0078, 16: 0.0000},
}
N_GROUPS = 2000


@pytest.mark.parametrize("p", ZERO_SIGNAL)
@pytest.mark.parametrize("group_size", [2, 4, 8, 16])
def test_a6_the_share_of_groups_without_signal_is_what_probability_says(p, group_size):
    q = p**group_size + (1 - p) ** group_size
    assert q == pytest.approx(ZERO_SIGNAL[p][group_size], abs=5.1e-5)
    solved = np.random.default_rng(group_size).random((N_GROUPS, group_size)) < p
    groups = [
        RolloutGroup(str(row), "", [Trajectory("", "", reward=float(reward)) for reward in rewards])
        for row, rewards in enumerate(solved)
    ]
    measured = TrajectoryBatch(groups, SamplingConfig()).frac_zero_signal
    assert measured == pytest.approx(q, abs=3 * np.sqrt(q * (1 - q) / N_GROUPS))
