"""Rollouts in the panel: which are pushed, which are asked for, and what is told of each answer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tensafe_nb.config import SamplingConfig
from tensafe_nb.events import Rollouts
from tensafe_nb.rlvr.rollouts.trajectories import RolloutGroup, Trajectory, TrajectoryBatch, TurnRecord
from tensafe_nb.widgets.feed import rollouts

from .conftest import FakeClient, HandFlusher, Wire


def beside(client: FakeClient) -> Path:
    """Return where the rollouts of the client's first run lie."""
    return client.history.path.parent / "rollouts" / "1"


def rollouts_of(path: Path, answers: dict[str, float | None], **fields: Any) -> Path:
    """Write the rollouts of one prompt and return where they lie."""
    made = [
        Trajectory("2+2=", text, reward=reward, tokens=[ord(c) for c in text], policy_version=7, **fields)
        for text, reward in answers.items()
    ]
    rewards = [t.reward for t in made if t.reward is not None]
    for trajectory in made:
        if trajectory.reward is not None:
            trajectory.advantage = trajectory.reward - sum(rewards) / len(rewards)
    batch = TrajectoryBatch([RolloutGroup("p", "2+2=", made)], SamplingConfig())
    path.parent.mkdir(parents=True, exist_ok=True)
    return batch.save(path)


def test_the_newest_rollouts_are_pushed_once_in_two_seconds_at_most(
    client: FakeClient, wire: Wire, flusher: HandFlusher
) -> None:
    wire.mount()
    for step in (1, 2):
        path = rollouts_of(beside(client) / f"{step}", {"4": 1.0, "5": 0.0})
        client.publish(Rollouts(run_id="tc-1/1", step=step, rollouts=2, path=f"1/{path.name}"))
        told = [*wire.flush(), *wire.flush()]
        assert [content["step"] for content in told if content["t"] == "rollouts"] == [1] * (step == 1)
    assert wire.again == 2.0
    flusher.time += 2.0
    told = [*wire.flush(), *wire.flush()]
    assert [content["step"] for content in told if content["t"] == "rollouts"] == [2]


def test_groups_with_signal_come_first_and_each_has_its_prompts_name(tmp_path: Path) -> None:
    groups = [
        RolloutGroup(name, name, [Trajectory(name, "x", reward=reward) for reward in rewards])
        for name, rewards in {
            "dull": (0.0, 0.0),
            "a": (0.0, 1.0),
            "flat": (1.0, 1.0),
            "b": (1.0, 0.0),
        }.items()
    ]
    path = TrajectoryBatch(groups, SamplingConfig()).save(tmp_path / "r")
    told = rollouts.message(1, path, None, rollouts.ASKED)
    assert [group["id"] for group in told["groups"]] == ["a", "b", "dull", "flat"]
    asked = rollouts.message(1, path, None, rollouts.ASKED, held_out=True)
    assert [group["id"] for group in asked["groups"]] == ["dull", "a", "flat", "b"]


def test_answers_to_held_out_prompts_are_asked_for_by_step_and_say_which_one_was_greedy(
    client: FakeClient, wire: Wire
) -> None:
    for step, rewards in {0: (0.0, 0.0, 1.0), 20: (1.0, 1.0, 1.0)}.items():
        answers = [Trajectory("2+2=", f"{reward}", reward=reward) for reward in rewards]
        path = beside(client) / f"held-out-{step}"
        path.parent.mkdir(parents=True, exist_ok=True)
        TrajectoryBatch([RolloutGroup("p", "2+2=", answers)], SamplingConfig()).save(path)
        client.publish(Rollouts(run_id="tc-1/1", step=step, rollouts=3, path=f"1/{path.name}", held_out=True))
    path = rollouts_of(beside(client) / "20", {"4": 1.0, "5": 0.0})
    client.publish(Rollouts(run_id="tc-1/1", step=20, rollouts=2, path="1/20"))
    wire.mount()
    [pushed] = [content for content in wire.flush() if content["t"] == "rollouts"]
    assert (pushed["held"], pushed["evaluated"]) == (False, [0, 20])
    wire.page_says(t="show", step=0, held=True)
    [told] = [content for content in [*wire.flush(), *wire.flush()] if content["t"] == "rollouts"]
    assert (told["step"], told["held"]) == (0, True)
    [group] = told["groups"]
    assert group["mean"] == 0.5, "of the sampled answers: the greedy one is another measure"
    assert [rollout.get("greedy", False) for rollout in group["r"]] == [True, False, False]
    assert "why" not in group["r"][0]


def test_a_character_of_several_tokens_is_shown_whole_at_the_last_of_them() -> None:
    def decode(ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    assert rollouts.pieces(decode, list("aé🐈b".encode())) == ["a", "", "é", "", "", "", "🐈", "b"]
    assert rollouts.pieces(decode, [0xC3]) == ["\N{REPLACEMENT CHARACTER}"]
    assert rollouts.pieces(decode, []) == []


def test_an_older_step_is_shown_on_request_and_a_missing_one_with_the_reason(
    client: FakeClient, wire: Wire, tmp_path: Path
) -> None:
    path = rollouts_of(beside(client) / "1", {"4": 1.0, "5": 0.0})
    client.publish(Rollouts(run_id="tc-1/1", step=1, rollouts=2, path=str(path)))  # as 0.1 wrote it
    client.publish(Rollouts(run_id="tc-1/1", step=2, rollouts=2, path="1/gone"))
    wire.mount()
    for step in (1, 2, 3):
        wire.page_says(t="show", step=step)
    told = [*wire.flush_kind("rollouts"), *wire.flush_kind("rollouts")]
    shown = {content["step"]: content for content in told}
    assert [rollout["text"] for rollout in shown[1]["groups"][0]["r"]] == ["4", "5"]
    assert "cannot be read" in shown[2]["why"]
    assert "No rollouts were recorded for step 3" in shown[3]["why"]


def test_rollouts_are_told_with_everything_there_is_to_know(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    path = rollouts_of(tmp_path / "r", {evil: 1.0, "5": 0.0}, finish_reason="stop")
    told = rollouts.message(3, path, lambda ids: [chr(i) for i in ids], rollouts.PUSHED)
    [first, second] = told["groups"][0]["r"]
    assert first["text"] == evil
    assert (first["reward"], first["adv"], first["end"], first["policy"]) == (1.0, 0.5, "stop", 7)
    assert second["tok"] == [["5", None]]
    assert "why" not in first
    json.dumps(told, allow_nan=False)


def test_a_group_says_how_often_it_was_asked_before_and_a_step_what_it_threw_away(tmp_path: Path) -> None:
    known = RolloutGroup("a", "a", [Trajectory("a", "x", reward=1.0)], answered=3, solve_rate=0.25)
    new = RolloutGroup("b", "b", [Trajectory("b", "x", reward=0.0)], answered=0)
    path = TrajectoryBatch([known, new], SamplingConfig(), thrown_away=2).save(tmp_path / "r")
    told = rollouts.message(1, path, None, rollouts.ASKED)
    assert (told["thrown_away"], told["groups"][0]["answered"], told["groups"][0]["rate"]) == (2, 3, 0.25)
    assert "answered" not in told["groups"][1]
    plain = rollouts_of(tmp_path / "p", {"a": 1.0})
    assert "thrown_away" not in rollouts.message(1, plain, None, rollouts.ASKED)


@pytest.mark.parametrize(
    ("answers", "fields", "words"),
    [
        ({"a": 1.0, "b": 1.0}, {}, "scored the same"),
        ({"a": 0.0, "b": 1.0, "c": 0.5}, {}, None),
        ({"a": None, "b": 1.0}, {"reward_error": "boom"}, "not scored"),
        ({"a": 0.0, "b": 1.0}, {"finish_reason": "length"}, "cut at max_new_tokens"),
    ],
)
def test_why_zero_is_answered(
    tmp_path: Path, answers: dict[str, float | None], fields: dict[str, Any], words: str | None
) -> None:
    told = rollouts.message(1, rollouts_of(tmp_path / "r", answers, **fields), None, 10_000)
    why = told["groups"][0]["r"][0].get("why")
    assert (words in why) if words else why is None


def test_long_texts_are_cut_and_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    groups = [
        RolloutGroup(str(i), "p" * 5_000, [Trajectory("p", "x" * 5_000, reward=1.0)]) for i in range(100)
    ]
    path = TrajectoryBatch(groups, SamplingConfig()).save(tmp_path / "r")
    told = rollouts.message(1, str(path), None, rollouts.PUSHED)
    assert len(json.dumps(told)) <= rollouts.PUSHED
    assert told["left_out"] == 100 - len(told["groups"]) > 0
    assert "3000 more characters" in told["groups"][0]["prompt"]


def test_samples_in_the_file_are_escaped_and_show_what_is_invisible(tmp_path: Path) -> None:
    path = rollouts_of(tmp_path / "r", {"<b>\u202e": 1.0, "5": 0.0})
    html = rollouts.frozen(3, path, prompts=1)["text/html"]
    assert "&lt;b&gt;⟨U+202E⟩" in html


def conversation(path: Path, **fields: Any) -> Path:
    """Write a conversation in which a tool is called, and one of another prompt; return where they lie."""
    call = {"calls": [{"name": "add", "arguments": {"a": 2, "b": "<b>"}, "ok": False}]}
    turns = [
        TurnRecord("user", "2+2?"),
        TurnRecord("assistant", "ab", 0, 2, True, 0.5, call),
        TurnRecord("tool", "Error: <i>", 2, 5, meta={"name": "add"}),
        TurnRecord("assistant", "c", 5, 6, True),
    ]
    made = Trajectory(
        "2+2?", "ab\n[tool] Error: <i>\nc", tokens=[ord(c) for c in "ab|t|c"], mask=[1, 1, 0, 0, 0, 1], turns=turns,
        reward=1.0, advantage=[0.5, 0.25, 9.0, 9.0, 9.0, -0.75], **fields,
    )  # fmt: skip
    batch = TrajectoryBatch([RolloutGroup("p", "2+2?", [made])], SamplingConfig())
    return batch.save(path)


def test_a_conversation_is_told_turn_by_turn_with_advantages_where_the_policy_speaks(tmp_path: Path) -> None:
    told = rollouts.message(
        1, conversation(tmp_path / "r"), lambda ids: [chr(i) for i in ids], rollouts.ASKED
    )
    (shown,) = told["groups"][0]["r"]
    assert shown["turns"] == [
        {
            "who": "assistant", "text": "ab", "n": 2, "tok": [["a", 0.5], ["b", 0.25]], "reward": 0.5,
            "calls": [["add(a=2, b='<b>')", False]],
        },
        {"who": "tool", "text": "Error: <i>", "n": 3, "name": "add"},
        {"who": "assistant", "text": "c", "n": 1, "tok": [["c", -0.75]]},
    ]  # fmt: skip
    assert shown["n"] == 3 and shown["adv"] == 0.0 and "tok" not in shown


def test_what_was_told_first_is_shown_where_it_is_not_the_groups_prompt(tmp_path: Path) -> None:
    path = conversation(tmp_path / "r")
    batch = TrajectoryBatch.load(path)
    batch.groups[0].prompt = "another one"
    batch.save(path)
    (shown,) = rollouts.message(1, path, None, rollouts.ASKED)["groups"][0]["r"]
    assert (shown["turns"][0]["who"], shown["turns"][0]["text"]) == ("user", "2+2?")
    assert "tok" not in shown["turns"][1]


def test_a_picture_of_conversations_says_who_speaks_and_escapes_it(tmp_path: Path) -> None:
    html = rollouts.frozen(1, conversation(tmp_path / "r"), 1)["text/html"]
    assert "<b>assistant</b> ab<br><b>add</b> Error: &lt;i&gt;<br><b>assistant</b> c" in html


def test_long_conversations_are_coloured_at_their_beginning_only(tmp_path: Path) -> None:
    size = rollouts.MOST_TOKENS // 2
    turns = [TurnRecord("assistant", "x" * size, size * n, size * (n + 1), True) for n in range(4)]
    made = Trajectory("?", "x", tokens=[120] * (4 * size), turns=turns, reward=0.0)
    path = TrajectoryBatch([RolloutGroup("p", "?", [made])], SamplingConfig()).save(tmp_path / "r")
    (shown,) = rollouts.message(1, path, lambda ids: [chr(i) for i in ids], rollouts.ASKED)["groups"][0]["r"]
    assert ["tok" in turn for turn in shown["turns"]] == [True, True, False, False]
