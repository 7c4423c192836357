"""Rows of chats to labelled tokens, against the tokenizer alone on the same texts, rendered before."""

import itertools
from pathlib import Path
from typing import Any

from bench.harness import ROOT, Row, Target, paired
from bench.real import folder

SHORT, LONG = 20_000, 4_000  # chats of one turn and of five
SECONDS, AT_LEAST = 20, 4


def one_turn() -> Row:
    """Issue 14: at least 0.7 of `tokenizers.encode_batch`, which labels nothing."""
    return _encoding(SHORT, 1)


def five_turns() -> Row:
    return _encoding(LONG, 5)


def _encoding(count: int, turns: int) -> Row:
    from transformers import AutoTokenizer

    from tensafe_nb.data import encode_rows

    tokenizer = AutoTokenizer.from_pretrained(folder())
    chats = _chats(count, turns)
    texts = tokenizer.apply_chat_template([row["messages"] for row in chats], tokenize=False)
    backend = tokenizer.backend_tokenizer

    def peer() -> Any:
        return backend.encode_batch(texts, add_special_tokens=False)

    examples = encode_rows(chats[:50], tokenizer).examples
    for example, encoding in zip(examples, peer()[:50], strict=True):
        assert list(example.input_ids) == encoding.ids, "the two sides make other tokens"
    return Row(
        what="chats read, rendered, tokenised and labelled: `encode_rows`",
        peer="`tokenizers.encode_batch` of the rendered texts",
        sizes=f"{count:,} chats of {turns} turn{'s' * (turns > 1)}, SmolLM2's tokenizer",
        taken=paired(
            lambda: encode_rows(chats, tokenizer), peer, seconds=SECONDS, at_least=AT_LEAST, warmup=1
        ),
        target=Target("≥", 0.7),
    )


def _chats(count: int, turns: int) -> list[dict[str, Any]]:
    """Return chats of words from our own pages: questions of 25 words, answers of 70."""
    words = " ".join(path.read_text() for path in sorted(Path(ROOT / "docs").rglob("*.md"))).split()
    places = itertools.cycle(range(0, len(words) - 70, 13))

    def said(role: str, length: int) -> dict[str, Any]:
        at = next(places)
        return {"role": role, "content": " ".join(words[at : at + length])}

    return [
        {"messages": [said(*one) for _ in range(turns) for one in (("user", 25), ("assistant", 70))]}
        for _ in range(count)
    ]
