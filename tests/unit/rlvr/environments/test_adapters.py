"""Environments of TRL's kind and of reasoning-gym, without those packages: what needs them is in tests/soak."""

from collections.abc import Iterator
from typing import Any

import pytest

from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr.environments.adapters.gym import gym_environment
from tensafe_nb.rlvr.environments.adapters.trl import trl_environment
from tensafe_nb.rlvr.environments.adapters.verifiers import verifiers_environment, verifiers_prompts
from tensafe_nb.rlvr.environments.environment import RolloutEnded
from tensafe_nb.rlvr.rollouts.prompts import gym_prompts
from tests.unit.rlvr.environments.test_tool_use import driven

STEP = '<tool_call>{"name": "increment", "arguments": {"step": %d}}</tool_call>'
ROW = {"prompt": [{"role": "user", "content": "Reach 5."}], "start": 2}


class Counter:
    """As in TRL's documentation: the methods are tools, but for reset and get_reward."""

    made = 0

    def __init__(self) -> None:
        Counter.made += 1
        self.value = 0

    def reset(self, start: int = 0, **columns: Any) -> str | None:
        self.value = start
        return f" You are at {start}." if start else None

    def increment(self, step: int) -> int:
        """Count on.

        Args:
            step: By how much.
        """
        self.value += step
        return self.value

    def get_reward(self) -> float:
        return float(self.value == 5)

    def _helper(self) -> None: ...


def test_the_methods_of_a_trl_environment_are_tools_of_an_object_for_each_conversation() -> None:
    env = trl_environment(Counter)
    columns, options = env.told_with("{% if tools %}<tool_call>{% endif %}")
    assert [tool["function"]["name"] for tool in options["tools"]] == ["increment"]
    made = Counter.made
    told, outcome = driven(env, ROW | columns, STEP % 3, "done")
    assert told[0] == [{"role": "user", "content": "Reach 5. You are at 2."}]
    assert told[1].text == [{"role": "tool", "name": "increment", "content": "5"}]
    assert outcome.reward == 1.0 and outcome.parts["Counter"] == 1.0 and outcome.parts["calls"] == 1
    assert driven(env, {"prompt": "Reach 5."}, STEP % 1, "done")[1].reward == 0.0
    assert Counter.made == made + 2 and env.name == "Counter"


def test_rewards_beside_its_own_are_added_and_those_of_trl_get_the_object() -> None:
    def far(environments: list[Any], **columns: Any) -> list[float]:
        return [0.1 * environment.value for environment in environments]

    def polite(completions: list[str], **columns: Any) -> list[float]:
        return [float("please" in completion[-1]["content"]) for completion in completions]

    env = trl_environment(Counter, [far, polite])
    _, outcome = driven(env, ROW, STEP % 3, "please")
    assert outcome.reward == pytest.approx(1.0 + 0.5 + 1.0)
    assert outcome.parts["far"] == 0.5 and outcome.parts["polite"] == 1.0


def test_a_get_reward_that_is_awaited_is_awaited() -> None:
    class Slow(Counter):
        async def get_reward(self) -> float:  # type: ignore[override]
            return 0.5

    assert driven(trl_environment(Slow), ROW, "done")[1].reward == 0.5


def test_what_is_no_trl_environment_is_refused_with_what_it_lacks() -> None:
    class Mute:
        def reset(self, **columns: Any) -> None: ...

    with pytest.raises(ValidationError, match=r"has no get_reward\(\), and there is no reward beside it"):
        trl_environment(Mute)
    with pytest.raises(ValidationError, match="has no method reset"):
        trl_environment(dict)
    with pytest.raises(ValidationError, match="make an environment of each"):
        trl_environment({"a": Counter})
    with pytest.raises(ValidationError, match="give the class itself"):
        trl_environment(Counter())
    with pytest.raises(ValidationError, match=r"rlvr\.trl_environment"):
        from tensafe_nb.rlvr import resolve_reward

        resolve_reward(lambda completions, environments: [0.0])


class Puzzles:
    """A data set of reasoning-gym's shape."""

    def __init__(self, *entries: dict[str, Any]) -> None:
        self.entries = entries

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.entries)

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        return float(answer == entry["answer"])


def test_a_wrong_answer_to_a_gym_task_may_be_tried_again_for_less() -> None:
    dataset = Puzzles({"question": "2+2?", "answer": "4", "metadata": {}})
    (row,) = gym_prompts(dataset)
    env = gym_environment(dataset, tries=3, discount=0.5)
    told, outcome = driven(env, row, "5", "4")
    assert told == ["2+2?", "That is not right. Try again."]
    assert outcome.reward == 0.5 and outcome.parts == {"tries": 2}
    assert driven(env, row, "4")[1].reward == 1.0
    assert driven(env, row, "1", "2", "3")[1].reward == 0.0
    assert driven(env, row, "1", RolloutEnded("length"))[1].reward == 0.0
    with pytest.raises(ValidationError, match="has no score_answer"):
        gym_environment([])
    with pytest.raises(ValidationError, match="expected tries"):
        gym_environment(dataset, tries=0)


def test_what_is_none_of_verifiers_environments_is_refused() -> None:
    wild: list[Any] = [Counter(), Counter, None, 3, "env", {}, lambda: None, float("nan")]
    for given in wild:
        with pytest.raises(ValidationError, match="give a SingleTurnEnv, a MultiTurnEnv, a ToolEnv"):
            verifiers_environment(given)
        with pytest.raises(ValidationError, match="give a SingleTurnEnv, a MultiTurnEnv, a ToolEnv"):
            verifiers_prompts(given)
