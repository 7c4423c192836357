"""Trajectories, their groups and their batch."""

import math
import sys

import numpy as np
import pytest

from tensafe_nb.config import SamplingConfig
from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr import RolloutGroup, Trajectory, TrajectoryBatch


def batch_of(*groups, tokens=2, **fields):
    return TrajectoryBatch(
        [
            RolloutGroup(
                f"g{number}",
                "p",
                [Trajectory("p", "r", reward=reward, tokens=[1] * tokens, **fields) for reward in rewards],
            )
            for number, rewards in enumerate(groups)
        ],
        SamplingConfig(max_new_tokens=4),
    )


def test_a_batch_is_a_list_of_the_trajectories_of_all_groups():
    batch = batch_of([1, 2], [3])
    assert len(batch) == 3
    assert [trajectory.reward for trajectory in batch] == [1, 2, 3]
    assert batch[-1].reward == 3
    assert [trajectory.reward for trajectory in batch[1:]] == [2, 3]
    assert batch[0] in batch


def test_statistics_are_computed_when_read():
    batch = batch_of([0, 0], [0, 0])
    assert batch.mean_reward == 0
    for trajectory in batch:
        trajectory.reward = 2.0
    batch[0].reward = 0.0
    assert batch.mean_reward == 1.5
    assert batch.std_reward == pytest.approx(1.0)
    assert batch.reward_std_by_group.tolist() == pytest.approx([math.sqrt(2), 0])
    assert batch.frac_zero_signal == 0.5


def test_unscored_rollouts_are_left_out_of_every_statistic():
    batch = batch_of([1, None], [3, 5], [None, None])
    assert batch.mean_reward == 3
    assert np.isnan(batch.reward_std_by_group[[0, 2]]).all()
    assert batch.frac_zero_signal == 0.5  # the group with nothing scored is no group here
    assert np.isnan(batch.rewards).tolist() == [False, True, False, False, True, True]
    assert (batch.groups[1].mean, batch.groups[1].std) == (4, pytest.approx(math.sqrt(2)))


def test_with_nothing_scored_the_mean_is_nan_and_still_formats():
    batch = batch_of([None, None])
    assert f"{batch.mean_reward:.3f}" == "nan"
    assert math.isnan(batch.std_reward)
    assert math.isnan(batch.frac_zero_signal)


def test_lengths_and_truncation_are_read_from_the_tokens_and_the_finish_reason():
    batch = batch_of([1, 1], [1, 1])
    batch[0].finish_reason = "length"
    batch[1].finish_reason = "fixed"
    assert batch.lengths.tolist() == [2, 2, 2, 2]
    assert batch.clipped_ratio == 0.25


def test_p_hat_is_the_share_of_the_scored_rollouts_that_are_good():
    assert batch_of([1, 0.5, 0, None]).groups[0].p_hat == pytest.approx(2 / 3)
    assert math.isnan(batch_of([None]).groups[0].p_hat)


def test_a_subset_has_the_first_rollouts_of_every_group_and_shares_them():
    batch = batch_of([1, 2, 3], [4, 5])
    part = batch.subset(2)
    assert [trajectory.reward for trajectory in part] == [1, 2, 4, 5]
    assert part[0] is batch[0]
    assert part.sampling.num_samples == 2
    assert len(batch) == 5


@pytest.mark.parametrize("size", [0, 3])
def test_a_subset_larger_than_the_smallest_group_is_refused(size):
    with pytest.raises(ValidationError, match="from 1 to 2"):
        batch_of([1, 2, 3], [4, 5]).subset(size)


def test_rows_have_every_field_of_a_rollout_and_the_number_of_its_group():
    batch = batch_of([1], [None], tokens=3)
    rows = batch.to_rows()
    assert [(row["group"], row["reward"], row["tokens"]) for row in rows] == [
        (0, 1, [1] * 3), (1, None, [1] * 3)
    ]  # fmt: skip
    assert {"prompt", "response", "meta", "reward_error", "mask", "advantage"} <= set(rows[0])


def test_a_frame_is_made_with_pandas_and_without_it_says_what_to_install(monkeypatch):
    batch = batch_of([1])
    assert pytest.importorskip("pandas") and batch.to_frame().to_dict("records") == batch.to_rows()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValidationError, match=r"pip install .tensafe_nb\[frames"):
        batch.to_frame()


def test_answers_of_a_private_model_are_marked_wherever_they_go(tmp_path):
    batch = batch_of([1, 0], [1, 1])
    batch.operator_view = True
    with pytest.raises(ValidationError, match="operator"):
        batch.to_csv(tmp_path / "rollouts.csv")
    for marked in (TrajectoryBatch.load(batch.save(tmp_path / "step.jsonl")), batch.subset(1)):
        assert marked.table().operator_view
    assert "operator_view" not in batch_of([1]).save(tmp_path / "open.jsonl").read_text()


def test_a_table_has_a_row_for_each_rollout_and_a_column_for_each_part_of_its_reward(tmp_path):
    batch = batch_of([1, 0], [None])
    first, second, _ = batch
    first.reward_parts, first.advantage, first.mask = {"right": 1.0}, [0.5, 1.5], [1, 1]
    second.reward_parts, second.advantage, second.mask = {"short": 0.0}, [2.0, 4.0], [0, 1]
    table = batch.table().columns
    assert table["group"] == [0, 0, 1] and table["reward"] == [1, 0, None]
    assert table["rewards/right"] == [1.0, None, None] and table["rewards/short"] == [None, 0.0, None]
    assert table["advantage"] == [1.0, 4.0, None]
    assert batch.to_csv(tmp_path / "rollouts.csv").read_text().splitlines()[3].split(",")[3] == ""
