"""TRL's environment classes, as `GRPOTrainer(environment_factory=…)` takes them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tensafe_nb.checks import checked
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.registry import name_of
from tensafe_nb.rlvr.environments.environment import Environment, Outcome, Told
from tensafe_nb.rlvr.environments.tool_use import (
    Talk,
    ToolTalk,
    checked_timeout,
    identified,
    judged,
    question_of,
    tools_named,
)
from tensafe_nb.rlvr.rewards.conventions import number_of
from tensafe_nb.rlvr.rewards.reward import Reward, RewardSpec, resolve_reward, result_of
from tensafe_nb.rlvr.tools.formats import ToolFormat
from tensafe_nb.rlvr.tools.manner import Manner
from tensafe_nb.rlvr.tools.tool import Tool

NO_TOOLS = ("reset", "get_reward")  # methods that the trainer calls, not the model


@dataclass(frozen=True)
class TRLUse:
    """A conversation with an object of a TRL environment class, made anew for each: its methods are the tools.

    Attributes:
        factory: Makes the object.
        tools: Further tools, and those of an object that was made to look at; for what the model is told of them.
        further: The names of those that are no methods.
        reward: Beside that of the object; None where there is none.
        max_turns: How often the policy speaks.
        manner: How it is told of tools, and writes its calls.
        timeout: Seconds that the calls of a turn may take.
    """

    factory: Callable[[], Any]
    tools: Mapping[str, Tool]
    further: frozenset[str]
    reward: Reward | None
    max_turns: int
    manner: Manner
    timeout: float | None

    def identified(self) -> list[Any]:
        """Return what its conversations depend on, for `identity_of`."""
        further = {name: self.tools[name] for name in sorted(self.further)}
        shown = [dict(tool.schema) for tool in self.tools.values()]
        how = identified(further, self.manner)
        return [self.factory, shown, *how, self.reward, self.max_turns, self.timeout]

    def told_with(self, template: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what depends on the model's chat template: see `Environment.told_with`."""
        return self.manner.told_with(template, list(self.tools.values()))

    def __call__(self, row: Mapping[str, Any]) -> Talk:
        manner, own = self.manner.of_row(row)
        instance = self.factory()
        asked = with_observation(question_of(own), instance.reset(**own))
        tools = {
            name: tool if name in self.further else replace(tool, function=getattr(instance, name))
            for name, tool in self.tools.items()
        }
        talk = ToolTalk(tools, manner.format, self.max_turns, self.timeout)
        answer = yield from talk.held(manner.first(asked, list(tools.values())))
        return talk.counted(self.outcome(instance, own, answer or ""))

    def outcome(self, instance: Any, row: Mapping[str, Any], answer: str) -> Outcome:
        """Return the sum of what the object and the reward give; each has its own part.

        Raises:
            RewardError: The reward has failed.
            ValidationError: The object gave no number.
        """
        outcome = Outcome(None)
        if self.reward is not None:
            outcome = judged(told_of(self.reward, instance), row, answer)
        if not hasattr(instance, "get_reward"):
            return outcome
        value = instance.get_reward()
        value = result_of(value) if inspect.isawaitable(value) else value
        if value is None:
            return outcome
        number = number_of(value)
        if number is None:
            raise ValidationError(
                f"get_reward() returned {as_given(value)}, expected a finite number or None"
            )
        own = {type(instance).__name__: number}
        return Outcome(number + (outcome.reward or 0.0), {**own, **outcome.parts}, outcome.meta)


def with_observation(asked: Told, observation: Any) -> Told:
    """Return a question with what `reset` says behind its last message.

    Raises:
        ValidationError: It says something else than a text.
    """
    if observation is None:
        return asked
    if not isinstance(observation, str):
        raise ValidationError(f"reset() returned {as_given(observation)}: only text is read here, or None")
    if isinstance(asked, str):
        return asked + observation
    last = {**asked[-1], "content": f"{asked[-1]['content']}{observation}"}
    return [*asked[:-1], last]


def told_of(reward: Reward, instance: Any) -> Reward:
    """Return a reward whose functions are given the object where they ask for `environments`."""
    parts = tuple(replace(part, reward=told_of(part.reward, instance)) for part in reward.parts)
    call = reward.call
    if call is not None and "environments" in call.names:
        call = replace(call, kwargs={**call.kwargs, "environments": [instance]})
    return replace(reward, parts=parts, call=call)


@checked
def trl_environment(
    factory: Any,
    reward: RewardSpec | None = None,
    *,
    tools: Sequence[Any] = (),
    max_turns: int = 6,
    max_tokens: int | None = None,
    format: str | ToolFormat = "auto",
    describe: bool = True,
    timeout: float | None = 4.0,
    name: str | None = None,
) -> Environment:
    """Make an environment of a TRL environment class, as `GRPOTrainer(environment_factory=…)` takes it.

    The class has `reset(**row)`, whose text goes behind the question, methods that are tools, and, if it scores itself,
    `get_reward()`. Each conversation has an object of its own, made by `factory()`, in the process where rewards run.

    Args:
        factory: The class, or what makes an object of it.
        reward: Further rewards, added to `get_reward()`: whatever `resolve_reward` takes; a function of TRL's that asks
            for `environments` is given the object.
        tools: Further tools beside the methods.
        max_turns: How often the model speaks at most; TRL's max_tool_calling_iterations and one.
        max_tokens: How many tokens it may say in all its turns together.
        format: How the model writes calls, as for `tool_environment`.
        describe: Tell a model whose template shows no tools which there are.
        timeout: Seconds that the calls of one turn may take together.
        name: In metrics; the class's own if None.

    Raises:
        ValidationError: Several environments by name, a class without `reset`, or without any reward.

    Example:
        >>> env = rlvr.trl_environment(Wordle, max_turns=6)
        >>> trainer = rlvr.RLVRTrainer(tc, rows, environment=env)
    """
    if isinstance(factory, Mapping):
        raise ValidationError(
            f"environment_factory with several names ({', '.join(map(str, factory))}): make an environment of each, "
            f"and train on them one after the other."
        )
    if not callable(factory):
        raise ValidationError(
            f"factory={as_given(factory)}: give the class itself, or a function that makes an object of it."
        )
    try:
        instance = factory()
    except Exception as error:  # it is the user's
        raise ValidationError(
            f"factory() raised {type(error).__name__}: {error}. It is called without arguments."
        ) from error
    if not callable(getattr(instance, "reset", None)):
        raise ValidationError(
            f"{type(instance).__name__} has no method reset: it is no environment of TRL's."
        )
    methods = [
        getattr(instance, member)
        for member, _ in inspect.getmembers(type(instance), inspect.isfunction)
        if not member.startswith("_") and member not in NO_TOOLS
    ]
    if reward is None and not hasattr(instance, "get_reward"):
        raise ValidationError(
            f"{type(instance).__name__} has no get_reward(), and there is no reward beside it: give reward=…"
        )
    further = frozenset(() if isinstance(tools, list | tuple) and not tools else tools_named(tools))
    named = tools_named([*methods, *tools])
    # of methods, what the model is told; the object that they are of is another in each conversation
    kept = {
        key: tool if key in further else replace(tool, function=getattr(type(instance), key))
        for key, tool in named.items()
    }
    scored = None if reward is None else resolve_reward(with_place(reward))
    use = TRLUse(
        factory, kept, further, scored, max_turns, Manner.of(format, describe), checked_timeout(timeout)
    )
    return Environment(use, max_turns, max_tokens, name or name_of(type(instance)))


def with_place(reward: Any) -> Any:
    """Return a reward, or a list of them, with room for the `environments` that functions of TRL's ask for."""
    if isinstance(reward, list | tuple):
        return [one if isinstance(one, list | tuple) else with_place(one) for one in reward]
    if inspect.isroutine(reward) and "environments" in inspect.signature(reward).parameters:
        return resolve_reward(reward, environments=())
    return reward
