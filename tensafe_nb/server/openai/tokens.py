"""Tokens as texts and bytes, and what was the probability of each: in the forms of OpenAI's two ways of asking."""

import codecs
import itertools
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from tensafe_nb.protocol.results import TopLogprobs

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LOWEST = -9999.0  # of a token that cannot be drawn: JSON has no -∞
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@cache
def byte_letters() -> dict[str, int]:
    """Return the byte for each letter that byte-level tokenizers write it as (Radford et al. 2019, GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class TokenTexts:
    """Texts of the tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """Return what a token stands for; some are parts of a character."""
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def _read(self, token: int) -> bytes:
        text = str(
            self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        written = str(self._tokenizer.convert_ids_to_tokens(token))
        if UNFINISHED not in text:
            blank = written.startswith("▁") and not text.startswith(" ")  # cut off where a text begins
            return (" " * blank + text).encode()
        if single := _BYTE.fullmatch(written):
            return bytes([int(single[1], 16)])
        letters = byte_letters()
        known = all(letter in letters for letter in written)
        return bytes(letters[letter] for letter in written) if known else text.encode()

    def text_of(self, token: int) -> str:
        """Return the text of a token; one that is no text by itself is written as its bytes."""
        own = self.bytes_of(token)
        try:
            return own.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)

    def text(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens, special ones as they are written."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def for_chat(
        self, tokens: Sequence[int], logprobs: Sequence[float], tops: Sequence[TopLogprobs]
    ) -> list[dict[str, Any]]:
        """Return tokens with their logprobs as a chat's `logprobs.content` has them."""
        likeliest = itertools.chain(tops, itertools.repeat(()))
        return [
            {**self._entry(token, logprob), "top_logprobs": [self._entry(*one) for one in top]}
            for token, logprob, top in zip(tokens, logprobs, likeliest, strict=False)
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        bytes_of = list(self.bytes_of(token))
        return {"token": self.text_of(token), "logprob": max(LOWEST, logprob), "bytes": bytes_of}

    def for_text(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None],
        tops: Sequence[TopLogprobs],
        offset: int,
    ) -> dict[str, Any]:
        """Return tokens with their logprobs as a completion's `logprobs` has them.

        Args:
            tokens: The tokens.
            logprobs: Of each; None where nothing comes before.
            tops: Of each, the most likely of its place; empty where they were not asked for.
            offset: Characters before the first.
        """
        characters = codecs.getincrementaldecoder("utf-8")("ignore")
        sizes = (len(characters.decode(self.bytes_of(token))) for token in tokens)
        offsets = itertools.accumulate(sizes, initial=offset)
        return {
            "tokens": [self.text_of(token) for token in tokens],
            "token_logprobs": [None if one is None else max(LOWEST, one) for one in logprobs],
            "top_logprobs": [self._named(top) for top in tops] if tops else None,
            "text_offset": [place for place, _ in zip(offsets, tokens, strict=False)],
        }

    def _named(self, top: TopLogprobs) -> dict[str, float] | None:
        """Return the most likely tokens by their texts; of two that are written alike, the likelier one."""
        named: dict[str, float] = {}
        for token, logprob in top:
            named.setdefault(self.text_of(token), max(LOWEST, logprob))
        return named or None
