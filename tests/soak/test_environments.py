"""Environments of verifiers and TRL, made by those packages themselves; `make environments` installs them."""

import json
from pathlib import Path
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb import rlvr
from tensafe_nb.rlvr.environments.sampler import EnvironmentSampler
from tensafe_nb.rlvr.rollouts.trajectories import Trajectory

vf = pytest.importorskip("verifiers", reason="verifiers is not installed here: make environments")
trl = pytest.importorskip("trl", reason="TRL is not installed here: make environments")
if not hasattr(vf, "MultiTurnEnv"):
    pytest.skip("this verifiers has no MultiTurnEnv: make environments", allow_module_level=True)

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]  # theirs


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


def right(completion: Any, answer: str) -> float:
    return float(answer in completion[-1]["content"])


async def turns(state: Any) -> int:
    return len(state["trajectory"])


def dataset(*rows: dict[str, Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(list(rows or [{"question": "1+2?", "answer": "3"}]))


def talk(env: rlvr.Environment, row: dict[str, Any], *said: str) -> rlvr.Rehearsal:
    return rlvr.rehearse(env, row, said)


def test_a_single_turn_is_scored_by_its_rubric() -> None:
    env = vf.SingleTurnEnv(dataset=dataset(), rubric=vf.Rubric(funcs=[right]), system_prompt="Be brief.")
    (row,) = rlvr.verifiers_prompts(env)
    played = talk(rlvr.verifiers_environment(env), row, "It is 3.")
    assert [(m["role"], m["content"]) for m in played.messages] == [
        ("system", "Be brief."),
        ("user", "1+2?"),
        ("assistant", "It is 3."),
    ]
    assert played.outcome == rlvr.Outcome(1.0, {"right": 1.0, "num_turns": 1.0})


def test_tools_are_called_by_verifiers_itself_and_counted_by_its_rubric() -> None:
    rubric = vf.Rubric(funcs=[right, turns], weights=[1.0, 0.0])
    env = vf.ToolEnv(dataset=dataset(), tools=[add], rubric=rubric, max_turns=4)
    (row,) = rlvr.verifiers_prompts(env)
    made = rlvr.verifiers_environment(env)
    call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'
    played = talk(made, row, f"{call}<tool_call>{{</tool_call>", "3")
    assert made.max_turns == 4
    told = [m for m in played.messages if m["role"] == "tool"]
    assert told[0]["content"] == "3" and told[0]["name"] == "add" and "Expecting value" in told[1]["content"]
    assert played.outcome.reward == 1.0
    assert played.outcome.parts["total_tool_calls"] == 2.0 and played.outcome.parts["add_calls"] == 1.0
    _, options = made.told_with("{% if tools %}<tool_call>{% endif %}")
    assert options["tools"] == [rlvr.tools.Tool.of(add).schema]


class Guess(vf.MultiTurnEnv):  # type: ignore[misc]
    """State of its own, and an end of its own."""

    async def setup_state(self, state: Any) -> Any:
        state["left"] = 3
        return state

    async def env_response(self, messages: Any, state: Any, **columns: Any) -> Any:
        state["left"] -= 1
        said = [vf.UserMessage(content=f"{state['left']} left.")]
        if not state["left"] or "3" in messages[-1].content:
            state["final_env_response"] = said
        return said


def test_a_multi_turn_environment_keeps_its_state_and_ends_when_it_says_so() -> None:
    env = Guess(dataset=dataset(), rubric=vf.Rubric(funcs=[turns]), max_turns=9)
    (row,) = rlvr.verifiers_prompts(env)
    played = talk(rlvr.verifiers_environment(env), row, "1", "2", "5")
    assert [m["content"] for m in played.messages] == ["1+2?", "1", "2 left.", "2", "1 left.", "5"]
    assert played.outcome.reward == 3.0
    assert talk(rlvr.verifiers_environment(env), row, "3").outcome.reward == 1.0


def test_a_function_that_fails_leaves_the_rollout_unscored_and_is_no_score_of_0(service: Any) -> None:
    def fails(completion: Any) -> float:
        raise KeyError("no column")

    env = vf.SingleTurnEnv(dataset=dataset(), rubric=vf.Rubric(funcs=[fails]))
    tc = service.create_training_client(tn.TrainingConfig(model_ref="builtin:tiny"))
    made = rlvr.verifiers_environment(env)
    with EnvironmentSampler(tc, made, group_size=2, max_new_tokens=4, seed=0) as sampler:
        batch = sampler.generate_trajectories(rlvr.verifiers_prompts(env))
    assert [(t.reward, "KeyError" in str(t.reward_error)) for t in batch] == [(None, True)] * 2


def test_what_needs_a_server_or_a_group_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    judged = vf.SingleTurnEnv(dataset=dataset(), rubric=vf.JudgeRubric())
    with pytest.raises(tn.ValidationError, match="asks a model behind an OpenAI client"):
        rlvr.verifiers_environment(judged)
    compared = vf.SingleTurnEnv(dataset=dataset(), rubric=vf.Rubric(funcs=[lambda completions: [0.0]]))
    with pytest.raises(tn.ValidationError, match="compares the rollouts of a group"):
        rlvr.verifiers_environment(compared)
    one = vf.SingleTurnEnv(dataset=dataset(), rubric=vf.Rubric(funcs=[right]))
    with pytest.raises(tn.ValidationError, match="is several environments"):
        rlvr.verifiers_environment(vf.EnvGroup(envs=[one, one]))

    class Asks(Guess):
        async def env_response(self, messages: Any, state: Any, **columns: Any) -> Any:
            return await self.get_model_response(state, messages)

    asks = Asks(dataset=dataset(), rubric=vf.Rubric(funcs=[turns]), max_turns=3)
    (row,) = rlvr.verifiers_prompts(asks)
    with pytest.raises(tn.ValidationError, match="there is the policy alone"):
        talk(rlvr.verifiers_environment(asks), row, "1", "2")


def test_a_run_on_a_verifiers_environment_learns_from_its_rubric(service: Any) -> None:
    def short(completion: Any) -> float:
        return -float(len(completion[-1]["content"]))

    env = Guess(
        dataset=dataset(*[{"question": f"{n}?", "answer": "3"} for n in range(4)]),
        rubric=vf.Rubric(funcs=[short]),
    )
    tc = service.create_training_client(tn.TrainingConfig(model_ref="builtin:tiny"))
    trainer = rlvr.RLVRTrainer(
        tc, rlvr.verifiers_prompts(env), environment=rlvr.verifiers_environment(env),
        prompts_per_step=2, group_size=2, max_new_tokens=6,
    )  # fmt: skip
    run = trainer.run(steps=2, show=False)
    run.result()
    rollout: Trajectory = next(iter(run.rollouts()[1]))
    assert rollout.reward is not None and [t.role for t in rollout.turns or ()][:2] == ["user", "assistant"]


TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_of_trl_that_show_tools_are_read_or_refused_with_what_to_do(path: Path) -> None:
    env = rlvr.tool_environment([add], "exact_match")
    try:
        _, options = env.told_with(path.read_text())
    except tn.ValidationError as error:
        assert "format=" in str(error)
    else:
        assert bool(options) == ("tools" in path.read_text())


class Counter:
    """As in TRL's documentation of environment_factory."""

    def __init__(self) -> None:
        self.value = 0

    def reset(self, **columns: Any) -> str:
        self.value = 0
        return " Start at 0."

    def increment(self, step: int) -> int:
        """Count on.

        Args:
            step: By how much.

        Returns:
            The value.
        """
        self.value += step
        return self.value

    def get_reward(self) -> float:
        return float(self.value)


def test_a_model_is_told_of_a_trl_environment_what_trl_tells_it() -> None:
    from transformers.utils import get_json_schema

    template = (TEMPLATES[0].parent / "qwen2_5.jinja").read_text()
    (shown,) = rlvr.trl_environment(Counter).told_with(template)[1]["tools"]
    theirs = get_json_schema(Counter().increment)
    theirs["function"].pop("return")
    assert json.loads(json.dumps(shown)) == theirs
