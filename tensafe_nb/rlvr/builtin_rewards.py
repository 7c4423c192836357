"""Built-in rewards that compare a response with what is known of the answer.

Each reads the answer from a column of the prompts, `meta[column]`, and says which one it misses. A wrong or
unreadable response scores 0; that is a verdict. A missing answer raises; that is none.
"""

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from tensafe_nb.errors import ValidationError

Meta = Mapping[str, Any] | None


class Builtin(NamedTuple):
    """A built-in reward.

    Attributes:
        function: What scores.
        check: Refuses keywords that cannot work, when they are bound.
        inline: It cannot hang, so it needs no process of its own.
    """

    function: Callable[..., float]
    check: Callable[..., None] | None = None
    inline: bool = True


def column_of(meta: Meta, column: str, reward: str) -> Any:
    """Return what a prompt's column holds.

    Raises:
        ValidationError: The prompt has no such column.
    """
    if not meta or column not in meta:
        has = f" It has: {', '.join(map(str, meta))}." if meta else ""
        raise ValidationError(
            f'{reward} needs the column {column!r}: give prompts as {{"prompt": …, "{column}": …}}.{has}'
        )
    return meta[column]


def keyword_contains(
    prompt: str,
    response: str,
    meta: Meta = None,
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


def exact_match(
    prompt: str, response: str, meta: Meta = None, *, column: str = "answer", ignore_case: bool = False
) -> float:
    """Reward 1 for a response that equals the answer, surrounding white space apart; else 0.

    Args:
        prompt: Not read.
        response: What is compared.
        meta: Holds the answer.
        column: Under this name.
        ignore_case: Whether "Paris" equals "paris".

    Raises:
        ValidationError: The prompt has no such column.
    """
    answer, given = str(column_of(meta, column, "exact_match")).strip(), response.strip()
    return float(given.casefold() == answer.casefold() if ignore_case else given == answer)


def contains(
    prompt: str, response: str, meta: Meta = None, *, column: str = "answer", ignore_case: bool = True
) -> float:
    """Reward 1 for a response in which the answer occurs anywhere; else 0.

    A response that lists every possible answer scores 1 as well: watch for it.

    Args:
        prompt: Not read.
        response: Where the answer is looked for.
        meta: Holds the answer.
        column: Under this name.
        ignore_case: Whether "Paris" is found in "PARIS".

    Raises:
        ValidationError: The prompt has no such column, or it is empty.
    """
    answer = str(column_of(meta, column, "contains")).strip()
    if not answer:
        raise ValidationError(
            f"contains: the column {column!r} of this prompt is empty, which every text contains."
        )
    return float(answer.casefold() in response.casefold() if ignore_case else answer in response)


_NUMBER = re.compile(r"(?:(?<![\w.)])[-+−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?")


def numeric_match(
    prompt: str,
    response: str,
    meta: Meta = None,
    *,
    column: str = "answer",
    which: str = "last",
    rel_tol: float = 1e-6,
    abs_tol: float = 1e-9,
) -> float:
    """Reward 1 when the last (or first) number in the response is the last number of the answer; else 0.

    The last number is the convention of GSM8K (Cobbe et al., arXiv 2110.14168). "1,234.5", "-3" and "2e-3" are
    numbers; "3/4" is two.

    Args:
        prompt: Not read.
        response: Where the number is looked for.
        meta: Holds the answer, a number or a text with one.
        column: Under this name.
        which: "last" or "first".
        rel_tol: Relative tolerance, as in `math.isclose`.
        abs_tol: Absolute tolerance.

    Raises:
        ValidationError: The prompt has no such column, or there is no number in it.
    """
    answer = _NUMBER.findall(str(column_of(meta, column, "numeric_match")))
    if not answer:
        raise ValidationError(f"numeric_match: the column {column!r} of this prompt holds no number.")
    found = _NUMBER.findall(response)
    given = _as_float(found[-1 if which == "last" else 0]) if found else math.nan
    return float(math.isclose(given, _as_float(answer[-1]), rel_tol=rel_tol, abs_tol=abs_tol))


def _as_float(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))


def _check_numeric(*, which: str = "last", rel_tol: float = 1e-6, abs_tol: float = 1e-9, **_: Any) -> None:
    if which not in ("last", "first"):
        raise ValidationError(f"numeric_match: which={which!r}, expected 'last' or 'first'.")
    if not (rel_tol >= 0 and abs_tol >= 0):
        raise ValidationError(f"numeric_match: rel_tol={rel_tol}, abs_tol={abs_tol}: neither can be below 0.")


def regex(
    prompt: str,
    response: str,
    meta: Meta = None,
    *,
    pattern: str,
    full: bool = False,
    ignore_case: bool = False,
) -> float:
    r"""Reward 1 for a response that matches a regular expression; else 0.

    "." matches line ends. A pattern such as "(a+)+b" can take for ever; a run's clock ends that.

    Args:
        prompt: Not read.
        response: What is matched.
        meta: Not read.
        pattern: In Python's syntax.
        full: The whole response must match, not a part of it.
        ignore_case: Whether case is ignored.
    """
    flags = re.DOTALL | (re.IGNORECASE if ignore_case else 0)
    match = re.fullmatch if full else re.search
    return float(match(pattern, response, flags) is not None)


def _check_regex(*, pattern: str, **_: Any) -> None:
    try:
        re.compile(pattern, re.DOTALL)
    except (re.error, TypeError) as error:
        raise ValidationError(
            f"regex: the pattern {pattern!r} is no regular expression ({error})."
        ) from error


def levenshtein(prompt: str, response: str, meta: Meta = None, *, column: str = "answer") -> float:
    """Reward 1 - d/max(|a|, |b|), d the least number of characters to insert, delete or replace.

    Levenshtein (1966); computed with the bit vectors of Hyyrö (2003), so long texts are no trouble.

    Args:
        prompt: Not read.
        response: What is compared, surrounding white space apart.
        meta: Holds the answer.
        column: Under this name.

    Raises:
        ValidationError: The prompt has no such column.
    """
    answer, given = str(column_of(meta, column, "levenshtein")).strip(), response.strip()
    longest = max(len(answer), len(given))
    return 1.0 - edit_distance(answer, given) / longest if longest else 1.0


def lcs_ratio(
    prompt: str, response: str, meta: Meta = None, *, column: str = "answer", unit: str = "words"
) -> float:
    """Reward 2·LCS/(|a|+|b|), LCS the length of the longest common subsequence: the F1 of ROUGE-L.

    Lin (2004); computed with the bit vectors of Crochemore et al. (2001).

    Args:
        prompt: Not read.
        response: What is compared.
        meta: Holds the answer.
        column: Under this name.
        unit: "words" or "characters".

    Raises:
        ValidationError: The prompt has no such column.
    """
    answer = str(column_of(meta, column, "lcs_ratio")).strip()
    a: Sequence[str] = answer.split() if unit == "words" else answer
    b: Sequence[str] = response.split() if unit == "words" else response.strip()
    return 2 * common_subsequence(a, b) / (len(a) + len(b)) if a or b else 1.0


def _check_unit(*, unit: str = "words", **_: Any) -> None:
    if unit not in ("words", "characters"):
        raise ValidationError(f"lcs_ratio: unit={unit!r}, expected 'words' or 'characters'.")


def _positions(sequence: Sequence[Hashable]) -> dict[Hashable, int]:
    masks: dict[Hashable, int] = {}
    for index, item in enumerate(sequence):
        masks[item] = masks.get(item, 0) | 1 << index
    return masks


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Return the Levenshtein distance, one column of the table at a time as bits (Hyyrö 2003, after Myers 1999)."""
    if not a:
        return len(b)
    masks, full, last = _positions(a), (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = full, 0, len(a)  # where the column rises and falls
    for item in b:
        equal = masks.get(item, 0)
        diagonal = ((((equal & up) + up) ^ up) | equal | down) & full
        rises, falls = down | (full & ~(diagonal | up)), diagonal & up
        distance += bool(rises & last) - bool(falls & last)
        rises, falls = (rises << 1 | 1) & full, falls << 1 & full
        up, down = falls | (full & ~(diagonal | rises)), diagonal & rises
    return distance


def common_subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Return the length of the longest common subsequence (Crochemore et al. 2001)."""
    masks, full = _positions(a), (1 << len(a)) - 1
    row = full
    for item in b:
        matched = row & masks.get(item, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(a) - row.bit_count()


BUILTINS = {
    "keyword_contains": Builtin(keyword_contains),
    "exact_match": Builtin(exact_match),
    "contains": Builtin(contains),
    "numeric_match": Builtin(numeric_match, _check_numeric),
    "regex": Builtin(regex, _check_regex, inline=False),
    "levenshtein": Builtin(levenshtein),
    "lcs_ratio": Builtin(lcs_ratio, _check_unit),
}
