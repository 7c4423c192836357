"""Baselines, scales and weights beyond the identities that tests/numbers pins."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensafe_nb.rlvr.algorithms.advantages import EMABaseline, advantages, rloo, scale_by_batch, token_weights

NAN = float("nan")
rewards_of_a_group = st.lists(st.floats(-10, 10), min_size=2, max_size=8).map(np.array)


def of(rewards, groups=None, **options):
    rewards = np.array(rewards, dtype=float)
    return advantages(rewards, np.zeros(len(rewards)) if groups is None else np.array(groups), **options)


def test_groups_are_compared_with_themselves_only():
    values = of([1, 0, 100, 98], [0, 0, 1, 1], baseline="rloo")
    assert values.tolist() == [1, -1, 2, -2]


def test_groups_may_be_of_different_size_and_in_any_order():
    values = of([1, 10, 0, 10, 2], [0, 1, 0, 1, 0], baseline="group")
    assert values.tolist() == [0, 0, -1, 0, 1]


@pytest.mark.parametrize("baseline", ["none", "ema", "rloo", "group"])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_an_unscored_rollout_has_advantage_zero_and_changes_no_other(baseline, scale):
    without = of([1, 0, 0], baseline=baseline, scale=scale)
    with_one = of([1, 0, NAN, 0], baseline=baseline, scale=scale)
    assert with_one[2] == 0
    assert np.array_equal(np.delete(with_one, 2), without)


def test_a_rollout_whose_group_mates_are_all_unscored_has_nothing_to_be_compared_with():
    assert of([1, NAN, NAN], baseline="rloo").tolist() == [0, 0, 0]


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_equal_rewards_give_exactly_zero_not_rounding_errors(scale):
    assert of([0.1] * 3 + [0.7] * 3, [0] * 3 + [1] * 3, baseline="rloo", scale=scale).tolist() == [0] * 6


def test_without_a_spread_the_batch_scale_divides_by_one():
    assert scale_by_batch(np.array([0.3, 0.3]), np.array([1.0, 1.0])).tolist() == [0.3, 0.3]


def test_no_baseline_leaves_the_rewards():
    assert of([1, -0.5, NAN], baseline="none").tolist() == [1, -0.5, 0]


def test_the_first_ema_batch_is_compared_with_its_own_other_rollouts():
    assert of([3, 0, 0], baseline="ema").tolist() == pytest.approx([3, -1.5, -1.5])
    assert of([3], baseline="ema").tolist() == [3]


def test_later_ema_batches_are_compared_with_earlier_batches_only():
    ema = EMABaseline(decay=0.9)
    assert ema.value is None
    ema.update(np.array([1.0, NAN, 0.0]))
    assert ema.value == pytest.approx(0.5)  # not 0.05: corrected for the start at 0
    assert of([2, 2], baseline="ema", ema=ema).tolist() == pytest.approx([1.5, 1.5])
    ema.update(np.array([2.0]))
    assert ema.value == pytest.approx((0.9 * 0.5 + 2.0) / 1.9)


def test_a_batch_without_scores_leaves_the_ema_alone():
    ema = EMABaseline()
    ema.update(np.array([NAN]))
    assert ema.value is None


@given(rewards_of_a_group, st.floats(-100, 100))
def test_rloo_ignores_a_constant_added_to_all_rewards(rewards, shift):
    groups = np.zeros(len(rewards))
    assert rloo(rewards + shift, groups) == pytest.approx(rloo(rewards, groups), abs=1e-4)


@given(rewards_of_a_group)
def test_rloo_and_group_advantages_sum_to_zero(rewards):
    for baseline in ("rloo", "group"):
        assert of(rewards, baseline=baseline).sum() == pytest.approx(0, abs=1e-9)


MASK = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [[0.25] * 3, [0.25, 0, 0], [0] * 3]),
        ("seq_mean", [[1 / 9] * 3, [1 / 3, 0, 0], [0] * 3]),
        ("const", [[1 / 30] * 3, [1 / 30, 0, 0], [0] * 3]),
        ("sum", MASK.tolist()),
    ],
)
def test_weights_carry_the_whole_normaliser_and_are_zero_where_the_mask_is(aggregation, expected):
    assert token_weights(MASK, aggregation, max_tokens=10) == pytest.approx(np.array(expected))


def test_a_batch_that_is_masked_altogether_has_weights_of_zero():
    assert not token_weights(np.zeros((2, 3)), "token_mean", 3).any()
    assert not token_weights(np.zeros((2, 3)), "seq_mean", 3).any()
