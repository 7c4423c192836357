"""Single values of a row: which are texts, which say that there is none, and how an error names them."""

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a list, or what a table has in place of one."""
    return isinstance(value, list | tuple | np.ndarray)


def checked_text(value: Any, what: str) -> str:
    """Return a text that a tokenizer can read.

    Raises:
        ValidationError: It is none, or holds half a surrogate pair.
    """
    if not isinstance(value, str):
        name = what.strip("'") if what.startswith("'") else ""
        raise ValidationError(f"{what} is {kind_of(value)}: a text is expected.{text_hint(name, value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValidationError(
            f"{what} holds half a surrogate pair ({value[error.start]!a} at character {error.start}), which is no "
            f"character: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') mends it."
        ) from error
    return str(value)  # of numpy.str_, too


def missing(value: Any) -> bool:
    """Whether a value says that there is none: None, NaN, or pandas' NA and NaT."""
    return not isinstance(value, str) and (  # most are
        value is None
        or (isinstance(value, float | np.floating) and bool(value != value))
        or type(value).__name__ in ("NAType", "NaTType")
    )


def kind_of(value: Any) -> str:
    """Return what a value is, for an error: "empty", "the int 3", "a dict"."""
    if missing(value):
        return "None" if value is None else f"missing ({value})"
    if is_list(value) and len(value) == 0:
        return "empty"
    if isinstance(value, bool | int | float | np.generic):
        plain = value.item() if isinstance(value, np.generic) else value
        return f"the {type(value).__name__} {as_given(plain)}"
    return f"a {type(value).__name__}"


def text_hint(name: str, value: Any) -> str:
    """Return the line that makes a text of it, where there is an honest one."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if name and number and not missing(value):
        return f" str(row[{as_given(name)}]) makes one; of a column, frame[{as_given(name)}].astype(str)."
    if name and isinstance(value, bytes):
        return f" row[{as_given(name)}].decode() makes one."
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
        return " One row has one text: give a row for each."
    return ""


def shortened(row: Any) -> str:
    """Return a row in at most 80 characters."""
    text = row if isinstance(row, str) else as_given(row)
    return text if len(text) <= 80 else f"{text[:80]}…"
