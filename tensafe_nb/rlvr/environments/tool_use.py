"""Environments in which the policy calls tools before it answers, and is rewarded for its answer."""

import itertools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from tensafe_nb.checks import checked
from tensafe_nb.data.messages import is_chat, messages_of
from tensafe_nb.display import as_given
from tensafe_nb.errors import RewardError, ValidationError
from tensafe_nb.rlvr.environments.environment import Environment, Outcome, RolloutEnded, Told, Turn
from tensafe_nb.rlvr.rewards.reward import Reward, RewardSpec, resolve_reward
from tensafe_nb.rlvr.tools.desk import Done, carried_out
from tensafe_nb.rlvr.tools.formats import FORMATS, ToolFormat
from tensafe_nb.rlvr.tools.manner import Manner
from tensafe_nb.rlvr.tools.tool import Tool

Talk: TypeAlias = Generator[Told | Turn, str, Outcome]
QUESTIONS = ("prompt", "messages")
MOST_TOOLS, MOST_SECONDS = 1_000, 100_000


@dataclass(frozen=True)
class ToolUse:
    """A conversation in which tools are called: the generator function of `tool_environment`.

    Attributes:
        tools: By name.
        reward: Of the final answer.
        max_turns: How often the policy speaks.
        manner: How it is told of tools, and writes its calls.
        timeout: Seconds that the calls of a turn may take.
    """

    tools: Mapping[str, Tool]
    reward: Reward
    max_turns: int
    manner: Manner
    timeout: float | None

    def identified(self) -> list[Any]:
        """Return what its conversations depend on, for `identity_of`."""
        return [*identified(self.tools, self.manner), self.reward, self.max_turns, self.timeout]

    def told_with(self, template: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what depends on the model's chat template: see `Environment.told_with`."""
        return self.manner.told_with(template, list(self.tools.values()))

    def __call__(self, row: Mapping[str, Any]) -> Talk:
        manner, own = self.manner.of_row(row)
        talk = ToolTalk(self.tools, manner.format, self.max_turns, self.timeout)
        answer = yield from talk.held(manner.first(question_of(own), list(self.tools.values())))
        return talk.counted(judged(self.reward, own, answer or ""))


class ToolTalk:
    """One such conversation: what it called so far.

    Args:
        tools: By name.
        format: How calls are written.
        max_turns: How often the policy speaks.
        timeout: Seconds that the calls of a turn may take.
    """

    def __init__(
        self, tools: Mapping[str, Tool], format: ToolFormat, max_turns: int, timeout: float | None
    ) -> None:
        self._tools, self._format, self._max_turns, self._timeout = tools, format, max_turns, timeout
        self._done: list[Done] = []
        self._answered = False

    def held(self, asked: Told) -> Generator[Told | Turn, str, str | None]:
        """Ask, carry out calls until there are none, and return the answer; None where turns or room were over."""
        try:
            said = yield asked
            for turn in range(1, self._max_turns + 1):
                done = carried_out(self._format.calls(said), self._tools, self._timeout)
                if not done:
                    self._answered = True
                    return said
                self._done += done
                if turn < self._max_turns:
                    told = self._format.told([one.call for one in done], [one.result for one in done])
                    said = yield Turn(told, meta={"calls": [one.record() for one in done]})
        except RolloutEnded:
            pass
        return None

    def counted(self, outcome: Outcome) -> Outcome:
        """Return an outcome that says beside its parts how tools were used."""
        errors = sum(not one.ok for one in self._done)
        used = {"calls": len(self._done), "errors": errors, "answered": float(self._answered)}
        return replace(outcome, parts={**used, **outcome.parts})


def identified(tools: Mapping[str, Tool], manner: Manner) -> list[Any]:
    """Return what tools and their manner are, for `identity_of`."""
    how = manner.format.name if manner.format in FORMATS.values() else manner.format
    return [[[t.function, dict(t.schema)] for t in tools.values()], how, manner.auto, manner.describe]


def question_of(row: Mapping[str, Any]) -> Told:
    """Return what a row asks: the text or the messages of its column `prompt` (or `messages`).

    Raises:
        ValidationError: It has neither.
    """
    name = next((name for name in QUESTIONS if name in row), None)
    asked = None if name is None else row[name]
    if isinstance(asked, str) and asked:
        return asked
    if not is_chat(asked):
        raise ValidationError(
            f"a row of tool_environment has its question as a text or as messages in 'prompt'; this has "
            f"{', '.join(sorted(map(repr, row)))}."
        )
    return messages_of(asked, f"'{name}'")


def judged(reward: Reward, row: Mapping[str, Any], answer: str) -> Outcome:
    """Return what a reward makes of the answer to a row, with its parts.

    Raises:
        RewardError: It has failed.
    """
    asked = question_of(row)
    meta = {name: value for name, value in row.items() if name not in QUESTIONS}
    found = reward.outcome(asked, answer, meta)
    if found.error is not None:
        raise RewardError(f"The reward {as_given(reward.name)} {found.error}.")
    return Outcome(found.score, found.parts or {})


@checked
def tool_environment(
    tools: Sequence[Any],
    reward: RewardSpec,
    *,
    max_turns: int = 6,
    max_tokens: int | None = None,
    format: str | ToolFormat = "auto",
    describe: bool = True,
    timeout: float | None = 4.0,
    name: str = "tools",
) -> Environment:
    """Make an environment in which the model may call Python functions before it answers.

    A row's question is its column `prompt`, a text or messages. What the model says is read for calls, in the way of
    its chat template; each is carried out where rewards run, and its result is told in a `tool` message. What is wrong
    with a call (no valid JSON, no such tool, wrong arguments, an exception, no end) is told likewise, and the model may
    try again. What has no call is its answer, and the reward scores that as it would score any response. Metrics
    `rewards/NAME/calls`, `…/errors` and `…/answered` say how it uses its tools.

    Args:
        tools: Functions with typed parameters and a docstring; `rlvr.tools` has `calculator` and `python`.
        reward: Of the final answer: whatever `resolve_reward` takes. An answer that never came is an empty text.
        max_turns: How often the model speaks at most, its answer included.
        max_tokens: How many tokens it may say in all its turns together.
        format: How the model writes calls: "auto" goes by its chat template; "hermes" (Qwen, Hermes, SmolLM),
            "qwen_xml", "llama", "mistral"; "plain", of models without a template, is [name(argument, …)]; or an object
            with the methods of `rlvr.tools.ToolFormat`.
        describe: Tell a model whose template shows no tools which there are; not needed once it has been taught them.
        timeout: Seconds that the calls of one turn may take together: less than the run's own limit per turn
            (`reward_timeout`). None calls them without a limit.
        name: In metrics.

    Raises:
        ValidationError: No tools, two of one name, one that is no function with typed parameters; an unknown reward or
            format.

    Example:
        >>> env = rlvr.tool_environment([rlvr.tools.calculator], reward="math")
        >>> trainer = rlvr.RLVRTrainer(tc, rows, environment=env, max_new_tokens=64)
    """
    use = ToolUse(
        tools_named(tools),
        resolve_reward(reward),
        max_turns,
        Manner.of(format, describe),
        checked_timeout(timeout),
    )
    return Environment(use, max_turns, max_tokens, name)


def tools_named(tools: Any) -> dict[str, Tool]:
    """Return functions as tools, by name.

    Raises:
        ValidationError: There are none, two have one name, or one is none.
    """
    if not isinstance(tools, list | tuple) or not tools:
        raise ValidationError(f"tools={as_given(tools)}: give a list of functions, at least one.")
    named: dict[str, Tool] = {}
    for tool in map(Tool.of, itertools.islice(tools, MOST_TOOLS)):
        if tool.name in named:
            raise ValidationError(f"Two tools are called {as_given(tool.name)}: a model calls them by name.")
        named[tool.name] = tool
    return named


def checked_timeout(timeout: Any) -> float | None:
    """Return a time limit that can be kept."""
    number = not isinstance(timeout, bool) and isinstance(timeout, int | float)
    if timeout is not None and not (number and 0 < timeout <= MOST_SECONDS):
        raise ValidationError(
            f"timeout={as_given(timeout)} must be a number of seconds above 0, at most {MOST_SECONDS:,}, or None."
        )
    return None if timeout is None else float(timeout)
