"""What another reward would have said of the same rollouts."""

import math

import pytest

from tensafe_nb.config import SamplingConfig
from tensafe_nb.rlvr import RolloutGroup, Trajectory, TrajectoryBatch
from tensafe_nb.rlvr.watch.rescoring import rescore_steps


def step_of(*groups):
    """Groups of (response, reward)."""
    return TrajectoryBatch(
        [
            RolloutGroup(
                f"g{n}", "p", [Trajectory("p", text, reward=reward, advantage=9.0) for text, reward in group]
            )
            for n, group in enumerate(groups)
        ],
        SamplingConfig(max_new_tokens=4),
    )


STORED = [
    (7, step_of([("a", 1.0), ("bb", 1.0)], [("a", 1.0), ("b", 0.0)])),
    (8, step_of([("a", 2.0), ("bb", 1.0), ("ccc", 3.0)])),
]


@pytest.fixture(scope="module")
def found():
    return rescore_steps(STORED, lambda prompt, response, meta=None: float(len(response)), None)


def test_the_rollouts_of_all_steps_are_there_with_old_and_new_rewards(found):
    assert found.steps == (7, 8)
    assert [trajectory.reward for trajectory in found.before] == [1, 1, 1, 0, 2, 1, 3]
    assert [trajectory.reward for trajectory in found.after] == [1, 2, 1, 1, 1, 2, 3]
    assert STORED[0][1][0].reward == 1.0, "what was stored stays as it was"
    assert {trajectory.advantage for trajectory in found.after} == {None}


def test_signal_that_is_gained_and_lost_is_counted_by_group(found):
    assert (found.gained_signal, found.lost_signal) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_a_pair_flips_if_both_rewards_rank_it_and_differently(found):
    assert found.rank_flips == pytest.approx(
        1 / 3
    )  # three pairs are ranked by both, a-bb of step 8 has turned


def test_new_advantages_stand_beside_the_old_ones(found):
    assert found.advantages[:2].tolist() == [[0, -0.5], [0, 0.5]]
    assert found.advantages.shape == (7, 2)


def test_it_says_in_a_line_what_has_changed(found):
    assert "7 rollouts of 2 steps: mean reward 1.286 → 1.571" in repr(found)
    assert "33% gain it" in repr(found)


def test_a_function_that_fails_or_abstains_leaves_rollouts_unscored():
    def picky(prompt, response, meta=None):
        return None if response == "a" else 1 / (len(response) - 2)

    found = rescore_steps(STORED[1:], picky, None)
    assert [trajectory.reward for trajectory in found.after] == [None, None, 1.0]
    assert found.errors == 1
    assert math.isnan(found.rank_flips)
