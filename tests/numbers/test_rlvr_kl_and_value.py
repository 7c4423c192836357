"""A4, A7, A9 of the RLVR design, section 9.1: KL estimators, generalised advantages, and what they converge to."""

import numpy as np
import pytest
import torch

from tensafe_nb.errors import ValidationError
from tensafe_nb.losses import resolve_loss
from tensafe_nb.rlvr.algorithms.advantages import at_the_end, gae, reinforce_pp, whiten
from tests.numbers.test_rlvr_identities import MASK, NEW, evaluate, token_weights

P, Q = np.array([0.5, 0.3, 0.2]), np.array([0.6, 0.3, 0.1])


class Categorical:
    """One position of a policy over three tokens, seen once under every token: expectations by enumeration."""

    def __init__(self, probabilities):
        self.leaf = torch.tensor(np.log(probabilities)).requires_grad_()

    def map_logits(self, function):
        size = len(self.leaf)
        return function(self.leaf.expand(size, size), torch.arange(size))


def expected_gradient(kl, advantages=None, policy=P, reference=Q):
    """Return the loss's value and its gradient by the logits, both in expectation under the policy."""
    outputs, size = Categorical(policy), len(policy)
    batch = {
        "labels": torch.arange(size),
        "weights": torch.tensor(policy),
        "advantages": torch.zeros(size, dtype=torch.float64)
        if advantages is None
        else torch.tensor(advantages),
        "ref_logprobs": torch.tensor(np.log(reference)),
        "input_ids": torch.zeros(size, 2),
        "sequence_index": torch.arange(size),
    }
    value = resolve_loss("policy_reinforce", kl=kl)(outputs, batch)
    value.total.backward()
    return value, outputs.leaf.grad.numpy()


TRUE = [-0.114895, -0.014241, 0.129136]


def test_a4_k2_in_the_loss_has_the_gradient_of_the_reverse_kl():
    value, gradient = expected_gradient({"coef": 1.0, "estimator": "k2"})
    assert value.total.item() == pytest.approx(0.0563556, abs=5e-8)
    assert gradient == pytest.approx(TRUE, abs=5e-7)


def test_a4_k3_in_the_loss_descends_the_forward_kl():
    value, gradient = expected_gradient({"coef": 1.0, "estimator": "k3"})
    assert value.total.item() == pytest.approx(0.0474687, abs=5e-8)
    assert gradient == pytest.approx([-0.1, 0.0, 0.1], abs=1e-9)


def test_a4_k1_in_the_reward_has_the_gradient_of_the_reverse_kl():
    penalty = np.log(P) - np.log(Q)
    _, gradient = expected_gradient(None, advantages=-penalty)
    assert gradient == pytest.approx(TRUE, abs=5e-7)


def test_a4_k1_as_a_loss_is_refused():
    with pytest.raises(ValidationError, match="no gradient in expectation"):
        expected_gradient({"coef": 1.0, "estimator": "k1"})


def test_a4_trls_penalty_on_the_loss_fixture():
    weights, reference = token_weights(MASK, "token_mean", 3), {"ref_logprobs": NEW + 0.1}
    kwargs = {
        "advantage": np.zeros(4),
        "old": None,
        "more": reference,
        "kl": {"coef": 0.04, "estimator": "k3"},
    }
    value, _ = evaluate("policy_reinforce", weights, **kwargs)
    assert value.metrics["kl_sum"] / value.metrics["tokens"] == pytest.approx(0.00517092, abs=5e-9)
    assert value.total.item() == pytest.approx(0.00020684, abs=5e-9)


def test_the_kl_is_shown_where_it_is_only_measured():
    weights = token_weights(MASK, "token_mean", 3)
    value, gradient = evaluate("policy_reinforce", weights, old=None, more={"ref_logprobs": NEW + 0.1})
    _, without = evaluate("policy_reinforce", weights, old=None)
    assert value.metrics["kl_sum"] > 0 and gradient.tolist() == without.tolist()


@pytest.mark.parametrize(
    ("lam", "advantages", "returns"),
    [
        (1.0, [0.8, 0.5, 0.6], [1, 1, 1]),
        (0.95, [0.7465, 0.47, 0.6], [0.9465, 0.97, 1]),
        (0.0, [0.3, -0.1, 0.6], [0.5, 0.4, 1]),
    ],
)
def test_a7_generalised_advantages(lam, advantages, returns):
    rewards, values, mask = np.array([[0.0, 0, 1]]), np.array([[0.2, 0.5, 0.4]]), np.ones((1, 3))
    found, targets = gae(rewards, values, mask, lam=lam)
    assert found[0] == pytest.approx(advantages) and targets[0] == pytest.approx(returns)


def test_a7_masked_tokens_leave_the_others_unchanged():
    rewards, values = np.array([[0.0, 9, 0, 1]]), np.array([[0.2, 7, 0.5, 0.4]])
    mask = np.array([[1, 0, 1, 1]])
    found, targets = gae(rewards, values, mask, lam=0.95)
    assert found[0] == pytest.approx([0.7465, 0, 0.47, 0.6]) and targets[0][1] == 0


def test_a7_with_lambda_and_gamma_one_the_advantage_is_reward_minus_value():
    values = np.random.default_rng(0).normal(size=(3, 5))
    found, _ = gae(at_the_end(np.array([1.0, -2, 0.5]), np.ones((3, 5))), values, np.ones((3, 5)))
    assert found == pytest.approx(np.array([[1.0], [-2], [0.5]]) - values)


def test_reinforce_pp_whitens_the_return_of_every_token():
    mask = np.array([[1, 1, 0], [1, 1, 1]], dtype=float)
    found = reinforce_pp(np.array([1.0, 0.0]), np.array([0, 1]), mask)
    inside = found[mask > 0]
    assert inside.mean() == pytest.approx(0, abs=1e-12) and inside.std(ddof=1) == pytest.approx(1, abs=1e-6)
    assert found[0, 0] == found[0, 1] > 0 > found[1, 2] and found[0, 2] == 0
    assert not whiten(np.ones((2, 2)), np.ones((2, 2))).any()


def test_the_value_loss_is_half_the_larger_of_the_clipped_and_unclipped_squares():
    class Values(Categorical):
        values = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)

    batch = {
        "labels": torch.arange(3),
        "weights": torch.ones(3, dtype=torch.float64),
        "returns": torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64),
        "old_values": torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64),
        "input_ids": torch.zeros(3, 2),
    }
    value = resolve_loss("policy_value", value={"coef": 2.0, "clip": 0.5})(Values(P), batch)
    halves = [0.5, 0.5 * 0.5**2, 0.5]  # row 2: clipped to 0.5, off by 0.5; row 3: unclipped is off by more
    assert value.total.item() == pytest.approx(2 * sum(halves))
    assert (
        value.metrics["value_loss_sum"] == pytest.approx(sum(halves))
        and value.metrics["value_clipped_sum"] == 1
    )


def bandit(steps, *, beta=0.0, how=None):
    """Exact gradient ascent on a bandit with ten arms of which one pays; returns the probability of that arm."""
    reward, reference = np.eye(10)[0], np.full(10, 0.1)
    logits = np.log(reference)
    for _ in range(steps):
        policy = np.exp(logits) / np.exp(logits).sum()
        value = reward - (beta * (np.log(policy) - np.log(reference)) if how == "reward" else 0.0)
        kl = {"coef": beta, "estimator": how} if how in ("k2", "k3") else None
        _, gradient = expected_gradient(
            kl, advantages=value - policy @ value, policy=policy, reference=reference
        )
        logits = logits - gradient
    return float((np.exp(logits) / np.exp(logits).sum())[0])


def test_a9_an_exact_bandit_learns_as_fast_as_the_arithmetic_says():
    found = [bandit(steps) for steps in (0, 1, 10, 20, 50)]
    assert found == pytest.approx([0.1, 0.109367, 0.343924, 0.846219, 0.972853], abs=5e-7)


@pytest.mark.parametrize("how", ["k2", "reward"])
@pytest.mark.parametrize(("beta", "steps", "optimum"), [(1.0, 59, 0.231969), (0.5, 96, 0.450853)])
def test_a9_a_right_kl_penalty_converges_to_the_regularised_optimum(how, beta, steps, optimum):
    assert bandit(steps, beta=beta, how=how) == pytest.approx(optimum, abs=2e-6)


@pytest.mark.parametrize(("beta", "elsewhere"), [(1.0, 0.316228), (0.5, 0.585410)])
def test_a9_k3_in_the_loss_converges_elsewhere(beta, elsewhere):
    assert bandit(150, beta=beta, how="k3") == pytest.approx(elsewhere, abs=1e-5)
