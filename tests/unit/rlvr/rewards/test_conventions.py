"""Reward functions as people have them: TRL's, verl's, verifiers' and their own, on texts and on chat messages."""

import functools
import re
import threading
from decimal import Decimal

import numpy as np
import pytest

from tensafe_nb.config import SamplingConfig
from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr import MockRolloutSampler, Part, Trajectory, TrajectoryBatch, rescore, resolve_reward
from tensafe_nb.rlvr.rewards.conventions import Conversation, TrainerState
from tensafe_nb.rlvr.scoring.scorer import Scorer, score

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Capital of France?"},
    {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]},
    {"role": "tool", "content": "Paris"},
    {"role": "user", "content": [{"type": "text", "text": "And of "}, {"type": "text", "text": "Italy?"}]},
]


def chat(response="Rome", **meta):
    text = "Be brief.\nCapital of France?\n\nParis\nAnd of Italy?"
    return Trajectory(text, response, meta, messages=TURNS)


def scored(function, *trajectories, **options):
    trajectories = trajectories or (Trajectory("q", "Rome", {"answer": "Rome"}),)
    report = score(trajectories, resolve_reward(function, **options))
    return trajectories, report


def rewards(function, *trajectories, **options):
    found, _ = scored(function, *trajectories, **options)
    assert [t.reward_error for t in found] == [None] * len(found)
    return [t.reward for t in found]


def error(function, *trajectories, **options):
    found, _ = scored(function, *trajectories, **options)
    assert found[0].reward is None
    return found[0].reward_error


def test_messages_reach_every_kind_of_function_as_they_were_given():
    def trl(prompts, completions, **columns):
        return [
            float(p == TURNS and c[0]["role"] == "assistant")
            for p, c in zip(prompts, completions, strict=True)
        ]

    def verifiers(prompt, completion, state):
        return float(prompt == TURNS == state["prompt"] and completion[-1]["content"] == "Rome")

    def verl(solution_str, ground_truth, prompt):
        return float(prompt == TURNS and solution_str == ground_truth)

    def ours(prompt, response, meta=None):
        return float(prompt == TURNS and [m["role"] for m in prompt][:2] == ["system", "user"])

    async def judge(prompt, response, meta=None):
        return float(prompt[-1]["content"][1]["text"] == "Italy?")

    for function in (trl, verifiers, verl, ours, judge):
        assert rewards(function, chat(answer="Rome")) == [1.0], function.__name__
        with Scorer(function, processes=1) as scorer:
            trajectory = chat(answer="Rome")
            scorer.score([trajectory])
            assert (trajectory.reward, trajectory.reward_error) == (1.0, None), function.__name__


def test_texts_reach_them_as_texts_and_a_declared_text_stays_one():
    def declared(prompt: str, response: str, meta=None) -> float:
        return float(prompt.splitlines()[-1] == "And of Italy?")

    assert rewards(declared, chat()) == [1.0]
    assert rewards(lambda prompts, completions: [float(prompts == ["q"] and completions == ["Rome"])]) == [
        1.0
    ]
    assert rewards(lambda prompt, response: float(prompt == "q")) == [1.0]
    texts = resolve_reward(
        lambda completions, **columns: [len(text) for text in completions], conversational=False
    )
    assert rewards(texts, chat()) == [4.0]


def test_prompts_of_both_kinds_in_one_step_each_go_as_they_are():
    def kinds(prompts, completions):
        return [float(isinstance(prompt, list)) for prompt in prompts]

    assert rewards(kinds, chat(), Trajectory("q", "a")) == [1.0, 0.0]


def test_messages_survive_sampling_storing_and_scoring_again(tmp_path):
    batch = MockRolloutSampler(seed=0, group_size=2).generate_trajectories(
        [{"prompt": TURNS[:2], "answer": "Paris"}, "q"]
    )
    loaded = TrajectoryBatch.load(batch.save(tmp_path / "rollouts.jsonl"))

    def last(prompts, completions, **columns):
        return [float(isinstance(p, list) and p[-1]["content"] == "Capital of France?") for p in prompts]

    for given in (batch, loaded):
        assert rescore(given, last).rewards.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_messages_answer_to_questions_asked_of_texts_rather_than_deny_them():
    said = Conversation(TURNS)
    assert "Italy?" in said
    assert TURNS[0] in said
    assert said == TURNS
    assert str(said) == "Be brief.\nCapital of France?\n\nParis\nAnd of Italy?"
    assert Conversation([{"role": "assistant", "content": "Rome"}]) == "Rome"
    assert said != "Rome"
    assert said.count("of") == 2
    assert said.count(TURNS[0]) == said.index(TURNS[1]) == 1
    assert ("<think>" + said).startswith("<think>Be brief.")
    assert (said + "!").endswith("Italy?!")
    assert said + TURNS[:1] == [*TURNS, TURNS[0]]
    assert said.split("\n")[3] == "Paris"
    with pytest.raises(AttributeError, match="neither has its text"):
        said.tolist()
    assert rewards(lambda completions, answer: [float(a in c) for a, c in zip(answer, completions, strict=True)],
                   chat("It is Rome.", answer="Rome")) == [1.0]  # fmt: skip


def test_a_function_that_takes_one_for_the_other_is_told_how_they_came():
    def as_chat(completions, **columns):
        return [float(completion[0]["content"] == "Rome") for completion in completions]

    def as_text(completion, answer):
        return float(re.fullmatch(answer, completion) is not None)

    def fails(prompt, response):
        return 1 / 0

    assert "conversational=True" in error(as_chat)
    assert rewards(as_chat, conversational=True) == [1.0]
    assert "conversational=False" in error(as_text, chat(answer="Rome"))
    assert "prompt: str" in error(lambda prompt, response: float(re.search("x", prompt) is None), chat())
    assert "messages" not in error(fails, chat())


def test_called_by_hand_a_reward_takes_messages_too():
    reward = resolve_reward(
        lambda prompts, completions: [float(p[-1]["content"] == "Capital of France?") for p in prompts]
    )
    assert reward(TURNS[:2], "Paris") == 1.0


def test_trl_functions_learn_where_the_run_stands_and_metrics_are_averaged():
    def early(completions, trainer_state, log_metric, log_extra, **columns):
        log_metric("mean_length", 1.0)
        log_metric("mean_length", 3.0)
        log_extra("length", [len(text) for text in completions])
        return [trainer_state.global_step / trainer_state.max_steps for _ in completions]

    trajectories = [Trajectory("q", "a"), Trajectory("q", "bb")]
    with Scorer(early, processes=1) as scorer:
        scorer.score(trajectories, TrainerState(3, 12))
    assert [t.reward for t in trajectories] == [0.25, 0.25]
    assert trajectories[1].reward_parts == {"early": 0.25, "early/mean_length": 2.0, "early/length": 2.0}
    assert "no 'epoch'" in error(lambda completions, trainer_state: [trainer_state.epoch])


def test_what_trl_functions_return_in_other_shapes():
    def unequal(completions, log_extra):
        log_extra("x", [1])
        return [1.0] * len(completions)

    two = [Trajectory("q", "a"), Trajectory("q", "b")]
    assert rewards(lambda completions: (float(len(c)) for c in completions), *two) == [1.0, 1.0]
    assert rewards(lambda completions: (None, 2), *two) == [None, 2.0]
    assert "1 values for 2 completions" in error(unequal, *two)
    assert "it returned 1 rewards for 2" in error(lambda completions: [1.0], *two)
    assert "expected a list" in error(lambda completions: {1.0, 2.0}, *two)


def test_verls_batch_functions_get_columns():
    def compute_score(data_sources, solution_strs, ground_truths, extra_infos, **kwargs):
        return [
            {"score": float(s == g), "source": d}
            for d, s, g in zip(data_sources, solution_strs, ground_truths, strict=True)
        ]

    right = Trajectory(
        "q", "7", {"data_source": "gsm8k", "reward_model": {"ground_truth": "7"}, "extra_info": {}}
    )
    assert rewards(compute_score, right, Trajectory("q", "8", {"answer": "7"})) == [1.0, 0.0]
    assert "have no ground truth" in error(compute_score, Trajectory("q", "7", {"answer": None}))


@pytest.mark.parametrize("gold", [None, float("nan"), "", [], np.array(None), np.array([])], ids=repr)
def test_a_missing_right_answer_reaches_no_function_of_one_completion_as_text(gold):
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        return float(str(ground_truth) in solution_str)

    def correct(completion, answer):
        return float(str(answer) in completion)

    row = {"reward_model": {"style": "rule", "ground_truth": gold}}
    for columns in ({"ground_truth": gold}, {"answer": gold}, row):
        assert "asks for ground_truth" in error(compute_score, Trajectory("q", "None nan", columns))
    assert "asks for answer" in error(correct, Trajectory("q", "None nan", {"answer": gold}))


def test_a_missing_value_of_pandas_is_a_missing_ground_truth_and_an_array_or_0_is_one():
    pandas = pytest.importorskip("pandas")

    def compute_score(solution_str, ground_truth):
        return float(solution_str in map(str, np.atleast_1d(ground_truth)))

    assert "asks for ground_truth" in error(compute_score, Trajectory("q", "7", {"ground_truth": pandas.NA}))
    several = Trajectory("q", "7", {"ground_truth": np.array(["6", "7"])})
    zero = Trajectory("q", "0", {"ground_truth": 0})
    unread = Trajectory("q", "7", {"ground_truth": "7", "reward_model": "llama"})
    assert rewards(compute_score, several, zero, unread) == [1.0, 1.0, 1.0]


def test_a_function_of_one_completion_gets_columns_by_name_and_any_other_keyword():
    def judged(completion, ground_truth):
        return float(completion == ground_truth)

    def rubric(prompt, completion, answer, state, task, info, **kw):
        return float(completion == answer == state["answer"] == info["answer"] == kw["level"])

    assert rewards(judged, Trajectory("q", "Rome", {"ground_truth": "Rome"})) == [1.0]
    assert "asks for ground_truth" in error(judged)
    assert rewards(rubric, Trajectory("q", "Rome", {"answer": "Rome", "level": "Rome"})) == [1.0]


@pytest.mark.parametrize(
    "function",
    [
        lambda response, answer: 1.0,
        lambda text, target: 1.0,
        lambda output, expected: 1.0,
        lambda response, prompt: 1.0,
        lambda question, ground_truth: 1.0,
        lambda prompt, response, gold: 1.0,
        lambda completion, response: 1.0,
    ],
)
def test_parameters_in_another_order_are_refused_rather_than_filled_with_something_else(function):
    with pytest.raises(ValidationError, match="The prompt comes first, the response second"):
        resolve_reward(function)


def test_columns_reach_a_function_of_ours_that_takes_any_keyword():
    def reward(prompt, response, **columns):
        return float(response == columns["answer"])

    assert rewards(reward) == [1.0]


class Rubric:
    """As verifiers has them."""

    def __init__(self):
        self.funcs, self.weights = [lambda completion: 1.0], [1.0]


class Judge:
    def score(self, prompt, response):
        return len(response)

    async def trace(self, trace):
        return 1.0


def yields(prompt, response):
    yield 1.0


def hidden(*args, **kwargs):
    return 1.0


async def v1(task, trace):
    return 1.0


def with_environments(completions, environments):
    return [0.0]


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (Judge, r"is a class: give an object of it, Judge\("),
        (Judge.score, r"method without its object"),
        (Judge.trace, r"async def trace\(completion, answer\)"),
        (Judge().trace, r"async def trace\(completion, answer\)"),
        (v1, r"verifiers v1"),
        (yields, "yields: a reward returns its number"),
        (hidden, "functools.wraps"),
        (with_environments, "environments, which are TRL's"),
        (Rubric(), r"resolve_reward\(rubric.funcs, weights=rubric.weights\)"),
        (max, "wrap it, lambda prompt, response"),
        (3, "callable"),
        (None, "callable"),
    ],
)  # fmt: skip
def test_what_cannot_be_called_for_a_score_is_refused_at_the_call_with_what_would_do(function, match):
    with pytest.raises(ValidationError, match=match):
        resolve_reward(function)


def test_methods_objects_partials_and_decorated_functions_are_called_and_named_as_a_person_would():
    def target(prompt, response, *, word):
        return float(response == word)

    def doubled(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return 2 * function(*args, **kwargs)

        return wrapper

    async def slow(prompt, response):
        return 1.0

    @functools.wraps(slow)
    def passing(*args):
        return slow(*args)

    assert rewards(Judge().score) == [4.0]
    assert rewards(functools.partial(target, word="Rome")) == [1.0]
    assert resolve_reward(functools.partial(target, word="x")).name == "target"
    assert rewards(doubled(lambda prompt, response: 1.5)) == [3.0]
    assert rewards(passing) == [1.0]
    assert "async def" in error(lambda prompt, response: slow(prompt, response))


def test_a_decimal_is_a_number_and_a_tuple_or_bytes_are_none():
    assert rewards(lambda prompt, response: Decimal("0.25")) == [0.25]
    assert "expected a finite number" in error(lambda prompt, response: (1.0, "why"))
    assert "expected a finite number" in error(lambda prompt, response: b"1")
    assert "expected a finite number" in error(lambda prompt, response: 10**400)


def short(prompt, response, meta=None):
    return float(len(response) < 5)


def loud(prompt, response, meta=None):
    return float(response.isupper())


@pytest.mark.parametrize(
    ("given", "options", "parts"),
    [
        ([short, loud, "exact_match"], {}, {"short": 1, "loud": 1, "exact_match": 1}),
        ((short, (loud, 0.5)), {}, {"short": 1, "loud": 0.5}),
        ([short, loud], {"weights": [0.7, 0.3]}, {"short": 0.7, "loud": 0.3}),
        ({"exact_match": 0.7, short: 0.3}, {}, {"exact_match": 0.7, "short": 0.3}),
        ({"brief": short, "shouting": (loud, 0.2)}, {}, {"brief": 1, "shouting": 0.2}),
        ({"brief": Part(short, 0.1), "right": resolve_reward("exact_match")}, {}, {"brief": 0.1, "right": 1}),
        ([Part("exact_match", 2.0), {"reward": short, "weight": 0.5}], {}, {"exact_match": 2, "short": 0.5}),
    ],
)
def test_several_rewards_come_as_a_list_or_a_dict_with_weights(given, options, parts):
    reward = resolve_reward(given, **options)
    assert {part.name: part.weight for part in reward.parts} == parts
    trajectory = Trajectory("q", "Rome", {"answer": "Rome"})
    score([trajectory], reward)
    own = {"loud": 0.0, "shouting": 0.0}
    assert trajectory.reward == pytest.approx(sum(w * own.get(name, 1.0) for name, w in parts.items()))


@pytest.mark.parametrize(
    ("given", "options", "match"),
    [
        ([], {}, "needs parts"),
        ([short, short], {}, r'\{"first": f, "second": g\}'),
        ([short, loud], {"weights": [1.0]}, "give one for each"),
        ({short: 1.0}, {"weights": [1.0]}, "goes with a list"),
        ({"exact_match": float("inf")}, {}, "expected a number"),
        ({"exact_match": "0.5"}, {}, "expected a number"),
        ([short, "exact_macth"], {}, "Did you mean 'exact_match'"),
        ([short], {"weihgts": [1.0]}, "no keyword 'weihgts'"),
    ],
)
def test_several_rewards_that_cannot_work_are_refused_with_what_would(given, options, match):
    with pytest.raises(ValidationError, match=match):
        resolve_reward(given, **options)


GOLD = {
    "exact_match": {}, "contains": {}, "numeric_match": {}, "levenshtein": {}, "lcs_ratio": {}, "math": {},
    "countdown": {}, "json_schema": {}, "python_code": {},
}  # fmt: skip
MISSING = [
    {},
    {"answer": None},
    {"answer": float("nan")},
    {"answer": "  "},
    {"answer": []},
    {"answer": [None]},
    {"answer": np.array(None)},
    {"answer": np.array(float("nan"))},
]


@pytest.mark.parametrize("meta", MISSING, ids=str)
@pytest.mark.parametrize("name", GOLD)
def test_a_missing_right_answer_is_an_error_of_its_row_in_every_built_in_that_needs_one(name, meta):
    if name == "math":
        pytest.importorskip("math_verify")
    columns = {"countdown": "numbers", "json_schema": "schema", "python_code": "tests"}
    row = {columns.get(name, key): value for key, value in meta.items()} | {"target": 1}
    trajectories = [Trajectory("q", "None nan", row), Trajectory("q", "None nan", dict(row))]
    report = score(trajectories, resolve_reward(name))
    assert [t.reward for t in trajectories] == [None, None]
    assert report.errors == 2


def test_missing_values_of_frames_and_numbers_that_a_frame_made_floats():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"answer": [12, None]})
    rows = [Trajectory("q", "12", {"answer": value}) for value in frame["answer"]]
    rows += [Trajectory("q", "12", {"answer": pandas.NA}), Trajectory("q", "12", {"answer": pandas.NaT})]
    score(rows, resolve_reward("exact_match"))
    assert [t.reward for t in rows] == [1.0, None, None, None]


@pytest.mark.parametrize(
    "name", ["exact_match", "contains", "numeric_match", "levenshtein", "lcs_ratio", "math"]
)
def test_a_list_of_right_answers_means_any_of_them(name):
    if name == "math":
        pytest.importorskip("math_verify")
    reward = resolve_reward(name)
    for answers in (["11", "12"], ("11", "12"), np.array(["11", "12"])):
        assert reward("q", "12", {"answer": answers}) == 1.0
        assert reward("q", "zz 3", {"answer": answers}) < 1.0
    with pytest.raises(ValidationError, match="expected a text or a number"):
        reward("q", "12", {"answer": {"text": ["12"]}})


def test_a_weight_is_any_real_number():
    parts = resolve_reward({"exact_match": np.float32(0.5), "contains": np.int64(2)}).parts
    assert [part.weight for part in parts] == [0.5, 2.0]


def test_what_a_function_changes_of_its_prompt_reaches_no_other_rollout():
    def ours(prompt, response, meta):
        right = meta["answer"] == "Rome" and len(prompt) == len(TURNS) and prompt[0]["content"] == "Be brief."
        meta["answer"], prompt[0]["content"] = "Milan", "Be long."
        prompt.clear()
        return float(right)

    async def later(completion, answer, info):
        info["seen"] = info.get("seen", 0) + 1
        return float(info["seen"] == 1)

    def trl(prompts, completions, **columns):
        for prompt in prompts:
            prompt[0]["role"] = "assistant"
        return [float(prompt[0]["role"] == "assistant") for prompt in prompts]

    shared = {"answer": "Rome", "info": {}}
    batch = [Trajectory("q", "Rome", shared, messages=TURNS) for _ in range(2)]
    for function in (ours, later, trl, ours):
        assert rewards(function, *batch) == [1.0, 1.0]
    assert shared == {"answer": "Rome", "info": {}} and TURNS[0] == {"role": "system", "content": "Be brief."}


def test_a_column_that_cannot_be_copied_still_reaches_the_function():
    lock = threading.Lock()
    assert rewards(
        lambda prompt, response, meta: float(meta["lock"] is lock), Trajectory("q", "a", {"lock": lock})
    ) == [1.0]


def test_an_exception_without_a_text_is_an_error_of_its_row():
    class Mute(Exception):
        def __str__(self):
            raise ValueError

    def fails(prompt, response):
        raise Mute

    assert "Mute" in error(fails)


def test_a_batch_without_messages_is_read_as_before():
    group = MockRolloutSampler(seed=1).generate_trajectories(["q"]).groups
    assert TrajectoryBatch(group, SamplingConfig())[0].messages is None
