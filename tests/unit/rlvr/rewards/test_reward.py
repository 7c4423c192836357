"""Naming, calling and counting reward functions."""

import asyncio
import math

import numpy as np
import pytest

from tensafe_nb.errors import RewardError, ValidationError
from tensafe_nb.rlvr import Trajectory, get_registered_rewards, register_reward, resolve_reward
from tensafe_nb.rlvr.rewards.reward import Part
from tensafe_nb.rlvr.scoring.scorer import check_scored, score


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


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda response: 1.0, r"fn\(prompt, response, meta=None\)"),
        (lambda: 1.0, r"fn\(prompt, response, meta=None\)"),
        (lambda prompt, response, meta, judge: 1.0, r"fn\(prompt, response, meta=None\)"),
        (lambda prompt, response, answer: 1.0, r"read meta\['answer'\]"),
        (lambda prompt, answer: 1.0, r"name the response 'response'"),
        (lambda completion, parser: 1.0, r"parser: bind it"),
        (lambda queries, prompts, tools: [1.0], r"tools: bind it"),
    ],
    ids=["one", "none", "unbound", "column", "ambiguous", "verifiers' parser", "OpenRLHF's tools"],
)
def test_a_function_with_another_signature_is_refused_before_anything_runs(function, match):
    with pytest.raises(ValidationError, match=match):
        resolve_reward(function)


def test_a_third_parameter_may_be_a_bound_keyword():
    reward = resolve_reward(lambda prompt, response, target: float(response == target), target="7")
    assert reward("", "7", {"answer": "8"}) == 1.0


def test_a_third_parameter_with_a_default_of_its_own_is_an_option_not_meta():
    assert resolve_reward(lambda prompt, response, limit=20: limit)("", "", {"answer": 1}) == 20
    assert (
        resolve_reward(lambda prompt, response, context=None: context["answer"])("", "", {"answer": 1}) == 1
    )


def test_a_parameter_named_tokens_gets_the_token_ids_unless_it_is_bound():
    def length(prompt, response, meta=None, tokens=()):
        return len(tokens)

    trajectory = Trajectory("p", "r", tokens=[5, 6, 7])
    score([trajectory], resolve_reward(length))
    assert trajectory.reward == 3
    score([trajectory], resolve_reward(length, tokens=[1]))
    assert trajectory.reward == 1


def test_a_dict_gives_a_score_and_parts_and_texts_beside_them_are_no_parts():
    (trajectory,) = scored(lambda p, r: {"score": 0.5, "acc": True, "pred": "42"})
    assert trajectory.reward == 0.5
    assert trajectory.reward_parts == {"<lambda>": 0.5, "<lambda>/acc": 1.0}
    assert resolve_reward(lambda p, r: {"score": 0.5, "acc": 1})("", "") == 0.5


def test_a_dict_without_a_score_leaves_a_rollout_unscored():
    (trajectory,) = scored(lambda p, r: {"reward": 1.0})
    assert trajectory.reward is None
    assert "without 'score' (reward)" in trajectory.reward_error


def test_scalars_of_numpy_and_torch_are_numbers():
    import torch

    for value in (np.float32(0.5), np.bool_(True), np.array(2), torch.tensor(0.25)):
        assert scored(lambda p, r, value=value: value)[0].reward == float(value)


@pytest.mark.parametrize("value", ["1.0", math.nan, [1.0, 2.0]])
def test_in_the_kernel_what_is_no_score_raises(value):
    with pytest.raises(RewardError, match="expected a finite number or None"):
        resolve_reward(lambda prompt, response: value)("", "")


def test_in_the_kernel_the_functions_own_exception_is_seen():
    with pytest.raises(ZeroDivisionError):
        resolve_reward(lambda prompt, response: 1 / 0)("", "")


def test_trl_functions_get_all_completions_and_columns_at_once_and_may_log():
    def reward(completions, answer, completion_ids, log_extra, log_metric, **columns):
        log_extra("length", [len(text) for text in completions])
        log_extra("text", completions)
        log_metric("batch", len(completions))
        assert sorted(columns) == ["level", "prompts", "trainer_state"]
        return [float(text == gold) if gold else None for text, gold in zip(completions, answer, strict=True)]

    trajectories = [Trajectory("q", "4", {"answer": "4"}), Trajectory("q", "no", {"level": 3})]
    score(trajectories, resolve_reward(reward))
    assert [t.reward for t in trajectories] == [1.0, None]
    assert [t.reward_error for t in trajectories] == [None, None]
    assert trajectories[1].reward_parts == {"reward/length": 2.0, "reward/batch": 2.0}


def test_trl_functions_get_chat_messages_when_asked():
    def lengths(prompts, completions, **columns):
        return [len(p[-1]["content"] + c[0]["content"]) for p, c in zip(prompts, completions, strict=True)]

    reward = resolve_reward(lengths, conversational=True)
    assert reward("ab", "cde") == 5
    assert resolve_reward(reward) is reward
    with pytest.raises(ValidationError, match="conversational=True is for"):
        resolve_reward(lambda prompt, response: 1.0, conversational=True)


@pytest.mark.parametrize("rewards", [[1.0], 1.0, "11", {"scores": [1.0, 1.0]}])
def test_a_batch_function_that_does_not_return_one_reward_each_scores_nothing(rewards):
    trajectories = [Trajectory("q", "a"), Trajectory("q", "b")]
    score(trajectories, resolve_reward(lambda completions, **columns: rewards))
    assert [t.reward for t in trajectories] == [None, None]
    assert all("it returned" in t.reward_error for t in trajectories)


def test_verl_functions_find_their_columns():
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        return {"score": float(solution_str == ground_truth), "index": extra_info["index"]}

    reward = resolve_reward(compute_score)
    meta = {"reward_model": {"ground_truth": "7"}, "extra_info": {"index": 3}, "data_source": "gsm8k"}
    assert reward("q", "7", meta) == 1.0
    assert reward("q", "8", {"answer": "7", "index": 1}) == 0.0
    with pytest.raises(ValidationError, match="asks for ground_truth, which the prompts do not have"):
        reward("q", "7", {"index": 1})


def test_openrlhf_functions_get_queries_and_labels_and_return_tensors():
    import torch

    def reward_func(queries, prompts, labels):
        assert queries == ["q1a", "q2bb"]
        values = torch.tensor([len(q) - len(p) for q, p in zip(queries, prompts, strict=True)])
        return {"rewards": values, "scores": values, "extra_logs": {"label": torch.tensor(labels)}}

    trajectories = [Trajectory("q1", "a", {"label": 5}), Trajectory("q2", "bb", {"label": 6})]
    score(trajectories, resolve_reward(reward_func))
    assert [t.reward for t in trajectories] == [1.0, 2.0]
    assert [t.reward_parts["reward_func/label"] for t in trajectories] == [5.0, 6.0]


def test_verifiers_functions_get_what_they_name():
    class Parser:
        def parse_answer(self, completion):
            return completion[-1]["content"].split()[-1]

    def correct(completion, answer, state, parser, info):
        assert state["answer"] == answer == info["answer"]
        return float(parser.parse_answer(completion) == answer)

    reward = resolve_reward(correct, parser=Parser(), conversational=True)
    assert reward("q", "it is 7", {"answer": "7"}) == 1.0
    assert resolve_reward(lambda completion: float(len(completion)))("q", "text") == 4.0


def test_coroutine_functions_of_every_kind_are_awaited_also_where_a_loop_runs():
    async def ours(prompt, response, meta=None):
        await asyncio.sleep(0)
        return 1.0

    async def trl(completions, **columns):
        await asyncio.sleep(0)
        return [2.0 for _ in completions]

    class Judge:
        async def __call__(self, prompt, response):
            return 3.0

    async def cell():
        return [resolve_reward(function)("q", "a") for function in (ours, trl, Judge())]

    assert asyncio.run(cell()) == [1.0, 2.0, 3.0]
    trajectories = [Trajectory("q", "a"), Trajectory("q", "b")]
    score(trajectories, resolve_reward(trl))
    assert [t.reward for t in trajectories] == [2.0, 2.0]


def test_a_reward_knows_whether_one_call_sees_several_prompts():
    batched = resolve_reward(lambda completions, **columns: [0.0])
    assert batched.batched
    assert not resolve_reward("exact_match").batched
    assert resolve_reward("composite", parts=[Part(batched), Part("exact_match")]).batched


def test_the_version_depends_on_source_and_keywords_alone():
    def threshold(limit):
        return resolve_reward(lambda prompt, response: float(len(response) > limit))

    first = resolve_reward("keyword_contains", keywords=["a"])
    assert first.version == resolve_reward("keyword_contains", keywords=["a"]).version
    assert first.version != resolve_reward("keyword_contains", keywords=["b"]).version
    assert first.version != resolve_reward("exact_match").version
    assert threshold(1).version == threshold(1).version != threshold(2).version
    assert len(first.version) == 12


def test_a_composite_adds_up_its_parts_by_weight():
    parts = {"exact_match": 1.0, "keyword_contains": 0.5}
    reward = resolve_reward("composite", parts=parts)
    meta = {"answer": "7", "keywords": "7"}
    assert reward("q", "7", meta) == 1.5
    (trajectory,) = scored(reward, ["no"], **meta)
    assert trajectory.reward == -0.25
    assert trajectory.reward_parts == {"exact_match": 0.0, "keyword_contains": -0.5}


def test_a_part_of_weight_0_is_a_metric_whose_failure_is_seen_but_does_not_unscore():
    parts = [
        {"reward": "exact_match", "kwargs": {"ignore_case": True}},
        {"reward": lambda p, r: 1 / 0, "weight": 0, "name": "judge", "true": True},
    ]
    (trajectory,) = scored(resolve_reward("composite", parts=parts), ["YES"], answer="yes")
    assert trajectory.reward == 1.0
    assert trajectory.reward_error == (
        'judge: ZeroDivisionError: division by zero (line 1 of <lambda>: {"reward": lambda p, r: 1 / 0, "weight": 0, '
        '"name": "judge", "true": True},)'
    )
    assert resolve_reward("composite", parts=parts).true == "judge"


def test_a_part_that_fails_unscores_the_whole_and_one_that_abstains_is_left_out():
    failing = resolve_reward("composite", parts=[Part("exact_match"), Part(lambda p, r: 1 / 0, name="bad")])
    (trajectory,) = scored(failing, answer="yes")
    assert trajectory.reward is None
    assert trajectory.reward_error.startswith("bad: ZeroDivisionError")
    abstaining = resolve_reward("composite", parts=[Part("exact_match"), Part(lambda p, r: None, 5.0)])
    assert scored(abstaining, answer="yes")[0].reward == 1.0
    assert scored(resolve_reward("composite", parts=[Part(lambda p, r: None)]))[0].reward is None


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ((), "needs parts"),
        ("exact_match", "needs parts"),
        ({"exact_match": 0.0}, "nothing to learn"),
        ({"exact_match": "1"}, "expected a number"),
        ([Part("exact_match"), Part("exact_match")], "two parts of one name"),
        ([Part("contains", true=True), Part("exact_match", true=True)], "more than one part with true=True"),
        ([{"reward": "exact_match", "wieght": 1}], "Did you mean 'weight'"),
        ([{"weight": 1}], "does not say which reward"),
        ({"exact_macth": 1.0}, "Did you mean 'exact_match'"),
    ],
)
def test_a_composite_that_cannot_work_is_refused(parts, match):
    with pytest.raises(ValidationError, match=match):
        resolve_reward("composite", parts=parts)


def test_an_exception_leaves_a_rollout_unscored_with_the_error_as_text():
    def fails_on_b(prompt, response, meta=None):
        return 1.0 if response == "a" else 1 / 0

    good, bad = scored(fails_on_b, ["a", "b"])
    assert (good.reward, good.reward_error) == (1.0, None)
    assert (bad.reward, bad.reward_error) == (
        None,
        'ZeroDivisionError: division by zero (line 2 of fails_on_b: return 1.0 if response == "a" else 1 / 0)',
    )


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
