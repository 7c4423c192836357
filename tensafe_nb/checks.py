"""Values where they enter a call: `@checked` refuses what a parameter's own annotation rules out, in our words.

Python checks the names of arguments, never their values, so that `steps="ten"` would fail somewhere inside, or be
believed. Only parameters whose annotation can be checked without a look inside are: numbers, texts, paths, choices, and
classes of this package. Sizes are asked for before anything is walked.
"""

import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from numbers import Integral
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar, Union, get_args, get_origin

import numpy as np

from tensafe_nb.display import as_given, with_article
from tensafe_nb.errors import ValidationError, nearest

P = ParamSpec("P")
R = TypeVar("R")
Check: TypeAlias = Callable[[Any], str | None]  # what is wrong with a value, or None
LARGEST = 1 << 63  # what fits a tensor, a file and the wire
MOST_ITEMS = 10_000  # of a list of options
LONGEST_TEXT = 10_000  # characters of a name, an id or a reason
LONGEST_PATH, LONGEST_NAME = 4096, 255  # characters: Linux's limits in bytes, which no longer text can keep


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: refuse arguments that the annotations of a function or method rule out.

    A parameter is checked where its annotation consists of `int`, `float`, `str`, `bool`, `Path`, `None`, literals and
    classes of this package; others are left to the function.

    Raises:
        ValidationError: With the function, the parameter, what it takes and what it was given.
        TypeError: A wrong signature, as Python says it; of an unknown keyword, with the nearest.
    """
    signature = inspect.signature(function)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    annotations = {
        name: resolved_annotation(function, parameter.annotation)
        for name, parameter in signature.parameters.items()
        if parameter.kind in named
    }
    found = {name: check_of(annotation) for name, annotation in annotations.items()}
    numbers = {name for name, annotation in annotations.items() if is_of_numbers(annotation)}
    checks = {name: check for name, check in found.items() if check is not None}
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    places = [name for name, kind in kinds.items() if kind is named[0]]
    if inspect.Parameter.POSITIONAL_ONLY in kinds.values():
        places = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True  # IPython's sign: the caller's line is the one to look at
        bound: Mapping[str, Any] = {}
        if len(args) <= len(places) and kwargs.keys() <= found.keys():  # `bind` would take most of a call
            bound = {**dict(zip(places, args, strict=False)), **kwargs}
        else:
            try:
                bound = signature.bind(*args, **kwargs).arguments
            except TypeError:
                refuse_unknown(function, signature, args, kwargs)
        for name, check in checks.items():
            if name in bound and (expected := check(bound[name])) is not None:
                given = as_given(bound[name])
                meant = "" if name in kwargs else meant_by(bound[name], checks, bound)
                raise ValidationError(f"{called(function, args)}: {name}={given} must be {expected}.{meant}")
            if name in numbers and name in bound and type(bound[name]).__module__ != "builtins":
                args, kwargs = with_plain(name, bound[name], places, args, kwargs)
        return function(*args, **kwargs)  # whatever else is wrong with a signature is Python's to explain

    return call


def is_of_numbers(annotation: Any) -> bool:
    """Whether a parameter takes numbers."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return any(kind in (int, float) for kind in kinds)


def with_plain(name: str, value: Any, places: Sequence[str], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return arguments with one of them, a number of numpy's or torch's, as Python's own."""
    if whole(value) is None:
        plain: Any = operator.index(value)
    elif number(value) is None:
        plain = float(value)
    else:
        return args, kwargs
    if name in kwargs:
        return args, {**kwargs, name: plain}
    place = places.index(name)
    return (*args[:place], plain, *args[place + 1 :]), kwargs


def meant_by(value: Any, checks: Mapping[str, Check], bound: Mapping[str, Any]) -> str:
    """Say under which keyword a value fits that was given by its place, and does not fit there; None fits too many."""
    if value is None:
        return ""
    fitting = next(
        (name for name, check in checks.items() if name not in bound and check(value) is None), None
    )
    return "" if fitting is None else f" Did you mean {fitting}={as_given(value)}?"


def called(function: Callable[..., Any], args: Sequence[Any]) -> str:
    """Return what a function is to its caller: a method is one of the class that it was called on."""
    owner, _, name = function.__qualname__.rpartition(".")
    if name == "__init__":
        return owner
    bases = type(args[0]).__mro__ if args else ()
    inherited = any(base.__qualname__ == owner for base in bases)
    return f"{type(args[0]).__qualname__}.{name}" if inherited else function.__qualname__


def refuse_unknown(
    function: Callable[..., Any], signature: inspect.Signature, args: Sequence[Any], given: Mapping[str, Any]
) -> None:
    """Refuse a keyword that a function does not have, as Python does, and name the nearest."""
    known = [name for name in signature.parameters if name not in ("self", "cls")]
    for name in given:
        if name not in known:
            raise TypeError(
                f"{called(function, args)}() got an unexpected keyword argument {name!r}.{nearest(name, known)}"
            ) from None


def resolved_annotation(function: Callable[..., Any], annotation: Any) -> Any:
    """Return an annotation that is written as text, as it is with `from __future__ import annotations`."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, function.__globals__)  # our own source
    except NameError:  # a class that comes further down: it is not checked
        return None


def check_of(annotation: Any) -> Check | None:
    """Return the check of an annotation; None where it cannot be checked without a look inside."""
    if get_origin(annotation) in (Union, UnionType):
        given_parts = get_args(annotation)
        as_path = Path in given_parts  # a text is the name of a file then
        parts = [path if as_path and part is str else check_of(part) for part in given_parts]
        return any_of(parts) if None not in parts else None  # type: ignore[arg-type]
    if get_origin(annotation) is Literal:
        return functools.partial(choice, get_args(annotation))
    if annotation is NoneType:
        return lambda value: None if value is None else "None"
    of_one_kind = get_args(annotation)[1:] in ((), (Ellipsis,))  # tuple[int, ...], not tuple[int, str]
    if get_origin(annotation) in (Sequence, tuple) and of_one_kind:
        part = check_of(get_args(annotation)[0])
        return None if part is None else functools.partial(list_of, part)
    if get_origin(annotation) is Mapping and get_args(annotation)[0] is str:
        return options
    if get_origin(annotation) is Callable:
        return lambda value: None if callable(value) else "a function"
    if annotation in _SIMPLE:
        return _SIMPLE[annotation]
    if is_ours(annotation):
        expected = with_article(f"{annotation.__name__}{getattr(annotation, 'MADE_BY', '')}")
        return lambda value: None if isinstance(value, annotation) else expected
    return None


def is_ours(annotation: Any) -> bool:
    """Whether an annotation is a class of this package; of a Protocol nobody is an instance."""
    return (
        isinstance(annotation, type)
        and annotation.__module__.startswith("tensafe_nb.")
        and not getattr(annotation, "_is_protocol", False)
    )


def any_of(parts: list[Check]) -> Check:
    """Return the check that is content where one of these is."""

    def check(value: Any) -> str | None:
        wrong: dict[str, None] = {}
        for part in parts:
            if (text := part(value)) is None:
                return None
            wrong[text] = None
        return " or ".join(text for text in wrong if text)

    return check


def list_of(part: Check, value: Any) -> str | None:
    """Say what is wrong with a list, or with the first of its items that `part` refuses."""
    items: Any = (value,) if isinstance(value, str) else value
    if not isinstance(items, Sequence | np.ndarray) or (isinstance(value, np.ndarray) and value.ndim > 1):
        return "a list"
    if _size(items) > MOST_ITEMS:
        return f"a list of at most {MOST_ITEMS:,}"
    wrong = next((text for item in items if (text := part(item))), None)
    return wrong and f"a list, and each item of it {wrong}"


def options(value: Any) -> str | None:
    """Say what is wrong with a dict of keywords."""
    if (
        isinstance(value, Mapping)
        and _size(value) <= MOST_ITEMS
        and all(isinstance(name, str) for name in value)
    ):
        return None
    return "a dict whose keys are texts"


def _size(value: Any) -> int:
    try:
        return len(value)
    except OverflowError:  # range(10**30)
        return MOST_ITEMS + 1


def choice(among: tuple[Any, ...], value: Any) -> str | None:
    """Say what is wrong with one of a few values."""
    if any(type(value) is type(one) and value == one for one in among):
        return None
    return " or ".join(map(repr, among))


def whole(value: Any) -> str | None:
    """Say what is wrong with a whole number."""
    try:
        number = operator.index(value)
    except (TypeError, ValueError):  # an array of one number is none
        return "a whole number"
    return None if abs(number) < LARGEST else f"a whole number below {LARGEST:.0e}"


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, numpy's too."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def number(value: Any) -> str | None:
    """Say what is wrong with a number; infinity is one, NaN is not."""
    if isinstance(value, str | bytes) or getattr(value, "shape", ()) != ():
        return "a number"
    try:
        return "a number" if math.isnan(value) else None
    except (TypeError, ValueError, OverflowError):
        return "a number"


def text(value: Any) -> str | None:
    """Say what is wrong with a name, an id or a reason."""
    if not isinstance(value, str):
        return "a text"
    if len(value) > LONGEST_TEXT:
        return f"a text of at most {LONGEST_TEXT:,} characters"
    return None if _can_be_written(value) else "a text that can be written as UTF-8, without a NUL"


def path(value: Any) -> str | None:
    """Say what is wrong with the path of a file or folder, or with a text that names one."""
    if not isinstance(value, str | Path) or str(value) == "":
        return "the path of a file or folder"
    if len(str(value)) > LONGEST_PATH or max(map(len, Path(value).parts), default=0) > LONGEST_NAME:
        return "a path as short as file systems take"
    return None if _can_be_written(str(value)) else "a path that can be written as UTF-8, without a NUL"


def _can_be_written(value: str) -> bool:
    return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)


def truth(value: Any) -> str | None:
    """Say what is wrong with True or False; 0 and 1 mean these."""
    is_one = type(value).__name__ in ("bool", "bool_") or (whole(value) is None and value in (0, 1))
    return None if is_one else "True or False"


_SIMPLE: Mapping[Any, Check] = {
    int: whole,
    float: number,
    str: text,
    bool: truth,
    Path: path,
    datetime: lambda value: None if isinstance(value, datetime) else "a date",
}
