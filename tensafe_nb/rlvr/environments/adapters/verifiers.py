"""verifiers' environments of several turns: SingleTurnEnv, MultiTurnEnv, ToolEnv and what is made of them.

Its own loop asks a model behind a client. Here the policy speaks through `yield`, and all else (the state, what the
environment answers, when it stops, the rubric) is theirs. It runs in this process, since its methods are coroutines.
"""

import inspect
import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensafe_nb.checks import checked
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.registry import name_of
from tensafe_nb.rlvr.environments.environment import Environment, Outcome, RolloutEnded, Told, Turn
from tensafe_nb.rlvr.rewards.conventions import number_of
from tensafe_nb.rlvr.tools.formats import ToolCall, ToolFormat
from tensafe_nb.rlvr.tools.manner import Manner
from tensafe_nb.rlvr.tools.tool import Tool, ToolError, without_titles

MANY_TURNS = 10  # of an environment that sets no limit
ELSEWHERE = {  # classes of environments that need more than a policy
    "SandboxEnv": "runs its tools in sandboxes of a server",
    "PythonEnv": "runs its tools in sandboxes of a server: rlvr.tools.python runs code here",
    "CliAgentEnv": "runs an agent against a server that stands in for the model",
    "EnvGroup": "is several environments: make an environment of each",
}


@dataclass(frozen=True)
class VerifiersUse:
    """A conversation with an environment of verifiers'.

    Attributes:
        env: The environment.
        tools: Its tools, for what the model is told of them; by name.
        manner: How the model is told of them, and writes its calls.
    """

    env: Any
    tools: Mapping[str, Tool]
    manner: Manner

    def identified(self) -> list[Any]:
        """Return what its conversations depend on, for `identity_of`."""
        scored = [[func, weight] for _, func, weight in functions_of(self.env.rubric)]
        called = [list(getattr(self.env, "tools", [])), [dict(tool.schema) for tool in self.tools.values()]]
        return [type(self.env), scored, called, self.env.system_prompt, self.env.max_turns]

    def told_with(self, template: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what depends on the model's chat template: see `Environment.told_with`."""
        return self.manner.told_with(template, list(self.tools.values())) if self.tools else ({}, {})

    async def __call__(self, row: Mapping[str, Any]) -> AsyncGenerator[Told | Turn | Outcome, str]:
        env, known = self.env, 0
        manner, own = self.manner.of_row(row)
        state = await env.init_state(own, no_client(), "policy", None)
        state = await env.setup_state(state) or state
        seen: list[Any] = []
        meta: dict[str, Any] = {}
        try:
            while not await env.is_completed(state):
                messages = await env.get_prompt_messages(state)
                if state.get("final_env_response") is not None:
                    continue
                if messages[: len(seen)] != seen:
                    raise ValidationError(
                        "its get_prompt_messages() changes what was said before, and a policy is trained on what it saw"
                    )
                told = [told_of(message, messages) for message in messages[len(seen) :]]
                if not seen:
                    told = manner.first(told, list(self.tools.values()))
                said = yield Turn(told, meta=meta)
                calls = manner.format.calls(said) if self.tools else []
                known += 1
                meta = {"calls": [self.record(call) for call in calls]} if calls else {}
                await env.add_model_response(state, messages, response_of(said, calls, self.tools, known))
                seen = [*messages, *state["trajectory"][-1]["completion"]]
        except RolloutEnded as ended:
            state["is_truncated"], state["stop_condition"] = True, ended.reason
        finally:
            await env.cleanup(state)
        yield await scored(env, state)

    def record(self, call: ToolCall) -> dict[str, Any]:
        """Return what the conversation keeps of a call; what its tool made of it is told in words."""
        ok = call.problem is None and call.name in self.tools
        return {"name": call.name, "arguments": dict(call.arguments), "ok": ok}


async def scored(env: Any, state: Any) -> Outcome:
    """Return what the rubric gives; its own way takes a function that fails for a score of 0, and this does not.

    Raises:
        ValidationError: A function gave no number.
    """
    if state.get("error") is not None:
        raise state["error"]
    total, parts = 0.0, {}
    for rubric, func, weight in functions_of(env.rubric):
        offered = rubric.score_objects(state)
        parameters = inspect.signature(func).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            offered = {p.name: offered[p.name] for p in parameters if p.name in offered}
        value = func(**offered)
        value = await value if inspect.isawaitable(value) else value
        number = number_of(value)
        if number is None:
            raise ValidationError(f"{name_of(func)} returned {as_given(value)}, expected a finite number")
        parts[name_of(func)] = number
        total += weight * number
    return Outcome(total, parts)


def functions_of(rubric: Any) -> Iterator[tuple[Any, Any, float]]:
    """Yield each function of a rubric, or of those in a group of them: its rubric, itself, its weight."""
    for member in rubrics_of(rubric):
        for func, weight in zip(member.funcs, member.weights, strict=True):
            yield member, func, weight


def rubrics_of(rubric: Any) -> Iterator[Any]:
    """Yield a rubric, and those in it."""
    yield rubric
    for member in getattr(rubric, "rubrics", ()):
        yield from rubrics_of(member)


def told_of(message: Any, before: Sequence[Any]) -> dict[str, Any]:
    """Return one of verifiers' messages as a dict; a tool's with the name that its call had."""
    told: dict[str, Any] = message.model_dump(exclude_none=True)
    called = [call for one in before for call in getattr(one, "tool_calls", None) or ()]
    name = next((call.name for call in called if call.id == told.get("tool_call_id")), None)
    return told if name is None else {**told, "name": name}


def response_of(said: str, calls: Sequence[ToolCall], tools: Mapping[str, Tool], turn: int) -> Any:
    """Return what the policy said as verifiers knows a model's response."""
    from verifiers import types

    written = [
        types.ToolCall(
            id=f"call{turn:02d}{number:03d}", name=call.name or "unknown", arguments=arguments_of(call, tools)
        )
        for number, call in enumerate(calls)
    ]
    message = types.ResponseMessage(
        content=said,
        tool_calls=written or None,
        finish_reason="tool_calls" if written else "stop",
        is_truncated=False,
    )
    return types.Response(id=f"turn{turn}", created=0, model="policy", message=message)


def arguments_of(call: ToolCall, tools: Mapping[str, Tool]) -> str:
    """Return the arguments of a call as JSON; of one that cannot be read, what is wrong with it, which is none."""
    if call.problem is not None:
        return call.problem
    try:
        placed = tools[call.name].named(call.values) if call.name in tools else {}
    except ToolError as error:
        return str(error)
    return json.dumps({**placed, **call.arguments})


def no_client() -> Any:
    """Return a client that has no model behind it: whoever asks it is told why."""
    from verifiers.clients import Client

    class NoClient(Client):  # type: ignore[misc]
        """Where verifiers' loop would find a model."""

        def refuse(self, *given: Any, **further: Any) -> Any:
            raise ValidationError(
                "it asks a model behind a client, and here there is the policy alone: what judges or plays along must "
                "have a client of its own"
            )

        setup_client = close = refuse
        to_native_tool = to_native_prompt = get_native_response = refuse
        raise_from_native_response = from_native_response = get_response = refuse

    return NoClient(None)


@checked
def verifiers_environment(
    env: Any,
    *,
    max_turns: int | None = None,
    max_tokens: int | None = None,
    format: str | ToolFormat = "auto",
    describe: bool = True,
    name: str | None = None,
) -> Environment:
    """Make an environment of one of verifiers': a SingleTurnEnv, MultiTurnEnv, ToolEnv, or a class made of them.

    State, answers, stop conditions and rubric are its own. The rows are `verifiers_prompts(env)`. Its functions run in
    this process. What needs a server, or a model behind a client, is refused, and so is a rubric that compares the
    rollouts of a group. verifiers has these classes up to version 0.2; its v1 is another program, around a server.

    Args:
        env: The environment.
        max_turns: How often the model speaks at most; the environment's own limit if None.
        max_tokens: How many tokens it may say in all its turns together.
        format: How the model writes calls of tools, as for `tool_environment`.
        describe: Tell a model whose template shows no tools which there are.
        name: In metrics; the class's own if None.

    Raises:
        ValidationError: It is no environment of verifiers', or needs what there is none of here; says what.

    Example:
        >>> env = vf.ToolEnv(dataset=dataset, tools=[search], rubric=vf.Rubric(funcs=[right]))
        >>> trainer = rlvr.RLVRTrainer(tc, rlvr.verifiers_prompts(env), environment=rlvr.verifiers_environment(env))
    """
    check_verifiers(env)
    made = [shown_tool(one) for one in env.tool_defs or ()]
    turns = max_turns or (env.max_turns if env.max_turns > 0 else MANY_TURNS)
    use = VerifiersUse(env, {tool.name: tool for tool in made}, Manner.of(format, describe))
    return Environment(use, turns, max_tokens, name or type(env).__name__)


def shown_tool(definition: Any) -> Tool:
    """Return a tool of verifiers' as a model is told of it; it is called by verifiers."""
    parameters = without_titles({**definition.parameters})
    parameters.pop("additionalProperties", None)
    shown = {"name": definition.name, "description": definition.description, "parameters": parameters}
    types = dict.fromkeys(parameters.get("properties", {}))
    return Tool(
        definition.name,
        definition.description,
        shown_tool,
        types,
        schema={"type": "function", "function": shown},
    )


def check_verifiers(env: Any) -> None:
    """Refuse what is no environment of verifiers', or what needs more than a policy.

    Raises:
        ValidationError: Says what it needs.
    """
    kinds = {kind.__name__ for kind in type(env).__mro__}
    if any(kind.__module__.startswith("verifiers.v1") for kind in type(env).__mro__) or "Taskset" in kinds:
        raise ValidationError(
            f"{type(env).__name__} is one of verifiers v1: it starts programs that ask a model behind a server, and "
            f"here there is none. Of an environment of version 0.2 (pip install 'verifiers<0.3') one can be made."
        )
    for kind, why in ELSEWHERE.items():
        if kind in kinds:
            raise ValidationError(f"{type(env).__name__} {why}: that cannot be had here.")
    if "MultiTurnEnv" not in kinds or not all(
        hasattr(env, part) for part in ("rubric", "init_state", "is_completed")
    ):
        what = "is" if not isinstance(env, type) else "is a class, not an object:"
        raise ValidationError(
            f"verifiers_environment: {as_given(env)} {what} no environment of verifiers': give a SingleTurnEnv, a "
            f"MultiTurnEnv, a ToolEnv, or an object of a class made of one."
        )
    for rubric in rubrics_of(env.rubric):
        if hasattr(rubric, "judge_client"):
            raise ValidationError(
                f"{type(rubric).__name__} asks a model behind an OpenAI client for its verdict, and here there is "
                f"none: leave it out of the rubric, or write an async function that asks your own."
            )
    for rubric, func, _ in functions_of(env.rubric):
        if rubric._is_group_func(func):
            raise ValidationError(
                f"{name_of(func)} compares the rollouts of a group, which are scored one by one here: make it a "
                f"function of one completion."
            )


@checked
def verifiers_prompts(env: Any, count: int | None = None, *, held_out: bool = False) -> list[dict[str, Any]]:
    """Return the rows of a verifiers environment, for `RLVRTrainer`: `prompt`, `answer`, `info` and what else it has.

    Args:
        env: The environment.
        count: How many; all if None.
        held_out: Take those of its evaluation set.

    Raises:
        ValidationError: It is no environment of verifiers'.
    """
    check_verifiers(env)
    dataset = (env.get_eval_dataset if held_out else env.get_dataset)(-1 if count is None else count)
    return [{name: value for name, value in row.items() if value is not None} for row in dataset]
