"""The extras: math-verify's reward, wherever a run is driven from, and reasoning-gym's data sets."""

import sys
import threading

import pytest

from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr import Trajectory, resolve_reward
from tensafe_nb.rlvr.rollouts.prompts import gym_prompts
from tensafe_nb.rlvr.scoring.scorer import Scorer

EQUAL = [
    ("so \\boxed{0.5}", "1/2"),
    ("$\\frac{1}{2}$", "\\frac{1}{2}"),
    ("It is \\boxed{(1,2)} and not $3$.", "(1,2)"),
    ("the answer is 1,234", "1234"),
    ("$x^2+2x+1$", "$(x+1)^2$"),
]  # fmt: skip
UNEQUAL = [("\\boxed{3}, or 1/2", "1/2"), ("no idea", "7"), ("", "7")]


@pytest.mark.parametrize(("response", "answer"), EQUAL)
def test_what_is_mathematically_equal_scores_1(response, answer):
    assert resolve_reward("math")("q", response, {"answer": answer}) == 1.0


@pytest.mark.parametrize(("response", "answer"), UNEQUAL)
def test_what_is_not_equal_or_not_there_scores_0(response, answer):
    assert resolve_reward("math")("q", response, {"answer": answer}) == 0.0


def test_an_answer_without_mathematics_is_an_error_not_a_zero():
    with pytest.raises(ValidationError, match="the column 'answer' of this prompt is missing"):
        resolve_reward("math")("q", "7", {"answer": ""})


def test_it_works_when_the_run_is_driven_from_a_thread_that_is_not_the_main_one():
    rollouts = [Trajectory("q", response, {"answer": answer}) for response, answer in EQUAL + UNEQUAL]
    reports = []

    def drive():
        with Scorer("math", timeout=30, processes=1) as scorer:
            reports.append(scorer.score(rollouts))

    thread = threading.Thread(target=drive)
    thread.start()
    thread.join()
    assert reports[0].errors == 0
    assert [t.reward for t in rollouts] == [1.0] * len(EQUAL) + [0.0] * len(UNEQUAL)


def test_called_in_a_thread_of_the_kernel_it_works_as_well():
    scores = []
    reward = resolve_reward("math")
    thread = threading.Thread(target=lambda: scores.append(reward("q", "\\boxed{7}", {"answer": "7"})))
    thread.start()
    thread.join()
    assert scores == [1.0]


def test_without_the_extra_the_name_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.delitem(sys.modules, "tensafe_nb.rlvr.rewards.builtin.math", raising=False)
    with pytest.raises(ValidationError, match=r"pip install 'tensafe_nb\[math\]'"):
        resolve_reward("math")


def test_a_reasoning_gym_data_set_supplies_prompts_and_scores():
    import reasoning_gym

    dataset = reasoning_gym.create_dataset("spell_backward", size=4, seed=0, min_word_len=3)
    prompts = gym_prompts(dataset)
    assert [prompt["prompt"] for prompt in prompts] == [entry["question"] for entry in dataset]
    right = [
        Trajectory(p["prompt"], f" {p['answer']}\n", {k: p[k] for k in ("answer", "metadata")})
        for p in prompts
    ]
    wrong = [Trajectory(t.prompt, "?", t.meta) for t in right]
    with Scorer(dataset, timeout=30, processes=1) as scorer:
        report = scorer.score(right + wrong)
    assert report.errors == 0
    assert [t.reward for t in right] == [1.0] * 4
    assert all(t.reward <= 0.01 for t in wrong)  # reasoning-gym 0.1.5 gives any answer that much
    assert resolve_reward(dataset)("q", "abc", {"answer": "abc", "metadata": {}}) == 1.0


def test_prompts_without_the_gym_columns_are_refused_with_the_way_to_get_them():
    class Dataset:
        def score_answer(self, answer, entry):
            return 1.0

    with pytest.raises(ValidationError, match="gym_prompts"):
        resolve_reward(Dataset())("q", "a", {"answer": "a"})
    with pytest.raises(ValidationError, match="takes no keywords"):
        resolve_reward(Dataset(), weight=1)
