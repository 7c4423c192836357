"""Reward functions: how they are named, called and counted. A reward that failed is None, never 0."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypeAlias

import numpy as np

from tensafe_nb.errors import RewardError, ValidationError
from tensafe_nb.registry import Registry, check_keywords, name_of
from tensafe_nb.rlvr.rollouts import Trajectory

RewardFunction: TypeAlias = Callable[..., "float | None"]

_REWARDS: Registry[RewardFunction] = Registry("reward")
_FOREIGN = {"completions", "solution_str", "queries"}  # parameters of TRL's, verl's and OpenRLHF's functions


def register_reward(name: str, *, overwrite: bool = False) -> Callable[[RewardFunction], RewardFunction]:
    """Return a decorator that registers `fn(prompt, response, meta=None) -> float` as a reward.

    Args:
        name: What `resolve_reward` and `RLVRTrainer(reward=…)` know it by.
        overwrite: Replace a different function of this name. Running a cell again needs no overwrite.

    Raises:
        ValidationError: The name is taken by a different function.

    Example:
        >>> @register_reward("short")
        ... def short(prompt, response, meta=None):
        ...     return 1.0 if len(response) < 20 else 0.0
    """
    return _REWARDS.register(name, overwrite=overwrite)


def get_registered_rewards() -> list[str]:
    """Return the names of all registered rewards."""
    return list(_REWARDS)


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward function with its keywords bound: `reward(prompt, response, meta)` gives what it returns.

    Attributes:
        name: What a person calls it.
        function: The user's own.
        kwargs: Its keywords beyond prompt, response and meta.
        positional: How many of (prompt, response, meta) it takes.
    """

    name: str
    function: RewardFunction
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    positional: int = 3

    def __call__(self, prompt: str, response: str, meta: Mapping[str, Any] | None = None) -> "float | None":
        return self.function(*(prompt, response, meta)[: self.positional], **self.kwargs)


def resolve_reward(spec: "str | RewardFunction | Reward", **kwargs: Any) -> Reward:
    """Return the reward that `spec` means, with keywords bound.

    Args:
        spec: A registered name, "package.module:attribute", or a callable `fn(prompt, response, meta=None)`.
        kwargs: Further keywords of the function.

    Raises:
        ValidationError: An unknown name or keyword, or a function with another signature.

    Example:
        >>> reward = resolve_reward("keyword_contains", keywords=["solution", "answer"])
        >>> reward("What is 3 * 4?", "The answer is 12")
        1.0
    """
    if isinstance(spec, Reward):
        return resolve_reward(spec.function, **{**spec.kwargs, **kwargs}) if kwargs else spec
    function = _REWARDS.resolve(spec)
    name = spec if isinstance(spec, str) else name_of(function)
    positional = _positional(function, name)
    check_keywords(function, kwargs, "reward", positional)
    return Reward(name, function, kwargs, positional)


def _positional(function: RewardFunction, name: str) -> int:
    """Return how many of (prompt, response, meta) it takes, 3 or 2; refuse any other signature."""
    signature = inspect.signature(function)
    counts = [count for count in (3, 2) if _takes(signature, count)]
    if not counts or _FOREIGN & set(signature.parameters) or inspect.iscoroutinefunction(function):
        raise ValidationError(
            f"The reward {name!r} has the signature {signature}: expected a plain function "
            f"fn(prompt, response, meta=None) -> float."
        )
    return counts[0]


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind_partial(*range(count))
    except TypeError:
        return False
    return True


def score(trajectories: Iterable[Trajectory], reward: Reward) -> None:
    """Fill in `reward`, or `reward_error` where the function failed; such a trajectory stays unscored.

    A function that returns None abstains: no reward, and no error either.
    """
    for trajectory in trajectories:
        trajectory.reward, trajectory.reward_error = _score_one(trajectory, reward)


def _score_one(trajectory: Trajectory, reward: Reward) -> tuple[float | None, str | None]:
    try:
        value: Any = reward(trajectory.prompt, trajectory.response, trajectory.meta)
    except Exception as error:  # noqa: BLE001  # user code may raise anything: kept as text, counted, shown
        return None, f"{type(error).__name__}: {error}"
    if value is None:
        return None, None
    try:
        number = float(value) if isinstance(value, Real | np.bool_) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        return None, f"returned {str(value)[:80]!r}, expected a finite number or None"
    return number, None


def check_scored(trajectories: Sequence[Trajectory], reward: Reward) -> None:
    """Refuse a step of which nothing was scored.

    Raises:
        RewardError: Names the first error.
    """
    if any(trajectory.reward is not None for trajectory in trajectories):
        return
    errors = [trajectory for trajectory in trajectories if trajectory.reward_error is not None]
    if not errors:
        raise RewardError(f"The reward {reward.name!r} returned None for all {len(trajectories)} rollouts.")
    first = errors[0]
    raise RewardError(
        f"The reward {reward.name!r} scored none of {len(trajectories)} rollouts. Its first error, on prompt "
        f"{first.prompt!r} and response {first.response!r}: {first.reward_error}. Fix the function and run "
        f"again; failed rewards are never counted as 0.",
        details={"errors": len(errors), "prompt": first.prompt, "response": first.response},
    )


@register_reward("keyword_contains")
def keyword_contains(
    prompt: str,
    response: str,
    meta: Mapping[str, Any] | None = None,
    *,
    keywords: Sequence[str] = (),
    positive_reward: float = 1.0,
    negative_reward: float = -0.5,
) -> float:
    """Reward a response that contains any of the keywords, whatever their case.

    Args:
        prompt: Not read.
        response: Where they are looked for.
        meta: `meta["keywords"]`, if any, takes the place of `keywords`.
        keywords: One or more; a string counts as one.
        positive_reward: When one is found.
        negative_reward: When none is.

    Raises:
        ValidationError: There are no keywords.
    """
    wanted = (meta or {}).get("keywords", keywords)
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    if not wanted:
        raise ValidationError("keyword_contains has no keywords: pass keywords=[…], or a column 'keywords'.")
    text = response.casefold()
    return positive_reward if any(word.casefold() in text for word in wanted) else negative_reward


@register_reward("exact_match")
def exact_match(prompt: str, response: str, meta: Mapping[str, Any] | None = None) -> float:
    """Reward 1 for a response that equals `meta["answer"]`, surrounding white space apart; else 0.

    Raises:
        ValidationError: The prompt has no column 'answer'.
    """
    if not meta or "answer" not in meta:
        raise ValidationError('exact_match needs an answer: give prompts as {"prompt": …, "answer": …}.')
    return float(response.strip() == str(meta["answer"]).strip())
