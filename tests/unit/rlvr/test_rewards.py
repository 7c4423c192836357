"""Naming, calling and counting reward functions."""

import math

import pytest

from tensafe_nb.errors import RewardError, ValidationError
from tensafe_nb.rlvr import Trajectory, get_registered_rewards, register_reward, resolve_reward
from tensafe_nb.rlvr.rewards import check_scored, score


def scored(function, responses=("yes",), **meta):
    trajectories = [Trajectory("question", response, meta) for response in responses]
    score(trajectories, resolve_reward(function))
    return trajectories


def test_keyword_contains_finds_any_keyword_whatever_its_case():
    reward = resolve_reward("keyword_contains", keywords=["solution", "answer"])
    assert reward("What is 3 * 4?", "The ANSWER is 12") == 1.0
    assert reward("What is 3 * 4?", "12") == -0.5


def test_keywords_in_the_prompts_columns_override_those_bound():
    reward = resolve_reward(
        "keyword_contains", keywords=["answer"], positive_reward=2.0, negative_reward=-1.0
    )
    assert reward("", "seven", {"keywords": "seven"}) == 2.0
    assert reward("", "the answer", {"keywords": ["seven"]}) == -1.0


def test_exact_match_compares_with_the_answer_column_white_space_apart():
    reward = resolve_reward("exact_match")
    assert [reward("12+34=", text, {"answer": "046"}) for text in ("046", " 046\n", "46")] == [1.0, 1.0, 0.0]


def test_a_built_in_reward_without_what_it_compares_with_says_what_to_give():
    with pytest.raises(ValidationError, match="keywords=\\["):
        resolve_reward("keyword_contains")("", "text")
    with pytest.raises(ValidationError, match='"answer"'):
        resolve_reward("exact_match")("", "text", {})


def test_a_registered_function_is_found_by_name_and_by_the_object_itself():
    @register_reward("unit_test_length", overwrite=True)
    def length(prompt, response, meta=None):
        return len(response)

    assert "unit_test_length" in get_registered_rewards()
    assert resolve_reward("unit_test_length")("", "four") == resolve_reward(length)("", "four") == 4


def test_a_function_that_takes_no_meta_is_called_without_it():
    assert resolve_reward(lambda prompt, response: len(prompt + response))("ab", "c", {"answer": 1}) == 3


def test_keywords_are_bound_and_an_unknown_one_is_refused_with_the_nearest_spelling():
    with pytest.raises(ValidationError, match="Did you mean 'positive_reward'"):
        resolve_reward("keyword_contains", positive_rewards=3)


def test_a_resolved_reward_can_be_resolved_again_with_further_keywords():
    first = resolve_reward("keyword_contains", keywords=["a"])
    assert resolve_reward(first) is first
    assert resolve_reward(first, positive_reward=5.0)("", "a") == 5.0


def test_an_unknown_name_is_refused_with_the_nearest_spelling():
    with pytest.raises(ValidationError, match="Did you mean 'exact_match'"):
        resolve_reward("exact_macth")


async def coroutine_reward(prompt, response, meta=None):
    return 1.0


@pytest.mark.parametrize(
    "function",
    [
        coroutine_reward,
        lambda response: 1.0,
        lambda prompts, completions, **columns: [1.0],
        lambda data_source, solution_str, ground_truth, extra_info=None: 1.0,
    ],
    ids=["coroutine", "one parameter", "TRL", "verl"],
)
def test_a_function_with_another_signature_is_refused_before_anything_runs(function):
    with pytest.raises(ValidationError, match=r"fn\(prompt, response, meta=None\)"):
        resolve_reward(function)


def test_an_exception_leaves_a_rollout_unscored_with_the_error_as_text():
    def fails_on_b(prompt, response, meta=None):
        return 1.0 if response == "a" else 1 / 0

    good, bad = scored(fails_on_b, ["a", "b"])
    assert (good.reward, good.reward_error) == (1.0, None)
    assert (bad.reward, bad.reward_error) == (None, "ZeroDivisionError: division by zero")


@pytest.mark.parametrize("value", [float("nan"), math.inf, "1.0", [1.0], 1j])
def test_what_is_no_finite_number_leaves_a_rollout_unscored(value):
    (trajectory,) = scored(lambda prompt, response: value)
    assert trajectory.reward is None
    assert "expected a finite number" in trajectory.reward_error


def test_none_abstains_without_being_an_error_and_true_counts_as_one():
    assert [(t.reward, t.reward_error) for t in scored(lambda p, r: None)] == [(None, None)]
    assert scored(lambda p, r: True)[0].reward == 1.0


def test_scoring_again_forgets_the_error_of_the_time_before():
    trajectories = scored(lambda p, r: 1 / 0)
    score(trajectories, resolve_reward(lambda p, r: 0.5))
    assert (trajectories[0].reward, trajectories[0].reward_error) == (0.5, None)


def test_a_step_of_which_nothing_was_scored_fails_with_the_first_error():
    trajectories = scored(lambda p, r: 1 / 0, ["first", "second"])
    with pytest.raises(RewardError, match=r"scored none of 2 .* 'first': ZeroDivisionError"):
        check_scored(trajectories, resolve_reward(lambda p, r: 1 / 0))
    trajectories[1].reward = 0.0
    check_scored(trajectories, resolve_reward(lambda p, r: 1 / 0))


def test_a_step_on_which_the_reward_abstained_throughout_fails_too():
    with pytest.raises(RewardError, match="returned None for all 1"):
        check_scored(scored(lambda p, r: None), resolve_reward(lambda p, r: None))
