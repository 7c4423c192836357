"""Texts, completions, chats and pairs → batches: tokenised, prompts masked, padded, shuffled with a seed."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from tensafe_nb.batch import IGNORE, BatchData
from tensafe_nb.data.labels import tokens_of
from tensafe_nb.data.rows import EXPECTED, Row, read_rows, shortened
from tensafe_nb.errors import ValidationError
from tensafe_nb.reprs import Facts, shown

POOL = 50  # batches over which rows of like length are brought together
PREFERENCE = frozenset({"prompt", "chosen", "rejected"})
VIEWS = frozenset({"anchor", "positive"})


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: `labels[t]` is the target for position t, already shifted, -100 where nothing is learnt.

    `target` holds the numbers that the loss `mse` compares it with.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    target: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


def encode(row: Row, tokenizer: Any, *, max_length: int | None = None) -> Example:
    """Tokenise one row.

    Args:
        row: A text, {"text"}, {"prompt", "completion"} (only the completion is learnt), or {"messages"}
            (a chat; only the assistant's turns are learnt). Beside these, {"target"}: numbers for the loss `mse`.
        tokenizer: The model's, for instance `tc.tokenizer`. An end token is appended to texts and completions.
        max_length: Longer sequences are cut at the end.

    Raises:
        ValidationError: A row of another kind, or one of which nothing is left to learn.
    """
    if max_length is not None and max_length < 2:
        raise ValidationError(
            f"max_length={max_length} must be at least 2: one token to read, one to predict."
        )
    tokens, learnt = tokens_of(row, tokenizer)
    tokens, learnt = tokens[:max_length], learnt[:max_length]
    labels = [token if wanted else IGNORE for token, wanted in zip(tokens[1:], learnt[1:], strict=True)] + [
        IGNORE
    ]
    if all(label == IGNORE for label in labels):
        raise ValidationError(
            f"Nothing is left to learn of {shortened(row)}: {len(tokens)} tokens at max_length={max_length}, none of "
            f"them to be predicted. Raise max_length, or leave the row out."
        )
    return Example(tuple(tokens), tuple(labels), _target(row))


def collate(examples: Sequence[Example], pad_token_id: int) -> BatchData:
    """Pad examples on the right to the longest and stack them: (B, T), and their targets as `targets` (B, K).

    Raises:
        ValidationError: Some examples have more numbers in their target than others.
    """
    width = max(map(len, examples))
    ids = np.full((len(examples), width), pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    labels = np.full_like(ids, IGNORE)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = example.input_ids
        mask[row, : len(example)] = 1
        labels[row, : len(example)] = example.labels
    targets = [example.target for example in examples]
    return BatchData(ids, mask, labels, {"targets": targets} if _target_width(examples) else None)


@shown
class Batches:
    """Batches of examples; every pass over it is the next seeded shuffle. Made by `batches`.

    Args:
        examples: What to batch.
        batch_size: Rows per batch, or groups of rows: 8 pairs are 16 rows. The last of a pass may have fewer.
        pad_token_id: Fills up shorter rows.
        group: So many examples, one after the other, stay together in this order: 2 for pairs.
        shuffle: False keeps the order, in every pass.
        bucket: Bring rows of like length together, so that less is padding.
        seed: Of the shuffles.
        with_ids: Each batch says which rows it holds, as `example_ids`: the same number in every pass.

    Raises:
        ValidationError: No batch size, examples that do not make whole groups, or targets of different lengths.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        pad_token_id: int,
        *,
        group: int = 1,
        shuffle: bool = True,
        bucket: bool = True,
        seed: int = 0,
        with_ids: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValidationError(f"batch_size={batch_size} must be at least 1.")
        if group < 1 or len(examples) % group:
            raise ValidationError(f"{len(examples)} examples do not make whole groups of {group}.")
        _target_width(examples)
        self.examples = list(examples)
        self.batch_size = batch_size
        self.group = group
        self.passes = 0
        self._pad_token_id = pad_token_id
        self._shuffle = shuffle
        self._bucket = bucket
        self._seed = seed
        self._with_ids = with_ids

    def __len__(self) -> int:
        return -(-len(self.examples) // (self.batch_size * self.group))

    def __iter__(self) -> Iterator[BatchData]:
        order = self._order(random.Random(f"{self._seed}/{self.passes}"))
        self.passes += 1
        for numbers in order:
            batch = collate([one for number in numbers for one in self._members(number)], self._pad_token_id)
            if self._with_ids:
                batch = batch.labelled_with(example_ids=np.repeat(numbers, self.group))
            yield batch

    def _facts(self) -> Facts:
        tokens = sum(map(len, self.examples))
        return {
            "batches": len(self),
            "batch_size": self.batch_size,
            "examples": len(self.examples),
            "tokens": tokens,
            "longest": max(map(len, self.examples), default=0),
            "shuffled": self._shuffle,
        }

    def __repr__(self) -> str:
        unit = {1: "rows", 2: "pairs"}.get(self.group, f"groups of {self.group}")
        return f"<Batches {len(self)} of {self.batch_size} {unit}, {len(self.examples)} examples>"

    def _order(self, rng: random.Random) -> list[list[int]]:
        """Return the numbers of the groups of each batch; a row by itself is a group of one."""
        numbers = list(range(len(self.examples) // self.group))
        if not self._shuffle:
            return _chunks(numbers, self.batch_size)
        rng.shuffle(numbers)
        if self._bucket:
            pools = _chunks(numbers, self.batch_size * POOL)
            numbers = [number for pool in pools for number in sorted(pool, key=self._longest)]
        ordered = _chunks(numbers, self.batch_size)
        rng.shuffle(ordered)
        return ordered

    def _members(self, number: int) -> list[Example]:
        return self.examples[number * self.group : (number + 1) * self.group]

    def _longest(self, number: int) -> int:
        return max(map(len, self._members(number)))


def batches(
    source: str | Path | Iterable[Row],
    tokenizer: Any,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    shuffle: bool = True,
    bucket: bool = True,
    seed: int = 0,
    with_ids: bool = False,
) -> Batches:
    """Tokenise rows and batch them.

    Args:
        source: As for `read_rows`. All rows as `encode` takes them; or all pairs, {"prompt", "chosen", "rejected"}
            (two completions, for `margin_ranking`) or {"anchor", "positive"} (two texts, for `contrastive`).
        tokenizer: The model's, for instance `tc.tokenizer`.
        batch_size: Rows of the source per batch. A pair is one of them, and makes two rows of the batch: 2i and 2i+1.
        max_length: Longer sequences are cut at the end.
        shuffle: Shuffle anew for every pass.
        bucket: Bring rows of like length together.
        seed: Of the shuffles.
        with_ids: Each batch says which rows it holds, as `example_ids`.

    Raises:
        ValidationError: Rows that cannot be read, or pairs among rows that are none.

    Example:
        >>> train = batches([{"prompt": "2+2=", "completion": "4"}], tc.tokenizer, batch_size=1)
        >>> pairs = batches([{"prompt": "2+2=", "chosen": "4", "rejected": "5"}], tc.tokenizer, batch_size=1)
    """
    examples, group = encode_rows(source, tokenizer, max_length=max_length)
    pad = padding_of(tokenizer)
    return Batches(
        examples,
        batch_size,
        pad,
        group=group,
        shuffle=shuffle,
        bucket=bucket,
        seed=seed,
        with_ids=with_ids,
    )


def encode_rows(
    source: str | Path | Iterable[Row], tokenizer: Any, *, max_length: int | None = None
) -> tuple[list[Example], int]:
    """Tokenise rows; return their examples, and how many examples each row makes: 2 for pairs.

    Raises:
        ValidationError: Rows that cannot be read, or pairs among rows that are none.
    """
    members = [_members(row) for row in read_rows(source)]
    group = len(members[0])
    for number, one in enumerate(members):
        if len(one) != group:
            raise ValidationError(
                f"Row {number} is {'no pair, row 0 is one' if group == 2 else 'a pair, row 0 is none'}: "
                f"batch them separately. {EXPECTED}"
            )
    return [encode(one, tokenizer, max_length=max_length) for pair in members for one in pair], group


def padding_of(tokenizer: Any) -> int:
    """Return the token that fills up shorter rows."""
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id or 0)


def _members(row: Row) -> list[Row]:
    """Take a pair apart into its two rows; any other row is a group of one."""
    if isinstance(row, Mapping) and row.keys() >= PREFERENCE:
        return [{"prompt": row["prompt"], "completion": row[name]} for name in ("chosen", "rejected")]
    if isinstance(row, Mapping) and row.keys() >= VIEWS:
        return [row["anchor"], row["positive"]]
    return [row]


def _target(row: Row) -> tuple[float, ...]:
    if isinstance(row, str) or "target" not in row:
        return ()
    numbers = row["target"] if isinstance(row["target"], Sequence | np.ndarray) else [row["target"]]
    if isinstance(numbers, str) or not all(isinstance(number, Real) for number in numbers):
        raise ValidationError(
            f"The target of {shortened(row)} is no list of numbers. It is what the loss 'mse' compares a row with; "
            f"give anything else another name."
        )
    return tuple(map(float, numbers))


def _target_width(examples: Sequence[Example]) -> int:
    widths = {len(example.target) for example in examples}
    if len(widths) > 1:
        raise ValidationError(
            f"The targets have between {min(widths)} and {max(widths)} numbers: every row needs as many."
        )
    return max(widths, default=0)


def _chunks(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
