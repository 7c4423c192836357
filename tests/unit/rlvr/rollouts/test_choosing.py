"""Policies that choose prompts: what they choose by, that chance is seeded, and what is refused."""

import json

import numpy as np
import pytest

from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr import AdaptivePrompts, CurriculumPrompts, DynamicSampling, PromptPolicy, PromptRecord
from tensafe_nb.rlvr.rollouts.choosing import prompt_policy_of, replacements, teaches
from tensafe_nb.rlvr.rollouts.prompts import PromptCursor

RIGHT, WRONG = np.ones(4), np.zeros(4)
HALF = np.array([1.0, 0, 1, 0])


def answered(cursor, rewards_of):
    """Take a step's prompts and answer them; return their numbers."""
    cursor.take()
    for number in cursor.taken:
        rewards = rewards_of(number)
        cursor.record.observe(number, rewards, rewards, 0.5)
    return list(cursor.taken)


def test_what_was_measured_counts_half_once_a_prompt_is_answered_again():
    record = PromptRecord(["a", "b"])
    record.observe(0, RIGHT, RIGHT, 0.5)
    record.observe(0, WRONG, WRONG, 0.5)
    assert record.solve_rate[0] == pytest.approx(2 / 6)  # 4 right ones count 2, of 2 + 4
    assert record.mean_reward[0] == pytest.approx(2 / 6)
    assert (record.times[0], record.chance[1]) == (2, 0.5)
    assert np.isnan(record.solve_rate[1])


def test_answers_that_were_not_scored_say_nothing_of_a_prompt_but_count_as_asked():
    record = PromptRecord(["a"])
    record.observe(0, np.full(4, np.nan), np.full(4, np.nan), 0.5)
    assert (record.times[0], record.scored[0]) == (1, 0)
    record.observe(0, np.array([1.0, np.nan]), np.array([1.0, np.nan]), 0.5)
    assert record.solve_rate[0] == 1


def test_what_was_measured_is_plain_data_and_comes_back_bit_for_bit():
    record, other = PromptRecord(list("abc")), PromptRecord(list("abc"))
    for rewards in (HALF / 3, RIGHT, HALF):
        record.observe(1, rewards, rewards, 0.3)
    other.load_state_dict(json.loads(json.dumps(record.state_dict())))
    for name in ("times", "scored", "solved", "total"):
        assert np.array_equal(getattr(record, name), getattr(other, name))
    other.load_state_dict({})  # of a checkpoint that knows none
    assert not other.times.any()
    assert not other.scored.any()


def test_what_was_measured_of_other_prompts_is_refused():
    record = PromptRecord(list("abc"))
    record.observe(0, RIGHT, RIGHT, 0.5)
    with pytest.raises(ValidationError, match="a run on 3 prompts; there are 4 now"):
        PromptRecord(list("abcd")).load_state_dict(record.state_dict())


def test_a_curriculum_measures_every_prompt_once_and_then_goes_from_easy_to_hard():
    cursor = PromptCursor([str(n) for n in range(40)], 8, seed=0, policy=CurriculumPrompts(passes=2))
    skill = np.linspace(0, 1, 40)  # the last ones are solved always

    def rewards_of(number):
        return (np.arange(10) < 10 * skill[number]).astype(float)

    first = [n for _ in range(5) for n in answered(cursor, rewards_of)]
    assert sorted(first) == list(range(40))
    assert first != sorted(first)
    means = [float(skill[answered(cursor, rewards_of)].mean()) for _ in range(15)]
    assert means[0] > 0.85
    assert means[0] > np.mean(means[2:6]) > np.mean(means[8:12])
    assert (cursor.record.times >= 2).all()  # in the end, none was left out


def test_a_curriculum_by_a_column_begins_with_the_smallest_and_says_what_is_missing():
    rows = [{"prompt": str(n), "level": n % 4} for n in range(16)]
    cursor = PromptCursor(rows, 4, seed=0, policy=CurriculumPrompts(by="level"))
    assert {row["level"] for row in cursor.take()} == {0}
    lacking = PromptCursor([{"prompt": "a", "levels": 1}], 1, seed=0, policy=CurriculumPrompts(by="level"))
    with pytest.raises(ValidationError, match=r"row 0: the column 'level' is None.* 'levels'"):
        lacking.take()


def test_adaptive_asks_most_for_what_is_half_solved_and_lets_no_prompt_starve():
    cursor = PromptCursor([str(n) for n in range(30)], 6, seed=0, policy=AdaptivePrompts(floor=0.1))
    kinds = [RIGHT, WRONG, HALF]  # ten of each
    counts = np.zeros(3)
    for _ in range(60):
        for number in answered(cursor, lambda n: kinds[n % 3]):
            counts[number % 3] += 1
    assert counts[2] > 1.6 * max(counts[:2])
    assert cursor.record.times.min() >= 1


def test_no_prompt_comes_twice_in_a_step_while_there_are_others():
    for policy in ("adaptive", "curriculum"):
        cursor = PromptCursor(list("abcdefgh"), 3, seed=1, policy=prompt_policy_of(policy))
        cursor.take()
        step = [*cursor.taken]
        for _ in range(2):
            cursor.take(instead_of=2)
            step += cursor.taken
        assert len(set(step)) == 7
        cursor.take(instead_of=3)  # one is left, two have to come again
        assert len(cursor.taken) == 3


@pytest.mark.parametrize("policy", ["uniform", "curriculum", "adaptive", "dynamic"])
def test_a_policy_chooses_the_same_again_from_the_same_place(policy):
    def cursor():
        return PromptCursor([str(n) for n in range(20)], 5, seed=3, policy=prompt_policy_of(policy))

    whole = cursor()
    steps = [answered(whole, lambda n: kinds_of(n)) for _ in range(8)]
    begun = cursor()
    assert [answered(begun, kinds_of) for _ in range(4)] == steps[:4]
    resumed = cursor()
    resumed.position = begun.position
    resumed.record.load_state_dict(json.loads(json.dumps(begun.record.state_dict())))
    assert [answered(resumed, kinds_of) for _ in range(4)] == steps[4:]


def kinds_of(number):
    return [RIGHT, WRONG, HALF][number % 3]


def test_groups_that_teach_nothing_are_told_by_the_reward_or_by_what_is_right():
    shaped = np.array([1.0, 0.9, 0.8, 1.0])  # all right, of different length
    assert teaches(DynamicSampling(), shaped, RIGHT)
    assert not teaches(DynamicSampling(on="true"), shaped, RIGHT)
    assert not teaches(DynamicSampling(), np.array([1.0, np.nan]), HALF)
    assert teaches(AdaptivePrompts(), HALF, HALF)


def test_a_policy_of_ones_own_is_a_class_with_one_method():
    class Hardest:
        replaces = 1

        def choose(self, seen, count, rng):
            return seen.first(np.argsort(seen.chance, kind="stable"), count)

        def keeps(self, rewards, scores):
            return scores.mean() < 0.9

    policy = Hardest()
    assert isinstance(policy, PromptPolicy)
    cursor = PromptCursor(list("abcd"), 2, seed=0, policy=policy)
    cursor.record.observe(0, RIGHT, RIGHT, 0.5)
    cursor.record.observe(3, WRONG, WRONG, 0.5)
    assert cursor.take() == ["d", "b"]
    assert (replacements(policy), teaches(policy, WRONG, WRONG)) == (1, True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("adaptve", "no prompt_policy 'adaptve'.* 'adaptive'"),
        (AdaptivePrompts, r"Call it: AdaptivePrompts\(\)"),
        (3, "neither a name"),
    ],
)
def test_what_is_no_policy_is_refused_with_what_would_be_one(spec, message):
    with pytest.raises(ValidationError, match=message):
        prompt_policy_of(spec)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptivePrompts(floor=0), "floor"),
        (lambda: DynamicSampling(rounds=0), "rounds"),
        (lambda: DynamicSampling(on="accuracy"), "on"),
        (lambda: DynamicSampling(base="best"), "no prompt_policy 'best'"),
        (lambda: CurriculumPrompts(start=2), "start"),
    ],
)
def test_options_of_a_policy_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValidationError, match=message):
        make()


@pytest.mark.parametrize("chosen", [[0], [0, 9], [0, -1], [0, 1.5], [True, 0]])
def test_what_a_policy_chooses_is_checked(chosen):
    class Odd:
        def choose(self, seen, count, rng):
            return chosen

    with pytest.raises(ValidationError, match="2 whole numbers from 0 to 2"):
        PromptCursor(list("abc"), 2, seed=0, policy=Odd()).take()
