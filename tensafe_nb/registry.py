"""One way to name a function: a callable, a registered name, or "package.module:attribute"."""

import contextlib
import functools
import importlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError, nearest

T = TypeVar("T", bound=Callable[..., Any])
_signatures: "weakref.WeakKeyDictionary[Callable[..., Any], inspect.Signature]" = weakref.WeakKeyDictionary()


class Registry(Generic[T]):
    """Functions by name, for losses, rewards and advantages.

    Args:
        kind: What the functions are, for messages ("loss", "reward").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def register(self, name: str, *, overwrite: bool = False) -> Callable[[T], T]:
        """Return a decorator that files a function under `name`.

        Running a notebook cell again replaces its own function (same module and qualified name); a different
        function under a taken name needs `overwrite=True`.

        Raises:
            ValidationError: The name is taken by a different function.
        """
        if not isinstance(name, str) or not name:
            given: Any = name
            example = f' Write @register_{self.kind}("{name_of(given)}").' if callable(given) else ""
            raise ValidationError(
                f"A {self.kind} is registered under a name, a text, not {as_given(name)}.{example}"
            )

        def decorate(function: T) -> T:
            taken = self._entries.get(name)
            if taken is not None and not overwrite and _identity(taken) != _identity(function):
                raise ValidationError(
                    f"The {self.kind} name {as_given(name)} is taken by {'.'.join(_identity(taken))}. "
                    f"Choose another name or pass overwrite=True."
                )
            self._entries[name] = function
            return function

        return decorate

    def resolve(self, spec: "str | T") -> T:
        """Return the function that `spec` means.

        Raises:
            ValidationError: No such name, module or attribute, or not callable.
        """
        if callable(spec):
            return spec
        if not isinstance(spec, str):
            raise ValidationError(
                f"A {self.kind} is a callable, a registered name or 'package.module:attribute', not {as_given(spec)}."
            )
        if ":" in spec:
            return load_dotted(spec, self.kind)  # type: ignore[no-any-return]
        if spec not in self._entries:
            raise ValidationError(
                f"There is no {self.kind} named {as_given(spec)}.{nearest(spec, self._entries)}"
            )
        return self._entries[spec]


def load_dotted(path: str, kind: str = "object") -> Any:
    """Import the callable at "package.module:attribute".

    Raises:
        ValidationError: The module or attribute does not exist or is not callable.
    """
    module_name, _, attribute = path.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except Exception as error:  # the module is the user's: it may raise anything
        raise ValidationError(
            f"The {kind} {as_given(path)}: cannot import {as_given(module_name)} ({error})."
        ) from error
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise ValidationError(
                f"The {kind} {as_given(path)}: {as_given(module_name)} has no "
                f"{as_given(part)}.{nearest(part, dir(target))}"
            )
        target = getattr(target, part)
    if not callable(target):
        raise ValidationError(f"The {kind} {as_given(path)} is a {type(target).__name__}, not a callable.")
    return target


def check_keywords(
    function: Callable[..., Any], keywords: dict[str, Any], kind: str, positional: int
) -> None:
    """Refuse keywords that `function` does not name; `**kwargs` counts as a declaration of nothing.

    Raises:
        ValidationError: With the nearest spelling.
    """
    parameters = list(signature_of(function).parameters.values())[positional:]
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for keyword in keywords:
        if keyword not in named:
            raise ValidationError(
                f"The {kind} {as_given(name_of(function))} has no keyword {as_given(keyword)}.{nearest(keyword, named)}"
            )


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a function; it is read once, for that takes longer than most checks.

    Raises:
        ValueError: As `inspect.signature`.
    """
    with contextlib.suppress(KeyError, TypeError):  # what cannot be a key is read each time
        return _signatures[function]
    signature = inspect.signature(function)
    with contextlib.suppress(TypeError):
        _signatures[function] = signature
    return signature


def name_of(function: Callable[..., Any]) -> str:
    """Return the name a person would call this function by."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _identity(function: Callable[..., Any]) -> tuple[str, str]:
    return (
        getattr(function, "__module__", "?"),
        getattr(function, "__qualname__", type(function).__qualname__),
    )
