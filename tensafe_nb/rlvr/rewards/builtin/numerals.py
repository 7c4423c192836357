r"""The one reader of numbers: what people, data sets and models write, read the same way by every built-in reward.

Read as one number: `7`, `-5`, `−5`, `.5`, `-.75`, `7.` at the end of a sentence, `1,000`, `1_000`, `1{,}000`,
`$1,234.50`, `1e3`, `3 × 10^4`, `2^10`, `3/4`, `\frac{3}{4}`, `½`, `2 1/2`, `50%`. A comma between digits parts
thousands only where three digits follow; every other one parts a list, so "3,14" is 3 and then 14. With
`decimal=","` comma and point change places. Expressions are not computed: that is what the reward "math" is for.

The final answer of a text is what its last `\boxed{…}` holds, else its last <answer>…</answer>, else the number of
its last line "#### 7" (GSM8K), else the last number there is.
"""

import functools
import math
import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from numbers import Rational, Real
from typing import Any, NamedTuple

from tensafe_nb.errors import ValidationError

_VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
MAX_DIGITS = 400  # a longer one is no number anybody meant
_DIGITS = r"(?:(?<![\d])(?:\d{1,3}(?:[,_\u00a0\u202f\u2009]\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.)\]])\.\d+)"
_PLAIN = rf"{_DIGITS}(?:[eE][-+]?\d{{1,9}}(?!\w))?"
_MAX_EXPONENT = 999
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w.)\]}}%])[-+])? (?:\\?[$€£¥][ ]?)? (?P<number>{_PLAIN}) (?P<tail>
        [ ]?[×*x][ ]?10[ ]?(?:\^|\*\*)[ ]?\{{?(?P<ten>[-+]?\d{{1,9}})\}}?(?!\d)
      | (?:[ ]?\^[ ]?\{{?(?P<power>[-+]?\d{{1,9}})\}}?|\*\*(?P<starred>\d{{1,9}})(?!\*))(?!\d)
      | [ ]?/[ ]?(?P<below>{_PLAIN})(?!\d|\.\d|[ ]?/[ ]?\d)
      | [ \t]{{1,2}}(?P<top>\d{{1,9}})[ ]?/[ ]?(?P<bottom>\d{{1,9}})(?![\d/]|\.\d)
    )? (?P<percent>[ ]?\\?%|[ ]percent\b)?
    """,
    re.VERBOSE,
)
_REWRITTEN: tuple[
    tuple[str, re.Pattern[str], str | Callable[[re.Match[str]], str]], ...
] = (  # where a sign occurs
    ("−", re.compile("−"), "-"),
    ("‒–—－", re.compile(r"(?<![\w.)])[‒–—－](?=[\d.$])"), "-"),
    ("{\\", re.compile(r"\{,\}|,\\!|(?<=\d)\\[,!;: ](?=\d{3})"), ","),
    ("\\", re.compile(r"\\[,!;: ]"), " "),
    ("\\", re.compile(r"\\(?:left|right)(?![A-Za-z])"), ""),
    ("\\·∙", re.compile(r"\\(?:times|cdot)(?![A-Za-z])|[·∙]"), "×"),
    ("\\°", re.compile(r"\^\s?\{?\\circ\}?|°"), ""),
    ("\\", re.compile(r"(\\[dtc]?frac)\s?\{\s?-\s?(?=[\d.])"), r"-\1{"),
    ("\\", re.compile(r"\\[dtc]?frac\s?\{\s?([\d.,]{1,40})\s?\}\s?\{\s?([\d.,]{1,40})\s?\}"), r" \1/\2 "),
    ("\\", re.compile(r"\\[dtc]?frac\s?(\d)\s?(\d)(?!\d)"), r" \1/\2 "),
    (
        _VULGAR,
        re.compile(f"[{_VULGAR}]"),
        lambda found: plain_fraction(found[0]),
    ),
    (
        "/",
        re.compile(r"([-+=(])[ ]{1,3}(?=\d{1,9}/)"),
        r"\1",
    ),  # what \frac and ½ have pushed away from its sign
    ("-", re.compile(r"([=(:]\s?)-[ ]{1,2}(?=[\d.$])"), r"\1-"),
    ("_", re.compile(r"(?<=[A-Za-z)}\]])_(?:\{[^{}]{0,40}\}|\w{1,10})"), " "),  # x_1: a name
    ("^", re.compile(r"(?<=[A-Za-z)}\]])\s?\$?\^\s?(?:\{[^{}]{0,40}\}|[-+]?\w{1,10})"), " "),  # cm^2: a unit
)
_EXPRESSION = re.compile(
    r"\\(?:sqrt|[dtc]?frac|[dt]?binom|pi|theta|infty|ln|log|sin|cos|tan|exp|int|sum|prod|pm|cup|cap|begin)(?![A-Za-z])"
)
_EMPHASIS = re.compile(r"(?<![\w)])([*_])([^*_\s]{1,40})\1(?!\w)")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_BOX = re.compile(r"\\f?boxed\s*")
_MARKED = re.compile(r"####([^\n]*)")


def plain_fraction(sign: str) -> str:
    """Return ½ as 1/2."""
    return f" {unicodedata.normalize('NFKD', sign).replace('⁄', '/')} "


class Number(NamedTuple):
    """A number in a text, and where it stands in what was read."""

    value: Fraction
    percent: bool = False
    start: int = 0
    end: int = 0


class _ReadText(NamedTuple):
    """A text as it was _rewritten for reading, and its numbers."""

    text: str
    numbers: list[Number]


def numbers_in(text: str, decimal: str = ".") -> list[Number]:
    """Return the numbers of a text, in their order."""
    return read_text(text, decimal).numbers


def final_number(text: str, decimal: str = ".") -> Number | None:
    """Return the number that a text gives as its final answer; None if that is none, or an expression."""
    answer, marked = final_answer(text, decimal)
    if marked and _EXPRESSION.search(_rewritten(answer)):
        return None
    numbers = numbers_in(answer, decimal)
    return numbers[-1] if numbers else None


def lone_number(text: str, decimal: str = ".", *, whole: bool = False) -> Number | None:
    """Return the final answer of a text if it is one number, not a part of an expression; `whole`: all of the text."""
    answer, marked = final_answer(text, decimal)
    marked = marked or whole
    read = read_text(_EMPHASIS.sub(r" \2 ", answer.replace("**", " ")), decimal)
    if not read.numbers:
        return None
    last = read.numbers[-1]
    before, behind = read.text[: last.start].rstrip(), read.text[last.end :]
    if marked and (_EXPRESSION.search(read.text) or len(read.numbers) > 1):
        return None
    stands = re.match(r"[\s.,;:!?)$*}\]\"'`\\]|$", behind) and not before.endswith(tuple("+-*/^×{\\"))
    return last if stands else None


def final_answer(text: str, decimal: str = ".") -> tuple[str, bool]:
    r"""Return the part of a text that gives its answer, and whether \boxed, <answer> or #### marks it."""
    marked = False
    for find in (boxed, tagged):
        if (found := find(text)) is not None:
            text, marked = found, True
    for line in reversed(_MARKED.findall(text)):
        numbers = read_text(line, decimal)
        if len(numbers.numbers) != 1:
            continue
        (number,) = numbers.numbers
        around = numbers.text[: number.start] + numbers.text[number.end :]
        if not re.search(r"\w", around):
            return line, True
    return text, marked


def gold_number(value: Any, what: str, decimal: str = ".") -> Number:
    """Read the right answer, which must be one number beyond doubt.

    Args:
        value: A number, or a text that gives one as its final answer.
        what: Names reward and column, for messages.
        decimal: The decimal sign of texts.

    Raises:
        ValidationError: It is no number, or could be two.
    """
    if isinstance(value, str):
        return gold_text(value, what, decimal)
    value = value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value
    if not isinstance(value, bool) and isinstance(value, Real | Decimal) and math.isfinite(value):
        exact = isinstance(value, Rational | Decimal)
        return Number(Fraction(value) if exact else Fraction(repr(float(value))))  # type: ignore[arg-type]
    raise ValidationError(f"{what} holds no number: {str(value)[:80]!r}.")


@functools.lru_cache(maxsize=1024)  # each group of rollouts has one
def gold_text(text: str, what: str, decimal: str) -> Number:
    """Read the right answer from a text; see `gold_number`."""
    answer, _ = final_answer(text, decimal)
    read = read_text(answer, decimal)
    if not read.numbers:
        raise ValidationError(f"{what} holds no number: {text[:80]!r}.")
    if _EXPRESSION.search(read.text):
        raise ValidationError(
            f"{what} holds an expression, not a number: {text[:80]!r}. The reward 'math' compares those."
        )
    last = read.numbers[-1]
    if re.search(r"\d[.,]$", read.text[: last.start]):
        raise ValidationError(
            f"{what}: {text[:80]!r} could be read in two ways. Write thousands as 1,000 and decimals as 0.5, or say "
            f'decimal="," where the comma is the decimal sign.'
        )
    if len(read.numbers) > 1 and not re.search(
        r"[^\W\d_]|=", read.text
    ):  # no words that lead to the last of them
        raise ValidationError(
            f"{what} holds several numbers: {text[:80]!r}. A list of answers means any of them."
        )
    return last


def same(a: Number, b: Number, rel_tol: float, abs_tol: float) -> bool:
    """Whether two numbers are equal within a tolerance, as in `math.isclose`.

    A percent sign may be a unit ("50%" asked for in percent is 50) or a factor ("50%" is 0.5): where one of the
    two has it and the other has not, either will do.
    """
    pairs = [(a.value, b.value)]
    if a.percent != b.percent:
        pairs.append((a.value / 100, b.value) if a.percent else (a.value, b.value / 100))
    relative, absolute = Fraction(rel_tol), Fraction(abs_tol)
    return any(abs(x - y) <= max(relative * max(abs(x), abs(y)), absolute) for x, y in pairs)


def boxed(text: str) -> str | None:
    r"""Return what the last \boxed{…} with anything in it holds."""
    for box in reversed(list(_BOX.finditer(text))):
        if inside := in_braces(text, box.end()).strip():
            return inside
    return None


def in_braces(text: str, start: int) -> str:
    """Return what stands in the braces at a place; of braces that are cut off, the rest; of none, the line."""
    if not text.startswith("{", start):
        return text[start:].split("\n", 1)[0]
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start + 1 : place]
    return text[start + 1 :]


def tagged(text: str) -> str | None:
    """Return what the last <answer>…</answer> with anything in it holds."""
    return next((inside for inside in reversed(_TAGGED.findall(text)) if inside.strip()), None)


def _rewritten(text: str) -> str:
    """Return a text with TeX and typographic signs as plain ones; only patterns whose sign occurs are tried."""
    for signs, pattern, by in _REWRITTEN:
        if any(sign in text for sign in signs):
            text = pattern.sub(by, text)
    return text


_SWAPPED = str.maketrans(",.", ".,")


def read_text(text: str, decimal: str) -> _ReadText:
    """Find the numbers of a text, from left to right."""
    text = _rewritten(text)
    if decimal == ",":
        text = text.translate(_SWAPPED)
    numbers: list[Number] = []
    at = 0
    while (found := _NUMBER.search(text, at)) is not None:
        value, at = value_at(text, found)
        if value is not None:
            percent = found["percent"] is not None and at == found.end()
            numbers.append(Number(-value if found["sign"] == "-" else value, percent, found.start(), at))
    return _ReadText(text, numbers)


def value_at(text: str, found: re.Match[str]) -> tuple[Fraction | None, int]:
    """Return the value of a match, None where it has none, and where reading goes on."""
    if found.end() - found.start() > MAX_DIGITS or any(
        abs(int(exponent)) > _MAX_EXPONENT
        for plain in found.group("number", "below")
        for exponent in re.split("[eE]", plain or "")[1:]
    ):
        return None, found.end()
    value, alone = _plain(found["number"]), found.end("number")
    if found["ten"] is not None:
        if abs(int(found["ten"])) > _MAX_EXPONENT:
            return None, found.end()
        return value * Fraction(10) ** int(found["ten"]), found.end()
    power = found["power"] or found["starred"]
    if power is not None:
        if len(found["number"]) * abs(int(power)) > MAX_DIGITS or (not value and int(power) < 0):
            return None, found.end()
        return value ** int(power), found.end()
    if found["below"] is not None:
        if text[found.start() - 1 : found.start()] == "/":  # 1/2/2024: a date
            return value, alone
        below = _plain(found["below"])
        return (value / below if below else None), found.end()
    if found["top"] is not None:
        top, bottom = int(found["top"]), int(found["bottom"])
        if value.denominator != 1 or not 0 < top < bottom:  # two numbers, not a mixed one
            return value, alone
        return value + Fraction(top, bottom), found.end()
    return value, found.end()


def _plain(text: str) -> Fraction:
    return Fraction(re.sub(r"[,_\s]", "", text))
