"""Texts, completions, chats and pairs → batches: tokenised, prompts masked, padded, shuffled with a seed."""

import itertools
import logging
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from tensafe_nb.checks import checked
from tensafe_nb.data.labels import encode_many
from tensafe_nb.data.layouts import EXPECTED, Canonical, canonical
from tensafe_nb.data.messages import check_template, unshown
from tensafe_nb.data.rows import (
    OnBadRows,
    Row,
    Rows,
    Source,
    check_on_bad_rows,
    located,
    no_rows,
    open_rows,
    warn_of_unread,
)
from tensafe_nb.data.values import shortened
from tensafe_nb.display import Facts, as_given, shown
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.batch import IGNORE, REFERENCE, BatchData

logger = logging.getLogger(__name__)
POOL = 50  # batches over which rows of like length are brought together
AT_ONCE = 1_024  # rows for one call of the tokeniser
ROWS_FOR_A_BAR = 100  # fewer take no second


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: `labels[t]` is the target for position t, already shifted, -100 where nothing is learnt.

    `target` holds the numbers that the loss `mse` compares it with; `reference` what a reference policy says of its
    labels together, for `dpo` and `ipo`, where that was stored.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    target: tuple[float, ...] = ()
    reference: float | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


@checked
def encode(row: Row, tokenizer: Any, *, max_length: int | None = None, truncate: bool = False) -> Example:
    """Tokenise one row.

    Args:
        row: In any layout of `batches`, but for pairs. Beside it, {"target"}: numbers for the loss `mse`.
        tokenizer: The model's, for instance `tc.tokenizer`. An end token is appended to texts and completions.
        max_length: How many tokens it may have.
        truncate: Cut longer sequences at the end.

    Raises:
        ValidationError: A row of another kind, a longer one, or one of which nothing is left to learn.
    """
    encoded = encode_rows([row], tokenizer, max_length=max_length, truncate=truncate)
    if encoded.group != 1:
        raise ValidationError(
            "encode() makes one sequence of one row, and this is a pair: batches() takes pairs."
        )
    return encoded.examples[0]


@checked
def collate(examples: Sequence[Example], pad_token_id: int) -> BatchData:
    """Pad examples on the right to the longest and stack them: (B, T), and their targets as `targets` (B, K).

    Where all of them know what a reference says, that as `reference_logprobs` (B,).

    Raises:
        ValidationError: Some examples have more numbers in their target than others.
    """
    _check_examples(examples, "collate")
    if not examples:
        raise ValidationError("collate: there are no examples to pad.")
    width = max(map(len, examples))
    ids = np.full((len(examples), width), pad_token_id, dtype=np.int64)  # (B, T)
    mask = np.zeros_like(ids)  # 1 where a token stands, 0 where only padding does
    labels = np.full_like(ids, IGNORE)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = example.input_ids
        mask[row, : len(example)] = 1
        labels[row, : len(example)] = example.labels
    targets = [example.target for example in examples]  # (B, K)
    extras: dict[str, Any] = {"targets": targets} if _target_width(examples) else {}
    if all(example.reference is not None for example in examples):
        extras[REFERENCE] = [example.reference for example in examples]
    return BatchData(ids, mask, labels, extras)


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
        skipped: What was wrong with rows that were left out.
        cut: How many of the examples were cut.

    Raises:
        ValidationError: No batch size, examples that do not make whole groups, or targets of different lengths.
    """

    @checked
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
        skipped: Sequence[str] = (),
        cut: int = 0,
    ) -> None:
        _check_examples(examples, "Batches")
        if batch_size < 1:
            raise ValidationError(f"batch_size={batch_size} must be at least 1.")
        if group < 1 or len(examples) % group:
            raise ValidationError(f"{len(examples)} examples do not make whole groups of {group}.")
        _target_width(examples)
        self.examples = list(examples)
        self.batch_size = batch_size
        self.group = group
        self.skipped = tuple(skipped)
        self.cut = cut
        self.passes = 0
        self._pad_token_id = pad_token_id
        self._shuffle = shuffle
        self._bucket = bucket
        self.seed = seed
        self._with_ids = with_ids

    def __len__(self) -> int:
        return -(-len(self.examples) // (self.batch_size * self.group))  # rounded up

    def __iter__(self) -> Iterator[BatchData]:
        order = self._order(random.Random(f"{self.seed}/{self.passes}"))
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
            **({"cut": self.cut} if self.cut else {}),
            **({"rows left out": len(self.skipped), "the first": self.skipped[0]} if self.skipped else {}),
        }

    def __repr__(self) -> str:
        unit = {1: "rows", 2: "pairs"}.get(self.group, f"groups of {self.group}")
        left_out = f", {len(self.skipped)} rows left out" if self.skipped else ""
        cut = f", {self.cut} cut" if self.cut else ""
        return (
            f"<Batches {len(self)} of {self.batch_size} {unit}, {len(self.examples)} examples{cut}{left_out}>"
        )

    def _order(self, rng: random.Random) -> list[list[int]]:
        """Return the numbers of the groups of each batch; a row by itself is a group of one."""
        numbers = list(range(len(self.examples) // self.group))
        if not self._shuffle:
            return _chunks(numbers, self.batch_size)
        rng.shuffle(numbers)
        if self._bucket:
            lengths = [max(map(len, self._members(number))) for number in range(len(numbers))]
            # sorted only within pools of 50 batches: like lengths meet, and which rows do changes with every pass
            pools = _chunks(numbers, self.batch_size * POOL)
            numbers = [number for pool in pools for number in sorted(pool, key=lengths.__getitem__)]
        ordered = _chunks(numbers, self.batch_size)
        rng.shuffle(ordered)
        return ordered

    def _members(self, number: int) -> list[Example]:
        return self.examples[number * self.group : (number + 1) * self.group]


@checked
def batches(
    source: Rows,
    tokenizer: Any,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    truncate: bool = False,
    on_bad_rows: OnBadRows = "raise",
    context: int | None = None,
    shuffle: bool = True,
    bucket: bool = True,
    seed: int = 0,
    with_ids: bool = False,
) -> Batches:
    """Tokenise rows and batch them.

    Args:
        source: The path of a .jsonl, .json, .csv, .tsv or .parquet file, a frame of pandas or polars, a table of
            pyarrow, a data set of Hugging Face, or any iterable. Each row is a text, {"text"}, {"prompt",
            "completion"} (only the completion is learnt) or {"messages"} (a chat; only the assistant's turns are
            learnt), or as ShareGPT, Alpaca and TRL lay them out. Or all are pairs: {"prompt", "chosen", "rejected"}
            (two completions, for `margin_ranking`) or {"anchor", "positive"} (two texts, for `contrastive`).
        tokenizer: The model's, for instance `tc.tokenizer`.
        batch_size: Rows of the source per batch. A pair is one of them, and makes two rows of the batch: 2i and 2i+1.
        max_length: How many tokens a row may have. A longer one is refused by its number.
        truncate: Cut longer rows at the end instead; how many were is counted and shown.
        on_bad_rows: "raise" refuses the first row that cannot be used; "skip" leaves such rows out, counts and
            shows them.
        context: How many tokens the model reads at most; `tc.batches` knows it.
        shuffle: Shuffle anew for every pass.
        bucket: Bring rows of like length together.
        seed: Of the shuffles.
        with_ids: Each batch says which rows it holds, as `example_ids`.

    Raises:
        ValidationError: A row that cannot be used, with its number and its line in a file; or pairs among rows that
            are none.

    Example:
        >>> train = batches([{"prompt": "2+2=", "completion": "4"}], tc.tokenizer, batch_size=1)
        >>> pairs = batches([{"prompt": "2+2=", "chosen": "4", "rejected": "5"}], tc.tokenizer, batch_size=1)
    """
    encoded = encode_rows(
        source,
        tokenizer,
        max_length=max_length,
        truncate=truncate,
        on_bad_rows=on_bad_rows,
        context=context,
    )
    return Batches(
        encoded.examples,
        batch_size,
        padding_of(tokenizer),
        group=encoded.group,
        shuffle=shuffle,
        bucket=bucket,
        seed=seed,
        with_ids=with_ids,
        skipped=encoded.skipped,
        cut=encoded.cut,
    )


@dataclass(slots=True)
class Encoded:
    """Tokenised rows, and what became of the others.

    Attributes:
        examples: Of the rows that were kept, in their order; `group` for each.
        group: How many examples a row makes: 2 for pairs.
        numbers: Of the rows that were kept.
        skipped: What was wrong with the rows that were left out, each with its place.
        cut: How many examples were longer than they may be, and cut.
        rows: How many there were in all.
    """

    examples: list[Example] = field(default_factory=list)
    group: int = 1
    numbers: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    cut: int = 0
    rows: int = 0

    def kept(self, column: Sequence[Any], name: str) -> list[Any]:
        """Return the values of a column of all rows for those that were kept.

        Raises:
            ValidationError: It has not one for each row.
        """
        if len(column) != self.rows:
            raise ValidationError(f"{name} names {len(column)} rows, there are {self.rows}.")
        return [column[number] for number in self.numbers]


@checked
def encode_rows(
    source: Rows,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    truncate: bool = False,
    on_bad_rows: OnBadRows = "raise",
    context: int | None = None,
) -> Encoded:
    """Tokenise rows, as they are read; see `batches`.

    Raises:
        ValidationError: Rows that cannot be read, or pairs among rows that are none.
    """
    check_on_bad_rows(on_bad_rows)
    limit = LengthLimit(max_length, context, truncate)
    encoder = RowEncoder(open_rows(source), tokenizer, limit, skip=on_bad_rows == "skip")
    encoder.read()
    return encoder.encoded


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """How long a row may be."""

    max_length: int | None
    context: int | None
    truncate: bool

    def __post_init__(self) -> None:
        most = self.max_length
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 2):
            raise ValidationError(
                f"max_length={as_given(most)} must be a whole number of at least 2: one token to read, one to predict."
            )

    @property
    def tokens(self) -> int | None:
        """The smaller of both."""
        return min((most for most in (self.max_length, self.context) if most is not None), default=None)

    def refusal(self, length: int) -> ValidationError:
        past = (
            f"more than the {self.context} that the model reads at most (its context)"
            if self.tokens == self.context
            else f"more than max_length={self.max_length}"
        )
        return ValidationError(
            f"it has {length} tokens, {past}. Cut such rows at the end (truncate=True), leave them out "
            f"(on_bad_rows='skip'), or split them."
        )


class RowEncoder:
    """Reads rows, a thousand at a time for the tokeniser, and puts the bad ones in their place."""

    def __init__(self, rows: Source, tokenizer: Any, limit: LengthLimit, *, skip: bool) -> None:
        self.encoded = Encoded()
        self._rows, self._tokenizer, self._limit, self._skip = rows, tokenizer, limit, skip
        self._template = getattr(tokenizer, "chat_template", None)
        self._waiting: list[tuple[int, int | None, list[dict[str, Any]]]] = []
        self._first: int | None = None  # the row that says whether all are pairs
        self._unread: Counter[str] = Counter()

    def read(self) -> None:
        """Read all rows, and say what was left out of them and in them."""
        encoded = self.encoded
        for number, (line, row) in enumerate(with_progress(self._rows)):
            encoded.rows = number + 1
            self.accept(number, line, row)
            if (
                len(self._waiting) >= AT_ONCE
            ):  # counted in rows, so that a source without an end takes no memory
                self._tokenise()
        self._tokenise()
        if not encoded.rows:
            raise no_rows(self._rows)
        if not encoded.examples:
            raise ValidationError(f"None of the {encoded.rows} rows can be used. {encoded.skipped[0]}")
        _target_width(encoded.examples)
        self.report()

    def report(self) -> None:
        """Say which columns nobody read, which rows were left out, and how many sequences were cut."""
        encoded = self.encoded
        warn_of_unread(self._unread, encoded.rows)
        if encoded.skipped:
            logger.warning(
                "%d of %d rows were left out%s: %s", len(encoded.skipped), encoded.rows,
                ", the first" if len(encoded.skipped) > 1 else "", encoded.skipped[0],
            )  # fmt: skip
        if encoded.cut:
            logger.warning(
                "%d of %d sequences were cut at %d tokens: what stood behind is not learnt",
                encoded.cut, len(encoded.examples), self._limit.tokens,
            )  # fmt: skip

    def accept(self, number: int, line: int | None, row: Any) -> None:
        """Bring a row into its one form, and put it on the pile for the tokeniser."""
        try:
            if isinstance(row, ValidationError):
                raise row
            found = canonical_row(row, chats=self._template is not None)
            for member in found.members:
                check_template(self._template, member.get("messages", ()), member.get("tools"))
        except ValidationError as error:
            self._leave_out(error, number, line)
            return
        if self._first is None:
            self._first, self.encoded.group = number, len(found.members)
        elif len(found.members) != self.encoded.group:  # a fault of the data, not of a row: never skipped
            raise ValidationError(
                f"Row {number} is {'no pair' if self.encoded.group == 2 else 'a pair'}, row {self._first} is "
                f"{'one' if self.encoded.group == 2 else 'none'}: batch them separately. {EXPECTED}"
            )
        self._unread.update(found.unread)
        if self._template is not None:
            self._unread.update(set().union(*(unshown(self._template, member) for member in found.members)))
        self._waiting.append((number, line, found.members))

    def _tokenise(self) -> None:
        """Tokenise the pile in one call."""
        waiting, self._waiting = self._waiting, []
        members = [member for _, _, group in waiting for member in group]
        tokenised = iter(encode_many(members, self._tokenizer))  # in the order of the members
        for number, line, group in waiting:
            found = list(itertools.islice(tokenised, len(group)))
            cut = self.encoded.cut
            try:
                examples = [self.example_of(*both) for both in zip(group, found, strict=True)]
            except ValidationError as error:
                self.encoded.cut = (
                    cut  # a pair is left out whole: what was cut of its first half counts no more
                )
                self._leave_out(error, number, line)
            else:
                self.encoded.examples += examples
                self.encoded.numbers.append(number)

    def example_of(
        self, member: dict[str, Any], found: tuple[list[int], list[bool]] | ValidationError
    ) -> Example:
        """Make an example of a row's tokens: cut, or refused, where there are too many, and its labels shifted."""
        if isinstance(found, ValidationError):
            raise found
        tokens, learnt = found
        most = self._limit.tokens
        if most is not None and len(tokens) > most:
            if not self._limit.truncate:
                raise self._limit.refusal(len(tokens))
            if "reference" in member:
                raise ValidationError(
                    f"it has {len(tokens)} tokens and is cut at {most}, and its stored log-probability of a reference "
                    f"is that of the whole: leave those columns out, and the reference is computed."
                )
            tokens, learnt = tokens[:most], learnt[:most]
            self.encoded.cut += 1
        if not any(learnt[1:]):  # the first token is predicted by nothing
            raise ValidationError(
                f"Nothing is left to learn of {shortened(member)}: {len(tokens)} tokens"
                f"{f' at max_length={most}' if len(tokens) == most else ''}, none to be predicted. Leave it out."
            )
        # labels[t] is the token that position t predicts, the next one
        labels = [token if wanted else IGNORE for token, wanted in zip(tokens, learnt, strict=True)]
        return Example(tuple(tokens), (*labels[1:], IGNORE), target_of(member), member.get("reference"))

    def _leave_out(self, error: ValidationError, number: int, line: int | None) -> None:
        placed = located(error, self._rows, number, line)
        if not self._skip:
            raise placed from error
        self.encoded.skipped.append(str(placed))


def canonical_row(row: Any, *, chats: bool) -> Canonical:
    """Read a row; whatever is wrong with it is a `ValidationError`."""
    try:
        return canonical(row, chats=chats)
    except ValidationError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ValidationError(f"it cannot be read ({type(error).__name__}: {error}).") from error


def with_progress(rows: Source) -> Iterable[tuple[int | None, Any]]:
    """Iterate over rows; after a second, a bar shows how far. Few rows get none: a notebook's is made of widgets."""
    if rows.size is not None and rows.size < ROWS_FOR_A_BAR:
        return rows.each
    from tqdm.auto import tqdm

    bar: Iterable[tuple[int | None, Any]] = tqdm(
        rows.each, desc="tokenising", total=rows.size, unit=" rows", delay=1.0, leave=False, disable=None
    )
    return bar


def check_fit(examples: Sequence[Example], context: int | None) -> None:
    """Refuse examples that are longer than the model's context.

    Raises:
        ValidationError: Says which is the first.
    """
    for number, example in enumerate(examples):
        if context is not None and len(example) > context:
            raise ValidationError(
                f"Example {number} has {len(example)} tokens, more than the {context} that the model reads at most "
                f"(its context). tc.batches finds such rows; data.batches does with context={context}."
            )


def padding_of(tokenizer: Any) -> int:
    """Return the token that fills up shorter rows."""
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id or 0)


def target_of(row: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the numbers that the loss `mse` compares a row with; none where it has no "target"."""
    if "target" not in row:
        return ()
    numbers = row["target"] if isinstance(row["target"], Sequence | np.ndarray) else [row["target"]]
    if isinstance(numbers, str) or not all(
        isinstance(number, Real) and math.isfinite(number) for number in numbers
    ):
        raise ValidationError(
            f"its target {shortened(row['target'])} is no list of numbers. It is what the loss 'mse' compares a row "
            f"with; give anything else another name."
        )
    return tuple(map(float, numbers))


def _check_examples(examples: Sequence[Example], who: str) -> None:
    if not isinstance(examples, list | tuple) or not all(isinstance(one, Example) for one in examples):
        raise ValidationError(
            f"{who}: examples are a list of what encode() returns, not {as_given(examples)}."
        )


def _target_width(examples: Sequence[Example]) -> int:
    if len({example.reference is None for example in examples}) > 1:
        raise ValidationError(
            "Some pairs have stored log-probabilities of a reference and some have none: all pairs need them, or none."
        )
    widths = {len(example.target) for example in examples}
    if len(widths) > 1:
        raise ValidationError(
            f"The targets have between {min(widths)} and {max(widths)} numbers: every row needs as many."
        )
    return max(widths, default=0)


def _chunks(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
