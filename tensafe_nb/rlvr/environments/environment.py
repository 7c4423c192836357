"""An environment is a generator function: its local variables are the state, what it yields is what the model is told.

What comes back from a `yield` is what the model said, and what it returns is the reward. This file runs in the
processes of environments too and imports nothing heavy.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias, overload

from tensafe_nb.checks import checked
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError, nearest
from tensafe_nb.protocol.results import Message
from tensafe_nb.registry import Registry, name_of
from tensafe_nb.rlvr.rewards.identity import Identity, identity_of

Told: TypeAlias = str | Sequence[Message]


@dataclass(frozen=True, slots=True)
class Turn:
    """What an environment tells, and what it thinks of the turn before: `said = yield Turn("Warmer.", reward=0.2)`.

    Attributes:
        text: A text, or a list of messages.
        reward: For the turn before, on top of what the environment returns. Where a value head is trained
            (`advantage="gae"`), the tokens after that turn do not answer for it; elsewhere it is added to the whole.
        meta: What else there is to say of the turn before, kept with it: plain data.
    """

    text: Told
    reward: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an environment returns when there is more to say than a number.

    Attributes:
        reward: A number; None abstains: the rollout is not trained on.
        parts: Further numbers by name, as metrics `rewards/ENVIRONMENT/NAME`; they train nothing.
        meta: What else there is to keep with the conversation: plain data.
    """

    reward: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)


class RolloutEnded(Exception):  # no error: an environment may expect it
    """Comes out of a `yield` instead of an answer when there is none: catch it to give a reward all the same.

    Attributes:
        reason: "length": the turn before was cut, or there is no room for another. "turns": `max_turns` are over.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Environment:
    """A generator function and its limits; `environment` makes one.

    Attributes:
        function: `fn(row)`, a generator function or an async one.
        max_turns: How often the policy speaks at most.
        max_tokens: How many tokens it may say in all its turns together; None leaves it to the limit per turn. A turn
            begins only where it could be as long as `max_new_tokens`.
        name: In metrics.
        kwargs: Further keywords of the function.
        overlong: What the reward "overlong" says of the longest turn is added to what the environment gives: its
            `max_length` and `cache`, in tokens. `RLVRTrainer` sets it for an algorithm that asks for it.
    """

    function: Callable[..., Any]
    max_turns: int = 8
    max_tokens: int | None = None
    name: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    overlong: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.kwargs, Mapping):
            raise ValidationError(
                f"Environment: name={as_given(self.name)} must be a text, and kwargs={as_given(self.kwargs)} a dict."
            )
        if not self.name:
            object.__setattr__(self, "name", name_of(self.function))
        check_environment(self)
        for name in ("__module__", "__qualname__", "__doc__"):  # it is known by its function's place
            object.__setattr__(self, name, getattr(self.function, name, None))

    def __repr__(self) -> str:
        more = "" if self.max_tokens is None else f", max_tokens={self.max_tokens}"
        keywords = "".join(f", {name}={as_given(value)}" for name, value in self.kwargs.items())
        return f"<environment {self.name!r}, max_turns={self.max_turns}{more}{keywords}>"

    def __call__(self, row: Mapping[str, Any]) -> Any:
        """Begin a conversation by hand: the generator, to be driven with `next` and `send`."""
        return self.function(row, **self.kwargs)

    @cached_property
    def asynchronous(self) -> bool:
        """Whether it is an async generator function."""
        return inspect.isasyncgenfunction(_called(self.function))

    @property
    def version(self) -> str:
        """A digest of its code and all that this uses, as it is now: rewards of two versions are not comparable."""
        return self.identity.version

    @property
    def identity(self) -> Identity:
        """What its conversations depend on."""
        return identity_of(self)

    @property
    def true(self) -> str | None:
        """The part that says whether a conversation went well: what the environment gave, where more is added to it."""
        return None if self.overlong is None else self.name

    def identified(self) -> list[Any]:
        """Return what its conversations depend on, for `identity_of`."""
        return [self.function, dict(self.kwargs), self.max_turns, self.max_tokens, self.overlong]

    def told_with(self, template: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what depends on the model's chat template: columns that its rows have besides, and options of that.

        An environment with tools has them: the way to call those, and what the template is to show of them.
        """
        of_function = getattr(self.function, "told_with", None)
        return ({}, {}) if of_function is None else of_function(template)

    def longest(self, max_new_tokens: int) -> int:
        """Return how many tokens the policy could say in a rollout."""
        whole = self.max_turns * max_new_tokens
        return whole if self.max_tokens is None else min(whole, self.max_tokens)


EnvironmentSpec: TypeAlias = Environment | Callable[..., Any] | str
_ENVIRONMENTS: Registry[Any] = Registry("environment")


@overload
def environment(function: Callable[..., Any]) -> Environment: ...
@overload
def environment(
    function: None = None,
    *,
    max_turns: int = 8,
    max_tokens: int | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> Callable[[Callable[..., Any]], Environment]: ...
@checked
def environment(
    function: Callable[..., Any] | None = None,
    *,
    max_turns: int = 8,
    max_tokens: int | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> Any:
    """Make an environment of a generator function `fn(row)`, a row being what the trainer was given as a prompt.

    `yield` a text (or a list of chat messages, or a `Turn`) to tell it to the model; what comes back is what the model
    said, a text. `return` the reward, a number or an `Outcome`. An async generator function cannot return: it yields
    its `Outcome` instead. For a model with a chat template, a text is the message of a user.

    Args:
        function: The generator function, where the decorator is written without arguments.
        max_turns: How often the model speaks at most.
        max_tokens: How many tokens it may say in all its turns together; None leaves it to the limit per turn.
        name: Registers it, for recipes and `RLVRTrainer(environment="name")`.
        overwrite: Replace a different environment of this name. Running a cell again needs no overwrite.

    Raises:
        ValidationError: It is no generator function, or a limit is none.

    Example:
        >>> @rlvr.environment(max_turns=4)
        ... def guess(row):
        ...     said = yield "Guess a number from 1 to 20."
        ...     for turn in range(3):
        ...         if said.strip() == str(row["n"]):
        ...             return 1 - 0.2 * turn
        ...         said = yield "Higher." if int(said) < row["n"] else "Lower."
        ...     return 0.0
    """

    def decorate(function: Callable[..., Any]) -> Environment:
        made = Environment(function, max_turns, max_tokens, name or "")
        return made if name is None else _ENVIRONMENTS.register(name, overwrite=overwrite)(made)

    return decorate if function is None else decorate(function)


def get_registered_environments() -> list[str]:
    """Return the names of all registered environments."""
    return list(_ENVIRONMENTS)


def resolve_environment(spec: Any, **kwargs: Any) -> Environment:
    """Return the environment that `spec` means, with keywords bound.

    Args:
        spec: An environment, a generator function, a registered name, or "package.module:attribute".
        kwargs: Further keywords of its function.

    Raises:
        ValidationError: An unknown name, an unknown keyword, or what is no generator function.
    """
    found = _ENVIRONMENTS.resolve(spec)
    made = found if isinstance(found, Environment) else Environment(found)
    return replace(made, kwargs={**made.kwargs, **kwargs}) if kwargs else made


def check_environment(made: Environment) -> None:
    """Refuse what no conversation could come of.

    Raises:
        ValidationError: It is no generator function, its parameters do not fit, or a limit is none.
    """
    if not callable(made.function):
        raise ValidationError(f"An environment is a generator function, not {as_given(made.function)}.")
    called = _called(made.function)
    if not (inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called)):
        why = "it has no yield" if inspect.isroutine(called) else f"it is {as_given(made.function)}"
        raise ValidationError(
            f"An environment is a generator function: {made.name} is none, {why}. Say with `said = yield text` what "
            f"the model is told, and `return` the reward."
        )
    for name, value in (("max_turns", made.max_turns), ("max_tokens", made.max_tokens)):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not whole and not (value is None and name == "max_tokens"):
            raise ValidationError(
                f"environment: {name}={as_given(value)} must be a whole number, at least 1."
            )
    match made.overlong:
        case None:
            pass
        case tuple((int(longest), int(cache))) if 0 < cache < longest:
            pass
        case _:
            raise ValidationError(
                f"environment: overlong={as_given(made.overlong)} must be (max_length, cache), whole numbers of tokens "
                f"with 0 < cache < max_length."
            )
    names: set[str] = set()
    try:
        signature = inspect.signature(made.function)
        names = set(list(signature.parameters)[1:])  # behind the row
        signature.bind({}, **made.kwargs)
    except (TypeError, ValueError) as error:
        for unknown in made.kwargs.keys() - names:
            raise ValidationError(
                f"The environment {made.name} has no keyword {as_given(unknown)}.{nearest(str(unknown), names)}"
            ) from error
        raise ValidationError(
            f"An environment is called as {made.name}(row): {error}. Give further parameters a default."
        ) from error


def _called(function: Any) -> Any:
    """Return what is executed when something is called: the method `__call__` of an object."""
    if inspect.isroutine(function):
        return inspect.unwrap(function)
    return getattr(function, "__call__", function)  # noqa: B004  # it may be a generator function
