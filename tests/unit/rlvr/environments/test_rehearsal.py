"""Environments tried out without a model."""

from typing import Any

import pytest

from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr.environments.environment import Outcome, RolloutEnded, Turn, environment
from tensafe_nb.rlvr.environments.rehearsal import rehearse
from tensafe_nb.rlvr.environments.tool_use import tool_environment
from tensafe_nb.rlvr.tools import calculator


@environment(max_turns=3)
def guess(row: dict[str, Any]) -> Any:
    said = yield "Guess."
    for turn in range(9):
        if said == str(row["n"]):
            return Outcome(1.0, {"turns": turn + 1})
        said = yield Turn("Higher." if int(said) < row["n"] else "Lower.", reward=-0.1)
    return 0.0


def test_what_was_said_and_what_came_of_it() -> None:
    played = rehearse(guess, {"n": 7}, ["10", "7"])
    assert [one["content"] for one in played.messages] == ["Guess.", "10", "Lower.", "7"]
    assert played.rewards == {1: -0.1} and played.outcome == Outcome(1.0, {"turns": 2.0})
    assert played.reward == pytest.approx(0.9)
    assert repr(played) == "user: Guess.\nassistant: 10\nuser: Lower.\nassistant: 7\nreward 0.9, turns 2"
    assert "Lower." in played._repr_html_()  # type: ignore[attr-defined]


def test_a_function_may_speak_for_the_policy() -> None:
    def bisect(messages: list[dict[str, Any]]) -> str:
        return "3" if len(messages) == 1 else "7"

    assert rehearse(guess, {"n": 7}, bisect).reward == pytest.approx(0.9)


def test_a_conversation_may_stay_open_and_ends_after_its_turns() -> None:
    played = rehearse(guess, {"n": 7}, ["1"])
    assert played.outcome is None and played.reward is None and repr(played).endswith("it would hear more")
    assert rehearse(guess, {"n": 7}, ["1", "2", "3"]).outcome == Outcome(None)

    @environment(max_turns=1)
    def patient(row: dict[str, Any]) -> Any:
        try:
            while True:
                yield "Again."
        except RolloutEnded as ended:
            return Outcome(0.5, meta={"why": ended.reason})

    assert rehearse(patient, {}, ["a"]).outcome == Outcome(0.5, meta={"why": "turns"})


def test_more_words_than_are_heard_are_refused_and_errors_are_shown_as_they_are() -> None:
    with pytest.raises(ValidationError, match="has heard enough after 1 of 2 texts, and ended with reward 1"):
        rehearse(guess, {"n": 7}, ["7", "8"])
    with pytest.raises(ValueError, match="invalid literal for int"):
        rehearse(guess, {"n": 7}, ["seven"])
    with pytest.raises(ValidationError, match="give a list of texts, or a function"):
        rehearse(guess, {"n": 7}, "7")


def test_an_async_environment_is_awaited() -> None:
    @environment
    async def echo(row: dict[str, Any]) -> Any:
        said = yield "Say it."
        yield Outcome(float(said == row["it"]))

    assert rehearse(echo, {"it": "so"}, ["so"]).reward == 1.0


def test_tools_are_called_as_the_tokenizers_template_has_it() -> None:
    class Words:
        chat_template = None

    env = tool_environment([calculator], "exact_match")
    row = {"prompt": "12+34?", "answer": "46"}
    played = rehearse(env, row, ['[calculator("12+34")]', "46"], tokenizer=Words())
    assert played.reward == 1.0 and played.messages[2]["content"] == " -> 46\n"
