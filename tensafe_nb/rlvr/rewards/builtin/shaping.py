"""Built-in rewards that look at the form of a response: its length, its tags, its repetitions."""

import re
from collections.abc import Sequence
from typing import Any

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr.rewards.builtin.answers import Builtin, Meta

UNITS = ("tokens", "words", "characters")


def overlong(
    prompt: str,
    response: str,
    meta: Meta = None,
    *,
    max_length: int,
    cache: int,
    unit: str = "tokens",
    tokens: Sequence[int] = (),
) -> float:
    """Reward 0 up to `max_length - cache`, from there falling to -1 at `max_length`, and -1 beyond.

    The soft overlong punishment of DAPO (Yu et al., arXiv 2503.14476, eq. 13).

    Args:
        prompt: Not read.
        response: Not read, unless `unit` is "words" or "characters".
        meta: Not read.
        max_length: Where the punishment is whole: usually `max_new_tokens`.
        cache: Over how many units it grows.
        unit: "tokens", "words" or "characters".
        tokens: The response's token ids; a run gives them.

    Raises:
        ValidationError: Tokens are to be counted and were not given.
    """
    # r = 0, −excess / cache or −1, as the length is below L − cache, up to L, or above L = max_length
    excess = _length("overlong", response, tokens, unit) - (max_length - cache)
    return -min(max(excess / cache, 0.0), 1.0) or 0.0  # no negative zero


def check_overlong(*, max_length: int, cache: int, unit: str = "tokens", **_: Any) -> None:
    _check_unit("overlong", unit)
    if not 0 < cache < max_length:
        raise ValidationError(
            f"overlong: max_length={max_length}, cache={cache}: expected 0 < cache < max_length."
        )


def length_penalty(
    prompt: str,
    response: str,
    meta: Meta = None,
    *,
    free: int = 0,
    slope: float = 0.001,
    floor: float = -1.0,
    unit: str = "tokens",
    tokens: Sequence[int] = (),
) -> float:
    """Reward 0 up to `free` units, from there `slope` less for each further one, but never below `floor`.

    Args:
        prompt: Not read.
        response: Not read, unless `unit` is "words" or "characters".
        meta: Not read.
        free: Units that cost nothing.
        slope: What each further unit costs.
        floor: The lowest reward.
        unit: "tokens", "words" or "characters".
        tokens: The response's token ids; a run gives them.

    Raises:
        ValidationError: Tokens are to be counted and were not given.
    """
    excess = max(_length("length_penalty", response, tokens, unit) - free, 0)
    return max(-slope * excess, floor) or 0.0


def check_length_penalty(
    *, free: int = 0, slope: float = 0.001, floor: float = -1.0, unit: str = "tokens", **_: Any
) -> None:
    _check_unit("length_penalty", unit)
    if free < 0 or slope < 0 or floor > 0:
        raise ValidationError(
            f"length_penalty: free={free}, slope={slope}, floor={floor}: expected free ≥ 0, slope ≥ 0, floor ≤ 0."
        )


def _check_unit(reward: str, unit: str) -> None:
    if unit not in UNITS:
        raise ValidationError(f"{reward}: unit={as_given(unit)}, expected one of {', '.join(UNITS)}.")


def _length(reward: str, response: str, tokens: Sequence[int], unit: str) -> int:
    if unit == "tokens" and not tokens and response:
        raise ValidationError(
            f"{reward} counts tokens and this response comes without: call reward(prompt, response, tokens=…), or "
            f"choose unit='words' or 'characters'."
        )
    return {"tokens": len(tokens), "characters": len(response), "words": len(response.split())}[unit]


def format_compliance(
    prompt: str,
    response: str,
    meta: Meta = None,
    *,
    tags: Sequence[str] = ("think", "answer"),
    partial: bool = False,
) -> float:
    """Reward 1 for a response that is `<think>…</think>` and then `<answer>…</answer>`, and nothing else; else 0.

    The format reward of DeepSeek-R1 (arXiv 2501.12948).

    Args:
        prompt: Not read.
        response: What is checked.
        meta: Not read.
        tags: Names of the tags, in their order.
        partial: A response that does not comply scores the share of opening and closing tags that occur just
            once, times 0.5.
    """
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    once = [response.count(mark) == 1 for mark in marks]
    if all(once) and in_order(response, marks):
        return 1.0
    return 0.5 * sum(once) / len(once) if partial else 0.0


def in_order(response: str, marks: Sequence[str]) -> bool:
    """Whether the marks follow each other, with text inside the pairs only."""
    inside, rest = False, response
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found or (before.strip() and not inside):
            return False
        inside = not inside
    return not rest.strip()


def check_format_compliance(*, tags: Sequence[str] = ("think",), **_: Any) -> None:
    if (
        isinstance(tags, str)
        or not tags
        or not all(isinstance(t, str) and re.fullmatch(r"[\w-]+", t) for t in tags)
    ):
        raise ValidationError(
            f"format_compliance: tags={as_given(tags)}, expected names such as ('think', 'answer')."
        )


def repetition(
    prompt: str, response: str, meta: Meta = None, *, ngram: int = 3, max_penalty: float = -1.0
) -> float:
    """Reward `max_penalty` times the share of n-grams of words that are repetitions; 0 for none.

    As in Yeo et al., "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373).

    Args:
        prompt: Not read.
        response: What is counted, case apart.
        meta: Not read.
        ngram: Words in an n-gram.
        max_penalty: For nothing but repetition; 0 or less.
    """
    words = response.lower().split()
    # r = p (1 − distinct / all)
    grams = [tuple(words[start : start + ngram]) for start in range(len(words) - ngram + 1)]
    return (1 - len(set(grams)) / len(grams)) * max_penalty or 0.0 if grams else 0.0


def check_repetition(*, ngram: int = 3, max_penalty: float = -1.0) -> None:
    if ngram < 1 or max_penalty > 0:
        raise ValidationError(
            f"repetition: ngram={ngram}, max_penalty={max_penalty}: expected ngram ≥ 1 and max_penalty ≤ 0."
        )


BUILTINS = {
    "overlong": Builtin(overlong, check_overlong),
    "length_penalty": Builtin(length_penalty, check_length_penalty),
    "format_compliance": Builtin(format_compliance, check_format_compliance),
    "repetition": Builtin(repetition, check_repetition),
}
