"""A conversation without a model: an environment is tried out, with words of one's own for the policy's."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tensafe_nb.checks import checked
from tensafe_nb.display import Facts, as_given, shown
from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr.environments.environment import (
    EnvironmentSpec,
    Outcome,
    RolloutEnded,
    resolve_environment,
)
from tensafe_nb.rlvr.environments.stage import Reply, outcome, told_or_over
from tensafe_nb.rlvr.rewards.reward import result_of


@shown
@dataclass(frozen=True, repr=False)
class Rehearsal:
    """What came of a conversation that was tried out.

    Attributes:
        messages: What was said, in order: dicts with `role` and `content`; as a row of training, they teach a model to
            talk like this.
        rewards: Of the policy's turns, as far as the environment rewarded any, by the number of the turn.
        outcome: What the environment returned; None where it would hear more.
    """

    messages: list[dict[str, Any]]
    rewards: dict[int, float]
    outcome: Outcome | None

    @property
    def reward(self) -> float | None:
        """The whole reward, those of turns included."""
        if self.outcome is None or self.outcome.reward is None:
            return None
        return self.outcome.reward + sum(self.rewards.values())

    def _facts(self) -> Facts:
        said = {
            f"{number} {one.get('name') or one['role']}": one["content"]
            for number, one in enumerate(self.messages, 1)
        }
        parts = {} if self.outcome is None else dict(self.outcome.parts)
        ended = "it would hear more" if self.outcome is None else self.reward
        return {**said, "reward": ended, **parts}

    def __repr__(self) -> str:
        said = "\n".join(f"{one.get('name') or one['role']}: {one['content']}" for one in self.messages)
        ended = "it would hear more" if self.outcome is None else f"reward {self.reward}"
        parts = {} if self.outcome is None else dict(self.outcome.parts)
        return "\n".join([said, ended + "".join(f", {name} {value:g}" for name, value in parts.items())])


@checked
def rehearse(
    environment: EnvironmentSpec, row: Mapping[str, Any], said: Any, *, tokenizer: Any = None
) -> Rehearsal:
    """Try an environment out without a model: you say what the policy would.

    Everything happens here and now: what the environment raises, it raises here.

    Args:
        environment: The environment.
        row: What it is given.
        said: The policy's words: a list of texts, or a function that gets the messages so far and returns a text. With
            fewer texts than the environment wants to hear, the conversation stays open.
        tokenizer: Whose chat template decides how tools are called: `tc.tokenizer`; without one, as Hermes and Qwen do.

    Raises:
        ValidationError: There is more to say than the environment hears.

    Example:
        >>> rlvr.rehearse(guess, {"n": 7}, ["10", "7"])
        user: Guess a number from 1 to 20.
        assistant: 10
        user: Lower.
        assistant: 7
        reward 0.8
    """
    made = resolve_environment(environment)
    template = getattr(tokenizer, "chat_template", None)
    besides: dict[str, Any] = {}
    if tokenizer is not None:
        besides, _ = made.told_with(template if isinstance(template, str) else None)
    if isinstance(said, type) or not (callable(said) or isinstance(said, list | tuple)):
        raise ValidationError(
            "said: give a list of texts, or a function that gets the messages and returns a text."
        )
    talk = made({**row, **besides})
    answered = inspect.isasyncgen(talk)
    messages: list[dict[str, Any]] = []
    rewards: dict[int, float] = {}
    ended: Reply | None = None
    spoken = 0

    def tell(words: str | None, over: bool = False) -> Reply:
        """Let the environment go on; return what it tells, or its outcome."""
        try:
            if over:
                value = talk.athrow(RolloutEnded("turns")) if answered else talk.throw(RolloutEnded("turns"))
            else:
                value = talk.asend(words) if answered else talk.send(words)
            return told_or_over(result_of(value) if answered else value)
        except StopIteration as end:
            return outcome(end.value)
        except StopAsyncIteration:
            return Reply()
        except RolloutEnded:
            return Reply()

    reply = tell(None)
    while not reply.over:
        messages += told_messages(reply.told)
        if callable(said):
            words = said([dict(one) for one in messages])
        elif spoken < len(said):
            words = said[spoken]
        else:
            break
        if not isinstance(words, str):
            raise ValidationError(f"said: what the policy says is a text, not {as_given(words)}.")
        spoken += 1
        messages.append({"role": "assistant", "content": words})
        reply = tell(words)
        if reply.reward is not None and not reply.over:
            rewards[spoken] = reply.reward
        if not reply.over and spoken >= made.max_turns:
            reply = tell(None, over=True)
    if reply.over:
        ended = reply
        if not callable(said) and spoken < len(said):
            raise ValidationError(
                f"The environment has heard enough after {spoken} of {len(said)} texts, and ended with reward "
                f"{reply.reward}."
            )
    elif not answered:
        talk.close()
    heard = None if ended is None else Outcome(ended.reward, ended.parts or {}, ended.meta or {})
    return Rehearsal(messages, rewards, heard)


def told_messages(told: Any) -> list[dict[str, Any]]:
    """Return what is told as messages; a text is that of a user."""
    return [{"role": "user", "content": told}] if isinstance(told, str) else [dict(one) for one in told]
