"""What was drawn for rows that are decoded together: arrays with a place for each row, as the model's own state has.

What every token needs of every row is done for all of them at once; a row by itself is looked at where it ends, and
after each token only where somebody follows it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Array: TypeAlias = np.ndarray[Any, Any]
NOBODY = -1  # is no token
FACTS = np.dtype(
    [
        ("owner", np.int64),  # the call's number
        ("seed", np.uint64),
        ("first", np.int64),  # tokens it had when it joined
        ("count", np.int64),  # tokens since
        ("written", np.int64),  # of these, that the row knows
        ("limit", np.int64),  # tokens it may have
        ("longest", np.int64),  # with its prompt
        ("entropy", np.float64),  # sum over its tokens
        ("followed", np.bool_),  # after each token
        ("ended", np.bool_),
    ]
)


@dataclass(frozen=True, slots=True)
class Piece:
    """What a row gets to know of the tokens drawn since it last did."""

    tokens: list[int]
    logprobs: list[float]
    raw_logprobs: list[float]


class Drawn:
    """The tokens of R rows, with their logprobs; rows join behind the others, and leave.

    Attributes:
        facts: (R,) of `FACTS`.
    """

    def __init__(self) -> None:
        self.facts = np.zeros(0, FACTS)
        self._tokens = np.zeros((0, 0), np.int64)
        self._logprobs, self._raw_logprobs = (np.zeros((0, 0), np.float32) for _ in range(2))
        self._ends = np.zeros((0, 0), np.int64)  # (R, E) tokens that end a row

    def __len__(self) -> int:
        return len(self.facts)

    def join(self, facts: Array, ends: Sequence[tuple[int, ...]]) -> None:
        """Take in rows, whose tokens to come have these facts, and end with one of some tokens."""
        room = int((facts["limit"] - facts["first"]).max())
        width, numbers = max(map(len, ends)), {tokens: n for n, tokens in enumerate(dict.fromkeys(ends))}
        distinct = [(*tokens, *[NOBODY] * (width - len(tokens))) for tokens in numbers]
        own = np.array(distinct, np.int64).reshape(len(distinct), width)[[numbers[tokens] for tokens in ends]]
        self.facts = np.concatenate([self.facts, facts])
        self._tokens, self._logprobs, self._raw_logprobs = (
            _below(kept, np.zeros((len(facts), room), kept.dtype), 0)
            for kept in (self._tokens, self._logprobs, self._raw_logprobs)
        )
        self._ends = _below(self._ends, own, NOBODY)

    def keep(self, rows: Array) -> None:
        """Go on with some of the rows only."""
        self.facts, self._ends, self._tokens = self.facts[rows], self._ends[rows], self._tokens[rows]
        self._logprobs, self._raw_logprobs = self._logprobs[rows], self._raw_logprobs[rows]

    @property
    def positions(self) -> Array:
        """(R,) how many tokens each row has."""
        return self.facts["first"] + self.facts["count"]  # type: ignore[no-any-return]

    def add(self, drawn: Sequence[Array]) -> tuple[Array, Array]:
        """Append to each row a token, its logprob, its raw logprob and its entropy, (R,) each.

        Returns:
            Which rows end with a token that ends them, and which have as many tokens as they may have; (R,) each.
        """
        tokens, logprobs, raw_logprobs, entropy = drawn
        rows, here = np.arange(len(tokens)), self.facts["count"]
        self._tokens[rows, here] = tokens
        self._logprobs[rows, here] = logprobs
        self._raw_logprobs[rows, here] = raw_logprobs
        self.facts["entropy"] += entropy
        self.facts["count"] += 1
        return (self._ends == tokens[:, None]).any(1), self.positions == self.facts["limit"]

    def last(self) -> Tensor:
        """Return (R,) the token drawn last of each row."""
        return torch.from_numpy(self._tokens[np.arange(len(self)), self.facts["count"] - 1])

    def news(self, rows: Array) -> list[Piece]:
        """Return for each of some rows what it does not know yet."""
        written, count = self.facts["written"][rows], self.facts["count"][rows]
        if not len(rows):
            return []
        low, high = int(written.min()), int(count.max())
        kept = self._tokens, self._logprobs, self._raw_logprobs
        each = zip(*(whole[rows, low:high].tolist() for whole in kept), strict=True)
        self.facts["written"][rows] = count
        edges = zip((written - low).tolist(), (count - low).tolist(), strict=True)
        return [
            Piece(tokens[start:end], logprobs[start:end], raw[start:end])
            for (start, end), (tokens, logprobs, raw) in zip(edges, each, strict=True)
        ]


def _below(above: Array, below: Array, filler: int) -> Array:
    """Return rows (R, W) and others under each other, as wide as the wider ones."""
    width = max(above.shape[1], below.shape[1])
    return np.concatenate(
        [
            part
            if part.shape[1] == width
            else np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=filler)
            for part in (above, below)
        ]
    )
