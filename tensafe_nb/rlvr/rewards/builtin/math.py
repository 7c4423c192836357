"""The reward "math": the response's answer, compared with the right one as mathematics. Needs tensafe_nb[math].

math-verify's own time limits use `signal.alarm`, which works in a main thread only (Math-Verify #50, #55), so
they are off: a run's scoring processes have a clock of their own.
"""

import math_verify  # type: ignore[import-untyped, unused-ignore]
from math_verify import grader, parser

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr.rewards.builtin.answers import Meta, answers_of
from tensafe_nb.rlvr.rewards.builtin.numerals import Number, gold_number, lone_number, same

parser.TIMEOUT_WARNING_SHOWN = grader.TIMEOUT_WARNING_SHOWN = True  # we do provide the clock it asks for
_EXTRACT = (  # boxed answers first
    math_verify.LatexExtractionConfig(boxed_match_priority=0),
    math_verify.ExprExtractionConfig(),
)


def math(prompt: str, response: str, meta: Meta = None, *, column: str = "answer") -> float:
    r"""Reward 1 for a response whose final answer equals the right one as mathematics; else 0.

    "0.5", "\frac{1}{2}" and "\boxed{1/2}" are equal. The final answer is what is boxed, else the last formula
    or number found. Where both answers are plain numbers they are read as by `numeric_match` (math-verify takes ".5"
    behind a minus for nothing, and "2 1/2" for 1). Everything else is scored by math-verify
    (github.com/huggingface/Math-Verify), the right answer first: its comparison is not symmetric.

    Args:
        prompt: Not read.
        response: Holds the answer.
        meta: Holds the right one, in LaTeX or plain.
        column: Under this name.

    Raises:
        ValidationError: The prompt has no such column, or there is no mathematics in it.
    """
    given = lone_number(response)
    return float(any(is_right(gold, given, response, column) for gold in answers_of(meta, column, "math")))


def is_right(right: object, given: Number | None, response: str, column: str) -> bool:
    """Whether a response is right: as one number against another where both are, else by math-verify."""
    what = f"math: the column {as_given(column)} of this prompt"
    number = lone_number(right, whole=True) if isinstance(right, str) else gold_number(right, what)
    if number is not None and given is not None:
        return same(given, number, 1e-6, 1e-9)
    text = str(right) if number is None or number.percent else f"${number.value}$"
    gold = _parsed(text if "$" in text or "\\boxed" in text else f"${text}$") or _parsed(text)
    if not gold:
        raise ValidationError(
            f"math: math-verify finds no mathematics in the column {as_given(column)}: {text[:80]!r}."
        )
    return bool(math_verify.verify(gold, _parsed(response), timeout_seconds=None, raise_on_error=True))


def _parsed(text: str) -> list[object]:
    return list(math_verify.parse(text, list(_EXTRACT), parsing_timeout=None, raise_on_error=True))
