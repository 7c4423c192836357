"""The numbers of a step, each under one name."""

import math

import numpy as np
import pytest

from tensafe_nb.config import SamplingConfig
from tensafe_nb.rlvr import RolloutGroup, Trajectory, TrajectoryBatch, UpdateResult
from tensafe_nb.rlvr.watch.metrics import known, rollout_metrics, signal_of, update_metrics


def batch_of(*groups, finish="stop", logprobs=(-1.0, -3.0)):
    """Rollouts with these rewards; the n-th of a group has n tokens."""
    return TrajectoryBatch(
        [
            RolloutGroup(
                f"g{number}",
                "p",
                [
                    Trajectory(
                        "p",
                        "r",
                        reward=reward,
                        tokens=[1] * length,
                        logprobs=list(logprobs),
                        finish_reason=finish,
                    )
                    for length, reward in enumerate(rewards, 1)
                ],
            )
            for number, rewards in enumerate(groups)
        ],
        SamplingConfig(max_new_tokens=4),
    )


@pytest.mark.parametrize(
    ("rewards", "signal"),
    [
        ([0, 1], "mixed"),
        ([1, 1], "all_good"),
        ([0.5], "all_good"),
        ([0.4, 0.4], "all_bad"),
        ([None, None], None),
    ],
)
def test_a_group_is_mixed_all_good_all_bad_or_not_scored(rewards, signal):
    assert signal_of(batch_of(rewards).groups[0]) == signal


def test_the_spread_of_the_batch_and_within_groups_are_different_numbers():
    row = rollout_metrics(batch_of([0, 0], [2, 2], [0, 2]))
    assert row["reward"] == 1
    assert row["reward_std"] == pytest.approx(math.sqrt(6 / 5))
    assert row["group/reward_std"] == pytest.approx(math.sqrt(2) / 3)


def test_the_shares_of_mixed_good_and_bad_groups_add_up_and_unscored_groups_do_not_count():
    row = rollout_metrics(batch_of([0, 1], [1, 1], [0, 0], [0, 0], [None, None]))
    shares = [row[f"by_group/frac_{name}"] for name in ("mixed", "all_good", "all_bad")]
    assert shares == [0.25, 0.25, 0.5]
    assert row["frac_reward_zero_std"] == 0.75


def test_lengths_are_of_all_rollouts_and_of_those_that_ended():
    batch = batch_of([1, 1, 1, 1])
    batch[3].finish_reason = "length"
    row = rollout_metrics(batch)
    assert {name: value for name, value in row.items() if name.startswith("completions/")} == {
        "completions/mean_length": 2.5,
        "completions/min_length": 1,
        "completions/max_length": 4,
        "completions/mean_terminated_length": 2,
        "completions/clipped_ratio": 0.25,
    }


def test_the_sampled_entropy_is_the_mean_surprise_of_the_sampled_tokens():
    assert rollout_metrics(batch_of([1, 1]))["entropy_sampled"] == 2


def test_what_was_not_measured_is_absent_from_the_row():
    row = known(rollout_metrics(batch_of([None], finish="length", logprobs=())))
    assert not {"reward", "reward_std", "frac_reward_zero_std", "entropy_sampled"} & set(row)
    assert "completions/mean_terminated_length" not in row
    assert row["completions/clipped_ratio"] == 1


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_share_without_signal_is_that_of_coin_tosses(p, size):
    """A6: p^G + (1 − p)^G, within three standard errors."""
    groups, expected = 2000, p**size + (1 - p) ** size
    rewards = (np.random.default_rng(0).random((groups, size)) < p).astype(float)
    found = rollout_metrics(batch_of(*rewards.tolist()))["frac_reward_zero_std"]
    assert abs(found - expected) <= 3 * math.sqrt(expected * (1 - expected) / groups)


def test_an_update_tells_what_it_did_under_the_names_of_the_history():
    update = UpdateResult(
        8, 9, 0.5, policy_loss=0.1, approx_kl=0.02, grad_norm=3.0, param_delta_norm=0.2,
        metrics={"clip_ratio/low_mean": 0.1, "policy/epochs_run": 2.0},
    )  # fmt: skip
    assert known(update_metrics(update)) == {
        "policy_version": 9, "grad_norm": 3.0, "param_delta_norm": 0.2, "loss": 0.1,
        "policy/approx_kl": 0.02, "clip_ratio/low_mean": 0.1, "policy/epochs_run": 2.0,
    }  # fmt: skip
    assert update_metrics(UpdateResult(1, 1, 0.5, kl=0.3))["kl"] == 0.3


def test_an_update_that_was_skipped_tells_only_that_nothing_moved():
    assert update_metrics(UpdateResult(8, 9, 0.5, skipped="no signal")) == {
        "policy_version": 9, "grad_norm": 0.0, "param_delta_norm": 0.0,
    }  # fmt: skip
