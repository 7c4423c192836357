"""Conversations with tools: what the policy is told, what it is rewarded for, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tensafe_nb.errors import ValidationError
from tensafe_nb.futures import completed
from tensafe_nb.rlvr import EnvironmentSampler, TrajectoryBatch, rescore
from tensafe_nb.rlvr.environments.environment import Environment, Outcome, RolloutEnded, Turn
from tensafe_nb.rlvr.environments.tool_use import tool_environment
from tensafe_nb.rlvr.tools import calculator
from tensafe_nb.rlvr.tools.formats import Plain
from tests.unit.rlvr.clients import EngineClient

QWEN = "{% if tools %}<tool_call>{% endif %}{{ messages }}"
ROW = {"prompt": "12+34?", "answer": "46"}
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "12+34"}}</tool_call>'


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def driven(env: Environment, row: dict[str, Any], *said: str | Exception) -> tuple[list[Any], Outcome]:
    """Return what the environment told, and its outcome."""
    talk, told = env(row), []
    try:
        told.append(next(talk))
        for one in said:
            told.append(talk.throw(one) if isinstance(one, Exception) else talk.send(one))  # noqa: PERF401
    except StopIteration as end:
        return told, end.value
    raise AssertionError("it wants to hear more")


def test_a_call_is_carried_out_and_the_answer_is_rewarded() -> None:
    told, outcome = driven(tool_environment([calculator], "exact_match"), ROW, CALL, "46")
    assert [message["role"] for message in told[0]] == ["system", "user"]
    assert '{"name": "calculator"' in told[0][0]["content"] and told[0][1]["content"] == "12+34?"
    assert told[1] == Turn(
        [{"role": "tool", "name": "calculator", "content": "46"}],
        meta={"calls": [{"name": "calculator", "arguments": {"expression": "12+34"}, "ok": True}]},
    )
    assert outcome == Outcome(1.0, {"calls": 1, "errors": 0, "answered": 1.0})


def test_a_model_whose_template_shows_tools_is_told_of_them_by_the_template_alone() -> None:
    env = tool_environment([calculator, add], "exact_match")
    columns, options = env.told_with(QWEN)
    assert [tool["function"]["name"] for tool in options["tools"]] == ["calculator", "add"]
    assert driven(env, ROW | columns, "46")[0] == ["12+34?"]


def test_a_model_without_a_template_calls_in_square_brackets() -> None:
    env = tool_environment([add], "exact_match")
    columns, options = env.told_with(None)
    told, outcome = driven(env, ROW | columns, "I ask [add(12, b=34)]", "46")
    assert told[0].endswith("[add(a: integer, b: integer)] Add two numbers.\n\n12+34?") and not options
    assert told[1].text == " -> 46\n" and told[1].meta["calls"][0]["arguments"] == {"1": 12, "b": 34}
    assert outcome.reward == 1.0
    taught = tool_environment([add], "exact_match", describe=False)
    assert driven(taught, ROW | columns, "46")[0] == ["12+34?"]


def test_a_system_message_of_the_row_stays_in_front_of_the_tools() -> None:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12+34?"}]
    told, _ = driven(tool_environment([add], "exact_match"), ROW | {"prompt": asked}, "46")
    assert told[0][0]["content"].startswith("Be brief.\n\nYou may call tools") and len(told[0]) == 2
    assert asked[0]["content"] == "Be brief."


def test_what_is_wrong_is_told_counted_and_may_be_tried_again() -> None:
    said = f'{CALL}<tool_call>{{"name": "nope"}}</tool_call><tool_call>{{</tool_call>'
    told, outcome = driven(tool_environment([calculator], "exact_match"), ROW, said, "46")
    results = [message["content"] for message in told[1].text]
    assert results[0] == "46" and results[1].startswith("Error: there is no tool 'nope'")
    assert results[2].startswith("Error: the call is not valid JSON")
    assert [call["ok"] for call in told[1].meta["calls"]] == [True, False, False]
    assert outcome.parts == {"calls": 3, "errors": 2, "answered": 1.0}


@pytest.mark.parametrize("reason", ["length", "turns"])
def test_an_answer_that_never_came_is_judged_as_an_empty_one(reason: str) -> None:
    heard: list[str] = []

    def right(prompt: str, response: str, meta: Any) -> float:
        heard.append(response)
        return 0.25

    env = tool_environment([calculator], right, max_turns=2)
    assert driven(env, ROW, CALL, CALL)[1] == Outcome(0.25, {"calls": 2, "errors": 0, "answered": 0.0})
    assert driven(env, ROW, CALL, RolloutEnded(reason))[1].parts["answered"] == 0.0
    assert heard == ["", ""]


def test_the_reward_is_whatever_scores_a_response_and_its_parts_come_along() -> None:
    env = tool_environment([calculator], {"exact_match": 1.0, "keyword_contains": 0.5}, name="sums")
    _, outcome = driven(env, ROW | {"keywords": ["46"]}, "46")
    assert outcome.reward == 1.5 and outcome.parts["exact_match"] == outcome.parts["keyword_contains"] == 1.0
    assert env.name == "sums"


def test_what_it_is_made_of_makes_its_version() -> None:
    def made(**changes: Any) -> str:
        return tool_environment(**{"tools": [add], "reward": "exact_match"} | changes).version

    def add_wrongly(a: int, b: int) -> int:
        """Add two numbers."""
        return a - b

    add_wrongly.__name__ = "add"
    assert made() == made()
    changed = [made(tools=[add_wrongly]), made(reward="contains"), made(max_turns=2), made(format="plain")]
    assert len({made(), *changed}) == 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tools": []}, "give a list of functions, at least one"),
        ({"tools": add}, "give a list of functions, at least one"),
        ({"tools": [add, add]}, "Two tools are called 'add'"),
        ({"tools": ["add"]}, "'add' is no tool"),
        ({"reward": "exact_mach"}, "no reward named 'exact_mach'. Did you mean 'exact_match'"),
        ({"format": "qwen"}, "'qwen' is no way to write calls"),
        ({"timeout": 0}, "timeout=0 must be a number of seconds above 0"),
        ({"max_turns": 0}, "max_turns=0 must be a whole number"),
    ],
)
def test_what_no_conversation_can_be_had_with_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        tool_environment(**{"tools": [add], "reward": "exact_match"} | changes)


def test_a_row_without_a_question_is_told_which_columns_it_has() -> None:
    with pytest.raises(ValidationError, match=r"in 'prompt'; this has 'answer', 'question'"):
        next(tool_environment([add], "exact_match")({"question": "?", "answer": "1"}))


def test_a_format_of_ones_own_is_a_class_with_two_methods() -> None:
    class Equals(Plain):
        name = "equals"

        def calls(self, said: str) -> list[Any]:
            return super().calls(f"[add({said[:-1].replace('+', ',')})]") if said.endswith("=") else []

        def told(self, calls: Any, results: Any) -> str:
            return f"{results[0]}"

    env = tool_environment([add], "exact_match", format=Equals(), describe=False)
    told, outcome = driven(env, ROW | env.told_with(None)[0], "12+34=", "46")
    assert told[1].text == "46" and outcome.reward == 1.0


class Scripted(EngineClient):
    """A policy that says in each turn, in the conversations that go on, what it is given to say."""

    def __init__(self, said: list[list[str]]) -> None:
        super().__init__()
        self._said = said

    def sample(self, prompts: Any, sampling: Any) -> Any:
        found = super().sample(prompts, sampling)  # a handle like any other
        tokens = [tuple(self.tokenizer(text)["input_ids"]) for text in self._said.pop(0)]
        zeros = [(0.0,) * len(ids) for ids in tokens]
        sequences = [
            replace(
                one,
                text=self.tokenizer.decode(list(ids)),
                tokens=ids,
                logprobs=z,
                raw_logprobs=z,
                finish_reason="stop",
            )
            for one, ids, z in zip(found.result().sequences, tokens, zeros, strict=True)
        ]
        result = replace(found.result(), sequences=tuple(sequences))
        return completed(result, operation="sample", training_client_id=self.training_client_id)


def test_rollouts_with_tools_are_scored_again_and_their_calls_made_again(tmp_path: Path) -> None:
    sums, less, none = (
        f"<tool_call>{call}</tool_call>"
        for call in (
            '{"name": "add", "arguments": {"a": 12, "b": 34}}',
            '{"name": "add", "arguments": {"a": 1}}',
            '{"name": "no"}',
        )
    )
    said = [[sums, less, "46"], ["46", none], ["45"]]
    made = tool_environment([add], "exact_match", max_turns=3)
    rows = [ROW | {"n": n} for n in range(3)]
    with EnvironmentSampler(Scripted(said), made, 1, 8, seed=0, timeout=None) as sampler:
        batch = sampler.generate_trajectories(rows)
    assert [r.reward for r in batch] == [1.0, 0.0, 1.0]
    assert [r.reward_parts["tools/errors"] for r in batch] == [0, 2, 0]
    kept = TrajectoryBatch.load(batch.save(tmp_path / "rollouts.jsonl"))
    assert list(rescore(kept, made, timeout=None)) == list(batch), (
        "rewards, parts, and what was called in each turn"
    )

    lenient = tool_environment([add], "contains", max_turns=3)
    again = rescore(kept, lenient, timeout=None)
    assert [r.reward for r in again] == [1.0, 0.0, 1.0] and {r.reward_error for r in again} == {None}
    assert {r.reward_version for r in again}.isdisjoint({r.reward_version for r in kept})

    def wrong(a: int, b: int) -> int:
        """Add two numbers."""
        return a - b

    wrong.__name__ = "add"
    other = rescore(kept, tool_environment([wrong], "exact_match", max_turns=3), timeout=None)
    assert [r.reward for r in other] == [None, 0.0, 1.0], "what does not call it is what it was"
    assert "in turn 2 it tells something else than is recorded" in str(other[0].reward_error)
