"""Built-in rewards that compare a response with what is known of the answer.

Each reads the answer from a column of the prompts, `meta[column]`, and says which one it misses. A wrong or
unreadable response scores 0; that is a verdict. A missing answer (no such column, None, NaN, an empty text) raises;
that is none. A list of answers means any of them.
"""

import re
import textwrap
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr.rewards.builtin.numerals import final_number, gold_number, numbers_in, same

Meta = Mapping[str, Any] | None


_FENCED = re.compile(r"```[ \t]*([\w+.-]*)[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_SOLVED = re.compile(r"^####[ \t]*(\S.*)\Z", re.MULTILINE)


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
        ValidationError: The prompt has no such column, or there is nothing in it.
    """
    if not meta or column not in meta:
        has = f" It has: {', '.join(map(str, meta))}." if meta else ""
        raise ValidationError(
            f'{reward} needs the column {as_given(column)}: give prompts as {{"prompt": …, "{column}": …}}.{has}'
        )
    value = meta[column]
    if is_missing(value):
        raise ValidationError(
            f"{reward}: the column {as_given(column)} of this prompt is missing ({as_given(value)}): fill it in, or "
            f"leave the prompt out."
        )
    return value


def is_missing(value: Any) -> bool:
    """Whether a value stands for none: None, NaN of whatever library, an empty text or list."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    if isinstance(value, list | tuple | set):
        return not value
    if getattr(value, "shape", ()):  # an array of numpy, as columns of a frame hold them
        return not len(value)
    value = value.item() if hasattr(value, "item") else value  # of numpy or torch
    try:
        return value is None or bool(value != value)
    except TypeError:  # pandas.NA is neither equal to itself nor different
        return True


def answers_of(meta: Meta, column: str, reward: str) -> list[Any]:
    """Return the right answers of a prompt: usually one, or each of a list.

    Raises:
        ValidationError: There is none, or what the column holds is no answer.
    """
    value = column_of(meta, column, reward)
    value = value.tolist() if getattr(value, "shape", ()) else value
    answers = list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
    for answer in answers:
        if is_missing(answer):
            raise ValidationError(
                f"{reward}: a right answer in the column {as_given(column)} of this prompt is missing."
            )
        if isinstance(answer, Mapping | bytes | list | tuple):
            raise ValidationError(
                f"{reward}: the column {as_given(column)} of this prompt holds {str(answer)[:80]!r}, expected a "
                f"text or a number, or a list of those."
            )
    return answers


def fenced(text: str, *languages: str) -> str | None:
    """Return the last fenced block that names one of these languages, or none; one that is not closed goes to the end.

    Args:
        text: With blocks between three backticks.
        languages: Names in lower case.
    """
    blocks = [body for name, body in _FENCED.findall(text) if name.lower() in ("", *languages)]
    return textwrap.dedent(blocks[-1]) if blocks else None


def texts_of(meta: Meta, column: str, reward: str) -> list[str]:
    """Return the right answers as texts; of a whole number that a frame made 12.0, both "12" and "12.0".

    Raises:
        ValidationError: There is none.
    """
    texts: list[str] = []
    for answer in answers_of(meta, column, reward):
        texts.append(str(answer).strip())
        if not isinstance(answer, int) and isinstance(answer, Real) and float(answer).is_integer():
            texts.append(str(int(float(answer))))
    return texts


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
    own = (meta or {}).get("keywords")
    wanted: Any = keywords if is_missing(own) else own
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    words = list(wanted) if isinstance(wanted, Iterable) else [wanted]
    if not words or not all(isinstance(word, str) and word for word in words):
        raise ValidationError(
            f"keyword_contains needs words, not {as_given(words)}: pass keywords=[…], or a column 'keywords'."
            if words
            else "keyword_contains has no keywords: pass keywords=[…], or a column 'keywords'."
        )
    text = response.casefold()
    return positive_reward if any(word.casefold() in text for word in words) else negative_reward


def exact_match(
    prompt: str, response: str, meta: Meta = None, *, column: str = "answer", ignore_case: bool = False
) -> float:
    """Reward 1 for a response that equals the answer, surrounding white space apart; else 0.

    Of an answer that is a solution with its last line "#### 42", as GSM8K has them, a response may equal what stands on
    that line too.

    Args:
        prompt: Not read.
        response: What is compared.
        meta: Holds the answer.
        column: Under this name.
        ignore_case: Whether "Paris" equals "paris".

    Raises:
        ValidationError: The prompt has no such column.
    """
    answers, given = texts_of(meta, column, "exact_match"), response.strip()
    answers += [found[1] for answer in answers if (found := _SOLVED.search(answer))]
    if ignore_case:
        answers, given = [answer.casefold() for answer in answers], given.casefold()
    return float(given in answers)


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
    answers = texts_of(meta, column, "contains")
    if ignore_case:
        answers, response = [answer.casefold() for answer in answers], response.casefold()
    return float(any(answer in response for answer in answers))


def numeric_match(
    prompt: str,
    response: str,
    meta: Meta = None,
    *,
    column: str = "answer",
    which: str = "last",
    rel_tol: float = 1e-6,
    abs_tol: float = 1e-9,
    decimal: str = ".",
) -> float:
    r"""Reward 1 when the number that the response gives as its answer is that of the right answer; else 0.

    That is the number in the last `\boxed{…}`, else in the last <answer>…</answer>, else behind "####", else the
    last one there is, as for GSM8K (Cobbe et al., arXiv 2110.14168). Numbers are read as people write them: ".5",
    "-.75", "1,000", "$1,234.50", "3/4", "2 1/2", "1e3", "3 × 10^4"; "50%" equals 50 and 0.5. Expressions are not
    computed.

    Args:
        prompt: Not read.
        response: Where the number is looked for.
        meta: Holds the answer, a number or a text with one.
        column: Under this name.
        which: "last", or "first" for the first number of the response, whatever is marked.
        rel_tol: Relative tolerance, as in `math.isclose`.
        abs_tol: Absolute tolerance.
        decimal: The decimal sign of texts, "." or ",". With "." a comma parts thousands where three digits follow,
            and a list elsewhere; with "," it is the other way round.

    Raises:
        ValidationError: The prompt has no such column, or what is in it is not one number beyond doubt.
    """
    what = f"numeric_match: the column {as_given(column)} of this prompt"
    golds = [gold_number(gold, what, decimal) for gold in answers_of(meta, column, "numeric_match")]
    first = next(iter(numbers_in(response, decimal)), None)
    given = final_number(response, decimal) if which == "last" else first
    return float(given is not None and any(same(given, gold, rel_tol, abs_tol) for gold in golds))


def check_numeric_match(
    *, which: str = "last", rel_tol: float = 1e-6, abs_tol: float = 1e-9, decimal: str = ".", **_: Any
) -> None:
    """Refuse keywords that cannot work; so do the other functions `check_…`, when a reward is resolved."""
    if which not in ("last", "first"):
        raise ValidationError(f"numeric_match: which={as_given(which)}, expected 'last' or 'first'.")
    if decimal not in (".", ","):
        raise ValidationError(f"numeric_match: decimal={as_given(decimal)}, expected '.' or ','.")
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


def check_regex(*, pattern: str, **_: Any) -> None:
    try:
        re.compile(pattern, re.DOTALL)
    except (re.error, TypeError) as error:
        raise ValidationError(
            f"regex: the pattern {as_given(pattern)} is no regular expression ({error})."
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
    given = response.strip()
    return max(
        1.0 - edit_distance(answer, given) / max(len(answer), len(given))
        for answer in texts_of(meta, column, "levenshtein")
    )


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
    words = unit == "words"  # else characters
    given: Sequence[str] = response.split() if words else response.strip()
    answers = [answer.split() if words else answer for answer in texts_of(meta, column, "lcs_ratio")]
    return max(2 * common_subsequence(answer, given) / (len(answer) + len(given)) for answer in answers)


def check_lcs_ratio(*, unit: str = "words", **_: Any) -> None:
    if unit not in ("words", "characters"):
        raise ValidationError(f"lcs_ratio: unit={as_given(unit)}, expected 'words' or 'characters'.")


def _positions(sequence: Sequence[Hashable]) -> dict[Hashable, int]:
    """Return for each item a number whose bits say where it stands."""
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
        # D0, HP and HN, then VP and VN of Hyyrö (2003): where the table falls and rises from here on.
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
    "numeric_match": Builtin(numeric_match, check_numeric_match),
    "regex": Builtin(regex, check_regex, inline=False),
    "levenshtein": Builtin(levenshtein),
    "lcs_ratio": Builtin(lcs_ratio, check_lcs_ratio),
}
