"""Preferences: of answers to the same prompt, each that was found good beside each that was found bad."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from tensafe_nb.chats.turns import TurnAnswer, digest_of, prompt_of, read_before

Pair: TypeAlias = tuple[TurnAnswer, TurnAnswer]


def pairs_of(rated: Iterable[tuple[TurnAnswer, bool]]) -> Iterator[Pair]:
    """Yield (good answer, bad answer) to the same prompt; `rated` is (answer, whether a chat template made its prompt).

    The prompt is all that the model read: system, the turns before, the last message. Two columns, and the same turn
    before and after an edit, have it in common only as long as nothing before it differs.
    """
    prompts: dict[bytes, tuple[list[TurnAnswer], list[TurnAnswer]]] = {}
    for answer, templated in rated:
        turn = answer.turn
        key = digest_of(turn.system, templated, turn.digests[answer.column], turn.said, answer.left_out)
        good, bad = prompts.setdefault(key, ([], []))
        (good if answer.good else bad).append(answer)
    for good, bad in prompts.values():
        for one in good:
            yield from ((one, other) for other in bad if one.text != other.text)


def row_of(pair: Pair, templated: bool) -> dict[str, Any]:
    """Return a pair as a row for `dpo`, `ipo` and `margin_ranking`: messages, or texts where there is no template."""
    chosen, rejected = pair
    before = read_before(chosen.turn, chosen.column)[chosen.left_out :]
    prompt = prompt_of(chosen.turn, before, templated)
    if not templated:
        return {"prompt": prompt, "chosen": chosen.text, "rejected": rejected.text}
    answers = ({"role": "assistant", "content": one.text} for one in pair)
    return {"prompt": list(prompt)} | dict(
        zip(("chosen", "rejected"), ([one] for one in answers), strict=True)
    )
