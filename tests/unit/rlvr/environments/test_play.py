"""A step's conversations: sampled together turn by turn, the same whatever its neighbours do, within limits."""

import dataclasses

import numpy as np
import pytest

from tensafe_nb import datasets
from tensafe_nb.config import TrainingConfig
from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr import (
    EnvironmentSampler,
    Outcome,
    RolloutEnded,
    TrajectoryBatch,
    Turn,
    environment,
    rescore,
)
from tests.unit.rlvr.clients import EngineClient

SUMS = datasets.sums(12, seed=0)
PAIRS = [{"sums": [first, second]} for first, second in zip(SUMS[::2], SUMS[1::2], strict=True)]


@pytest.fixture(scope="module")
def client():
    return EngineClient(TrainingConfig(model_ref="builtin:sums"))


def sampler(client, made="sums", *, group_size=2, max_new_tokens=4, seed=0, **options):
    return EnvironmentSampler(client, made, group_size, max_new_tokens, seed=seed, timeout=None, **options)


def played(client, rows, made="sums", **options):
    return sampler(client, made, **options).generate_trajectories(rows)


@environment
def asks(row):
    """Asks the same of every row; what is random is the policy alone."""
    for _ in range(row.get("turns", 2)):
        yield "12+34="
    return 1.0


def test_what_the_environment_says_is_an_input_and_counts_in_nothing(client):
    batch = played(client, PAIRS)
    for rollout in batch:
        ids = client.tokenizer(rollout.turns[2].text)["input_ids"]
        second = rollout.turns[2]
        assert rollout.tokens[second.start : second.stop] == ids
        assert [(t.role, t.trained) for t in rollout.turns] == [("user", False), ("assistant", True)] * 2
        assert sum(rollout.mask) == rollout.length == len(rollout.tokens) - len(ids)
        assert all((lp == 0) >= (not said) for lp, said in zip(rollout.logprobs, rollout.said, strict=True))
    assert batch.longest == 32, "eight turns of four tokens"
    assert list(batch.lengths) == [rollout.length for rollout in batch]


def test_a_rollout_is_the_same_whatever_its_neighbours_do(client):
    def words(batch):
        return {
            (group.prompt_id, n): r.tokens for group in batch.groups for n, r in enumerate(group.rollouts)
        }

    together = words(played(client, PAIRS))
    assert words(played(client, PAIRS[3:4])).items() <= together.items()
    assert words(played(client, PAIRS[::-1])) == together
    fewer = words(played(client, [PAIRS[0], PAIRS[1] | {"sums": PAIRS[1]["sums"][:1]}, *PAIRS[2:]]))
    assert len(fewer.keys() & together.keys()) == 2 * (len(PAIRS) - 1)
    assert all(fewer[key] == together[key] for key in fewer.keys() & together.keys())


def test_rows_that_begin_with_the_same_words_do_not_say_the_same(client):
    batch = played(client, [{"n": n} for n in range(8)], asks, group_size=4, temperature=3.0)
    assert len({tuple(rollout.tokens) for rollout in batch}) > 4
    again = played(client, [{"n": 0}] * 2, asks, group_size=4, temperature=3.0)
    assert [r.tokens for r in again.groups[0].rollouts] == [r.tokens for r in batch.groups[0].rollouts]
    assert [r.tokens for r in again.groups[1].rollouts] != [r.tokens for r in batch.groups[0].rollouts]


def test_logprobs_are_those_of_the_whole_conversation(client):
    """Token in, token out: what training reads of a transcript is what was sampled."""
    from tensafe_nb.rlvr.algorithms.packing import pack, unpack

    rollouts = list(played(client, PAIRS))
    scored = client.compute_logprobs(pack(rollouts, {})).result()
    width = max(len(rollout.tokens) for rollout in rollouts)
    for row, rollout in enumerate(rollouts):
        found = unpack(rollouts, scored.logprobs, width)[row, : len(rollout.tokens)]
        np.testing.assert_allclose(found, rollout.raw_logprobs, atol=1e-4)


def test_a_turn_that_is_cut_ends_the_rollout(client):
    @environment
    def goes_on(row):
        yield "12+34="
        yield "1+"
        return 1.0

    batch = played(client, [{}], goes_on, group_size=8, max_new_tokens=1)
    assert {(r.finish_reason, r.reward, r.reward_error, len(r.turns)) for r in batch} == {
        ("length", None, None, 2)
    }
    fixed = played(client, [{}], goes_on, max_new_tokens=2, fixed_length=True)
    assert {(r.finish_reason, r.reward, r.length) for r in fixed} == {("fixed", 1.0, 4)}


def test_limits_of_turns_and_of_tokens(client):
    three = dataclasses.replace(asks, max_turns=2)
    batch = played(client, [{"turns": 3}], three)
    assert all("max_turns were over" in rollout.reward_error for rollout in batch if not rollout.truncated)
    assert all(rollout.reward is None for rollout in batch)
    short = dataclasses.replace(asks, max_tokens=7)
    (only,) = played(client, [{"turns": 3}], short, group_size=1)
    assert (only.finish_reason, only.length) == ("length", 4)
    assert played(client, [{}], short).longest == 7


def test_rewards_of_turns_are_credited_to_the_turn_before_and_added_up(client):
    @environment
    def graded(row):
        yield "12+34="
        yield Turn("1+1=", reward=0.5, meta={"why": "nice"})
        return Outcome(0.25, {"form": 1}, {"kept": True})

    (rollout,) = played(client, [{}], graded, group_size=1, fixed_length=True)
    first, second = (turn for turn in rollout.turns if turn.role == "assistant")
    assert (first.reward, first.meta, second.reward, second.meta) == (
        0.5,
        {"why": "nice"},
        None,
        {"kept": True},
    )
    assert rollout.reward == 0.75
    assert rollout.reward_parts == {"graded": 0.75, "graded/form": 1.0}


def test_a_reward_before_the_first_turn_is_an_error_of_its_conversation(client):
    @environment
    def early(row):
        yield Turn("12+34=", reward=1)

    (rollout,) = played(client, [{}], early, group_size=1)
    assert "none before the first yield" in rollout.reward_error


def test_what_a_generator_raises_is_told_with_its_line_and_the_rollout_stays_unscored(client):
    @environment
    def falls(row):
        yield "12+34="
        return 1 / row["zero"]

    @environment
    def never_begins(row):
        yield row["missing"]

    (rollout,) = played(client, [{"zero": 0}], falls, group_size=1)
    assert (rollout.reward, rollout.reward_error) == (
        None,
        'ZeroDivisionError: division by zero (line 4 of falls: return 1 / row["zero"])',
    )

    @environment
    def says_nothing(row):
        yield ""

    (rollout,) = played(client, [{}], says_nothing, group_size=1)
    assert "what it tells first is empty" in rollout.reward_error
    (rollout,) = played(client, [{}], never_begins, group_size=1)
    assert (rollout.tokens, rollout.turns) == ([], [])
    assert "KeyError: 'missing' (line 3" in rollout.reward_error


def test_conversations_are_kept_and_read_back(client, tmp_path):
    batch = played(client, PAIRS[:1], group_size=2)
    back = TrajectoryBatch.load(batch.save(tmp_path / "rollouts.jsonl"))
    assert list(back) == list(batch)
    assert back.longest == batch.longest


def test_an_environment_judges_recorded_conversations_again(client):
    batch = played(client, PAIRS)
    again = rescore(batch, dataclasses.replace(sampler(client).environment), timeout=None)
    assert [r.reward for r in again] == [r.reward for r in batch]
    assert list(again) == list(batch)

    @environment(max_turns=8)
    def kinder(row):
        right = 0
        for question in row["sums"]:
            said = yield question["prompt"]
            right += said[:1].isdigit()
        return right

    @environment
    def another(row):
        yield "1+1="

    kind = rescore(batch, kinder, timeout=None)
    assert all(r.reward >= (b.reward or 0) for r, b in zip(kind, batch, strict=True) if r.reward is not None)
    other = rescore(batch, another, timeout=None)
    assert {r.reward_error for r in other} == {
        "in turn 1 it tells something else than is recorded: what was said does not answer it"
    }
    assert [r.reward for r in batch] == [r.reward for r in again], "the batch stays as it is"


def test_a_conversation_that_was_cut_gets_again_what_it_got(client):
    @environment
    def lenient(row):
        try:
            yield "12+34="
            yield "1+1="
        except RolloutEnded:
            return -1.0

    batch = played(client, [{}], lenient, max_new_tokens=1)
    assert (
        [r.reward for r in rescore(batch, lenient, timeout=None)] == [r.reward for r in batch] == [-1.0, -1.0]
    )


def test_rows_need_no_prompt_and_a_text_is_one(client):
    @environment
    def echoes(row):
        yield row.get("prompt", "1+1=")
        return 1.0

    prompts = [r.prompt for r in played(client, ["2+2=", {"n": 1}], echoes, group_size=1)]
    assert prompts == ["2+2=", "1+1="]
    with pytest.raises(ValidationError, match="a row of an environment is a dict of columns"):
        played(client, [3], echoes)
