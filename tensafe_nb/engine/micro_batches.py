"""Micro-batches: a batch in the pieces that cost least, rows of like length together, with little padding."""

import math

import numpy as np

from tensafe_nb.losses.base import Declaration
from tensafe_nb.protocol.batch import Array, BatchData


def divided(
    batch: BatchData, declares: Declaration, most_tokens: int, overhead: int, block: int | None = None
) -> list[Array]:
    """Divide a batch's rows into pieces of at most so many tokens, as its loss allows.

    Where the loss sees each row by itself, rows of like length come together; others stay in their order.

    Args:
        batch: What to divide.
        declares: What the loss says of itself.
        most_tokens: What a piece may hold; see `by_length`.
        overhead: What each piece costs beside its tokens, in tokens.
        block: What each length in a packed piece costs; None where rows cannot be packed.
    """
    if declares.per_row:
        return by_length(batch.attention_mask, most_tokens, overhead, block)
    count, columns = batch.shape
    size = declares.rows_at_a_time(count, fitting=most_tokens // columns)
    return np.split(np.arange(count), range(size, count, size))


def by_length(mask: Array, most_tokens: int, overhead: int, block: int | None = None) -> list[Array]:
    """Divide a batch's rows into pieces with the smallest sum of rows × longest row + overhead.

    Where rows can be packed, a piece costs no more than its tokens and a block for each length among them.

    Padding in front of some rows and behind others cannot be cut off; such a batch is divided as if it had none.

    Args:
        mask: (B, T), 1 where there is a token.
        most_tokens: What a piece may hold, padding included, unless one row alone is longer.
        overhead: What each piece costs beside its tokens, in tokens.
        block: What each length in a packed piece costs; None where rows cannot be packed.

    Returns:
        The row numbers of each piece, ascending; together every row once.
    """
    rows = len(mask)
    lengths = columns_needed(mask)
    order = np.argsort(lengths, kind="stable")
    longest = lengths[order]
    cost, begins = np.zeros(rows + 1), np.zeros(rows + 1, dtype=int)
    tokens = np.concatenate([[0], longest.cumsum()])  # of the shortest rows
    kinds = np.concatenate([[0], (np.diff(longest) > 0).cumsum()])  # of lengths, before each row's
    for end in range(1, rows + 1):  # the cheapest way to divide the `end` shortest rows
        first = max(0, end - max(1, most_tokens // longest[end - 1]))
        begin = np.arange(first, end)
        own = (end - begin) * longest[end - 1]
        if block is not None:
            packed = tokens[end] - tokens[begin] + block * (kinds[end - 1] - kinds[begin] + 1)
            own = np.minimum(own, packed)
        costs = cost[begin] + own + overhead
        best = int(costs.argmin())
        cost[end], begins[end] = costs[best], begin[best]
    pieces, end = [], rows
    while end:
        pieces.append(np.sort(order[begins[end] : end]))
        end = int(begins[end])
    return pieces[::-1]


def overhead_in_tokens(parameters: int, *, accelerator: bool) -> int:
    """Return how many tokens a model trains on in the time that a further piece takes by itself.

    On CPUs, as `scripts.costs` measures it: some 26 for 135 million parameters, which have to be read once more, and
    some 75 for 1.7 million, whose operations have to be called once more. For accelerators it is a guess.
    """
    return 4_096 if accelerator else 25 + math.ceil(80e6 / parameters)


def block_in_tokens(parameters: int) -> int:
    """Return how many tokens a model trains on in the time that a further length in a packed piece takes by itself.

    Its attention is called once more in each layer: on CPUs, about a tenth of the calls of a piece.
    """
    return 2 + math.ceil(8e6 / parameters)


def blocks_of(mask: Array, block: int) -> tuple[Array, list[tuple[int, int]]] | None:
    """Return how to pack rows where that costs less than their padding: their order, and the blocks of like length.

    Args:
        mask: (B, T), 1 where there is a token.
        block: What each length costs, in tokens.

    Returns:
        (B,) row numbers, shortest first, and (how many, how long) of each length among them; or None.
    """
    lengths = mask.sum(1)
    gaps = (mask[:, 1:] > mask[:, :-1]).sum(1) + mask[:, 0] > 1
    kinds, counts = np.unique(lengths, return_counts=True)
    if gaps.any() or lengths.sum() + block * len(kinds) >= mask.size:
        return None
    return np.argsort(lengths, kind="stable"), list(zip(counts.tolist(), kinds.tolist(), strict=True))


def columns_needed(mask: Array) -> Array:
    """Return how many columns each row needs, (B,), beside others of its batch."""
    columns = mask.shape[1]
    first, behind = mask.argmax(1), mask[:, ::-1].argmax(1)
    if first.any() and behind.any():
        return np.full(len(mask), columns)
    return np.asarray(columns - first - behind)
