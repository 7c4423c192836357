"""`tn.check("05.2", answer)`: right, not yet with a hint, or not answered. Offline, and never a traceback."""

import dis
import inspect
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, TypeAlias

import numpy as np

from tensafe_nb.checks import checked
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError, nearest

State: TypeAlias = Literal["right", "not yet", "not answered"]
BLANK = {
    "RESUME",
    "LOAD_CONST",
    "RETURN_VALUE",
    "RETURN_CONST",
    "NOP",
    "COPY_FREE_VARS",
    "RETURN_GENERATOR",
    "POP_TOP",
}


class Hint(Exception):
    """Why an answer is not right yet, in words for its author; never what would be right."""


@dataclass(frozen=True, slots=True)
class Exercise:
    """One exercise.

    Attributes:
        number: The notebook's number, and its own there: "05.2".
        look: Raises a `Hint` unless the answer is right.
        right: What there is to say then.
    """

    number: str
    look: Callable[[Any], None]
    right: str


@dataclass(frozen=True, slots=True)
class Checked:
    """What `check` found, in a line to be read.

    Attributes:
        number: Of the exercise.
        state: "right", "not yet" or "not answered".
        text: What there is to say: a hint, unless it is right.
    """

    number: str
    state: State
    text: str

    @property
    def right(self) -> bool:
        """Whether the answer is right: what graders ask."""
        return self.state == "right"

    def __repr__(self) -> str:
        sign = {"right": "✓", "not yet": "✗", "not answered": "…"}[self.state]
        return f"{sign} {self.number} {self.state}: {self.text}"


EXERCISES: dict[str, Exercise] = {}


def exercise(number: str, right: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Return a decorator that makes an exercise of a function, which raises a `Hint` unless its answer is right."""

    def file(look: Callable[[Any], None]) -> Callable[[Any], None]:
        EXERCISES[number] = Exercise(number, look, right)
        return look

    return file


@checked
def check(number: str, answer: Any = ...) -> Checked:
    """Check the answer to an exercise of the notebooks, and give a hint where it is not right yet.

    Args:
        number: Of the exercise, as it stands in its notebook: "05.2".
        answer: Yours: a value, or a function that the exercise asks for. It is called here, on a few examples.

    Raises:
        ValidationError: There is no such exercise; the message names the nearest.

    Example:
        >>> check("01.1", 16384)
        ✗ 01.1 not yet: That is the whole matrix. LoRA trains two thin ones in its place.
    """
    import_module("tensafe_nb.classroom.exercises")  # they file themselves
    given = f"0{number}" if number[1:2] == "." else number
    if given not in EXERCISES:
        raise ValidationError(f"There is no exercise {as_given(number)}.{nearest(given, EXERCISES)}")
    found = EXERCISES[given]
    if is_blank(answer):
        return Checked(
            given, "not answered", "put your answer in place of the three dots, and run the cell again."
        )
    try:
        found.look(answer)
    except Hint as hint:
        return Checked(given, "not yet", str(hint))
    except Exception as error:  # noqa: BLE001  # an answer may be anything, and whatever is done to it may fail
        kind = type(error).__name__
        return Checked(
            given, "not yet", f"this could not be looked at ({kind}): is it what the exercise asks for?"
        )
    return Checked(given, "right", found.right)


def is_blank(answer: Any) -> bool:
    """Whether nothing was answered: three dots, None, an empty text, or a function that does nothing."""
    if answer is None or answer is ... or (isinstance(answer, str) and not answer.strip()):
        return True
    code = getattr(answer, "__code__", None) if isinstance(answer, types.FunctionType) else None
    return code is not None and all(
        step.opname in BLANK and (step.argval is None or "CONST" not in step.opname)
        for step in dis.get_instructions(code)
    )


# what exercises ask of an answer


def number_in(answer: Any) -> float:
    """Return the one number that an answer is."""
    value = answer.item() if isinstance(answer, np.generic) else answer
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Hint(f"the answer is one number, not {as_given(answer)}.")
    return float(value)


def numbers_in(answer: Any, count: int | None = None) -> list[float]:
    """Return the numbers that an answer lists."""
    if isinstance(answer, np.ndarray) and answer.size <= 1000:
        answer = answer.tolist()
    if not isinstance(answer, Sequence) or isinstance(answer, str | bytes):
        raise Hint(f"the answer is a list of numbers, not {as_given(answer)}.")
    if len(answer) > 1000 or (count is not None and len(answer) != count):
        raise Hint(f"a list of {count or 'fewer'} numbers is asked for, and this has {len(answer)}.")
    return [number_in(item) for item in answer]


def texts_in(answer: Any) -> list[str]:
    """Return the names that an answer is, or lists."""
    listed = [answer] if isinstance(answer, str) else answer
    if (
        not isinstance(listed, list | tuple | set)
        or len(listed) > 20
        or not all(isinstance(n, str) for n in listed)
    ):
        raise Hint(f"the answer is a list of names, not {as_given(answer)}.")
    return [name.strip() for name in listed]


def called(answer: Any, *given: Any, shown: str = "", awaited: bool = False) -> Any:
    """Call a function of the student's; what goes wrong in it is a hint."""
    call = f"answer({shown or ', '.join(map(as_given, given))})"
    if not callable(answer):
        raise Hint(
            f"the answer is a function: define answer(…), and give the function itself, not {as_given(answer)}."
        )
    try:
        value = answer(*given)
    except Exception as error:  # noqa: BLE001  # it is the student's code
        raise Hint(f"{call} raised {type(error).__name__}: {as_given(str(error))}") from None
    if inspect.iscoroutine(value) and not awaited:
        value.close()
        raise Hint("this function is not awaited: write `def` in place of `async def`.")
    if value is None:
        raise Hint(f"{call} returned None: does every way through the function end with return?")
    return value


def near(value: float, wanted: float, tolerance: float = 1e-6) -> bool:
    """Whether two numbers are the same, but for rounding."""
    return math.isclose(value, wanted, rel_tol=tolerance, abs_tol=tolerance)
