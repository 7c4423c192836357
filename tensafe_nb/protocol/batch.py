"""A batch of token sequences, checked once, where it enters."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tensafe_nb.display import Facts, as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.codec import tagged

Array: TypeAlias = NDArray[Any]
IGNORE = -100
MOST_VALUES = 1 << 27  # of one entry: 1 GiB of token ids
MOST_ROWS = 1 << 20
NUMBERS = (int, float, bool, np.int64, np.int32, np.float32, np.float64)
MOST_EXACT = 2.0**53  # below, a float holds every whole number
KINDS: Mapping[str, Any] = {
    "texts": str,
    "bytes": bytes,
    "numbers": (int, float, complex, np.number, np.bool_),
}
DEEPEST = 4  # dimensions; a batch has two, an extra seldom three
TICKET = (
    "dp_ticket"  # (B, 7) of a Poisson draw: says which rows belong to it, so that none is lost or repeated
)
REFERENCE = "reference_logprobs"  # (B,) what a reference policy says of each row's labels together
PER_SEQUENCE = ("targets", "example_ids", "unit_ids", "record_id", TICKET, REFERENCE)


@tagged("batch_data")
@dataclass(frozen=True, slots=True, eq=False)
class BatchData:
    """A batch of token sequences, checked once, here.

    `labels[b][t]` is the target for position t: already shifted; the model never shifts again. -100 is ignored.

    Args:
        input_ids: (B, T) token ids.
        attention_mask: (B, T), 1 for tokens and 0 for padding; all 1 when None.
        labels: (B, T); when None, the next token of the same row.
        extras: What a loss needs besides: per token (B, T), or per sequence (B,) or (B, D).
        labels_are_shifted: Take labels that all equal the tokens of their own positions. They are refused otherwise:
            such labels, which other libraries shift themselves, would teach the model to repeat each token.

    Raises:
        ValidationError: Ragged, empty, shapes that do not fit, or labels that have not been shifted.

    Example:
        >>> batch = BatchData(input_ids=[[1, 2, 3, 4]], labels=[[2, 3, 4, -100]])
        >>> batch.shape
        (1, 4)
    """

    MADE_BY: ClassVar = " (tc.batches(rows) makes them of rows)"  # for whoever gave something else

    input_ids: Array
    attention_mask: Array = None  # type: ignore[assignment]  # filled below
    labels: Array = None  # type: ignore[assignment]  # filled below
    extras: Mapping[str, Array] = field(default_factory=dict)
    labels_are_shifted: bool = False

    def __init__(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        extras: Mapping[str, ArrayLike] | None = None,
        labels_are_shifted: bool = False,
        **more_extras: ArrayLike,
    ) -> None:
        extras = {} if extras is None else extras
        if not isinstance(extras, Mapping) or not all(isinstance(name, str) for name in extras):
            raise ValidationError(f"BatchData.extras is a dict of arrays by name, not {as_given(extras)}.")
        entries = {**extras, **more_extras}
        if TICKET in entries and isinstance(input_ids, Sized) and len(input_ids) == 0:  # see `nothing`
            blank = np.zeros((0, 1), np.int64)
            self._set(blank, blank, blank, {TICKET: _whole_numbers(entries[TICKET], TICKET)}, False)
            return
        ids = _whole_numbers(input_ids, "input_ids")
        if ids.ndim != 2 or ids.size == 0:
            raise ValidationError(
                f"BatchData.input_ids has shape {ids.shape}: expected (rows, tokens) with at least one of each."
            )
        mask = (
            np.ones_like(ids) if attention_mask is None else _whole_numbers(attention_mask, "attention_mask")
        )
        _check_same_shape(mask, ids, "attention_mask")
        if not np.isin(mask, (0, 1)).all():
            raise ValidationError("BatchData.attention_mask may hold only 0 (padding) and 1 (token).")
        if not isinstance(labels_are_shifted, bool | np.bool_):
            raise ValidationError(
                f"BatchData.labels_are_shifted is True or False, not {as_given(labels_are_shifted)}."
            )
        targets = next_token_labels(ids, mask) if labels is None else _whole_numbers(labels, "labels")
        _check_same_shape(targets, ids, "labels")
        check_labels(targets, mask, derived=labels is None)
        if not labels_are_shifted:
            check_shift(ids, mask, targets)
        values = {name: extra_of(value, name, len(ids)) for name, value in entries.items()}
        self._set(ids, mask, targets, values, bool(labels_are_shifted))

    @classmethod
    def unchecked(cls, input_ids: Array, attention_mask: Array, labels: Array) -> "BatchData":
        """Return the batch of arrays (B, T) that were just made of what is known to be sound."""
        batch = object.__new__(cls)
        batch._set(input_ids, attention_mask, labels, {}, False)
        return batch

    @classmethod
    def nothing(cls, ticket: Array) -> "BatchData":
        """Return the batch of a Poisson draw that drew nothing: no row, and the draw's ticket (1, 7)."""
        return cls((), extras={TICKET: ticket})

    @classmethod
    def of(cls, batch: "BatchData | Mapping[str, Any]") -> "BatchData":
        """Return a BatchData from one, or from a dict with the same names."""
        if isinstance(batch, BatchData):
            return batch
        if not isinstance(batch, Mapping):
            raise ValidationError(
                f"A batch is a BatchData or a dict with 'input_ids', not a {type(batch).__name__}. Rows become batches "
                f"by tc.batches(rows): for batch in tc.batches(rows): …"
            )
        if "input_ids" not in batch:
            raise ValidationError(
                f"The batch has no 'input_ids'; it has {sorted(map(str, batch))}. "
                f"Rows become batches by tc.batches(rows)."
            )
        return cls(**batch)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens per row, padding included."""
        rows, tokens = self.input_ids.shape
        return rows, tokens

    def __len__(self) -> int:
        return self.shape[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BatchData) and all(
            a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
            for a, b in zip(self._arrays(), other._arrays(), strict=True)
        )

    def _arrays(self) -> Iterator[Array]:
        yield from (self.input_ids, self.attention_mask, self.labels)
        yield from (self.extras[name] for name in sorted(self.extras))

    def _facts(self) -> Facts:
        return {
            "rows": len(self),
            "tokens per row": self.shape[1],
            "tokens": int(self.attention_mask.sum()),
            "labelled": int((self.labels != IGNORE).sum()),
            **self.extras,
        }

    def __repr__(self) -> str:
        labelled = int((self.labels != IGNORE).sum())
        extras = f", extras={sorted(self.extras)}" if self.extras else ""
        return f"BatchData(rows={len(self)}, tokens={int(self.attention_mask.sum())}, labelled={labelled}{extras})"

    def per_token(self, name: str) -> bool:
        """Whether the extra `name` has one value per token, (B, T)."""
        return self.extras[name].shape == self.shape and name not in PER_SEQUENCE

    def labelled_with(self, **extras: ArrayLike) -> "BatchData":
        """Return the batch with further entries."""
        entries = {**self.extras, **extras}
        return BatchData(self.input_ids, self.attention_mask, self.labels, entries, self.labels_are_shifted)

    def rows(self, start: int, stop: int) -> "BatchData":
        """Return rows start:stop without the columns that are padding in all of them."""
        return self.take(slice(start, stop))

    def take(self, rows: "slice | Array") -> "BatchData":
        """Return some rows, in the order given, without the columns that are padding in all of them."""
        used = np.flatnonzero(self.attention_mask[rows].any(axis=0))
        columns = slice(int(used[0]), int(used[-1]) + 1)

        def cut(value: Array, per_token: bool = True) -> Array:
            return value[rows][:, columns] if per_token else value[rows]

        part = object.__new__(BatchData)  # checked already: a part may well have no label at all
        part._set(
            cut(self.input_ids),
            cut(self.attention_mask),
            cut(self.labels),
            {name: cut(value, self.per_token(name)) for name, value in self.extras.items()},
            self.labels_are_shifted,
        )
        return part

    def _set(
        self,
        input_ids: Array,
        attention_mask: Array,
        labels: Array,
        extras: Mapping[str, Array],
        labels_are_shifted: bool,
    ) -> None:
        values = (input_ids, attention_mask, labels, extras, labels_are_shifted)
        for name, value in zip(self.__slots__, values, strict=True):
            object.__setattr__(self, name, value)


def next_token_labels(input_ids: Array, attention_mask: Array) -> Array:
    """Return labels (B, T): the next token where this one and the next are tokens, else -100."""
    labels = np.full_like(input_ids, IGNORE)
    both = (attention_mask[:, :-1] == 1) & (attention_mask[:, 1:] == 1)
    labels[:, :-1] = np.where(both, input_ids[:, 1:], IGNORE)
    return labels


def _whole_numbers(value: ArrayLike, name: str) -> Array:
    array = array_of(value, name, equal_rows=True)
    if array.size and array.dtype.kind not in "iub":
        held = {"U": "texts", "S": "bytes"}.get(array.dtype.kind, array.dtype)
        raise ValidationError(f"BatchData.{name} holds {held}, expected whole numbers.")
    if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValidationError(f"BatchData.{name} holds {array.max()}, which no token id or label can be.")
    return array.astype(np.int64)


def check_size(value: object, name: str, equal_rows: bool) -> None:
    """Refuse what would not end or not fit, before anything of it is read out or allocated."""
    level: Sequence[Any] = (value,)
    for depth in range(DEEPEST + 1):
        arrays = [item.shape for item in level if isinstance(getattr(item, "shape", None), tuple)]
        rows = [item for item in level if isinstance(item, Sequence) and not isinstance(item, str | bytes)]
        count = sum(math.prod(shape) for shape in arrays) + sum(length_of(row, name) for row in rows)
        if count > MOST_VALUES:
            raise ValidationError(f"BatchData.{name} holds {count:,} values, more than {MOST_VALUES:,}.")
        if len(arrays) + len(rows) < len(level) and any(map(_is_odd, level)):
            raise ValidationError(
                f"BatchData.{name}: rows are lists, tuples or arrays, not {as_given(next(filter(_is_odd, level)))}."
            )
        if depth == 1 and equal_rows:
            check_equally_long(level, name)
        items = itertools.chain.from_iterable(row for row in rows if not isinstance(row, range))
        level = list(itertools.islice((item for item in items if type(item) not in NUMBERS), MOST_ROWS + 1))
        if len(level) > MOST_ROWS:
            raise ValidationError(f"BatchData.{name} has more than {MOST_ROWS:,} rows, or what is in them.")
        if not level:
            return
    raise ValidationError(
        f"BatchData.{name} is nested deeper than {DEEPEST} levels: expected rows of numbers."
    )


def _is_odd(item: object) -> bool:
    """Whether numpy would read something out item by item that does not say it is a sequence."""
    known = isinstance(item, Sequence | Mapping) or hasattr(item, "shape") or hasattr(item, "__array__")
    return not known and hasattr(type(item), "__getitem__")


def length_of(row: Sequence[Any], name: str) -> int:
    """Return how long a row says it is; a sequence of the user's own may fail at that."""
    try:
        return len(row)
    except Exception as error:  # more than a machine can count; or a sequence of the user's that fails
        raise ValidationError(f"BatchData.{name}: the length of {as_given(row)} cannot be told.") from error


def check_equally_long(rows: Sequence[Any], name: str) -> None:
    """Refuse ragged rows with the number of the first that differs, where numpy would only say "inhomogeneous"."""
    lengths = [
        len(row) if isinstance(row, Sequence) else (*getattr(row, "shape", ()), None)[0] for row in rows
    ]
    for row, length in enumerate(lengths):
        if length is not None and length != lengths[0]:
            raise ValidationError(
                f"BatchData.{name}: row {row} has {length} entries, row 0 has {lengths[0]}. "
                f"Rows must be equally long: pad them, or let tensafe_nb.data.batches do it."
            )


def _check_same_shape(array: Array, ids: Array, name: str) -> None:
    if array.shape != ids.shape:
        raise ValidationError(
            f"BatchData.{name} has shape {array.shape}, input_ids has {ids.shape}: they must match."
        )


def check_labels(labels: Array, mask: Array, *, derived: bool) -> None:
    """Refuse rows without a token, labels on padding, and a batch without a label; all are (B, T)."""
    if not mask.any(axis=1).all():
        row = int(np.flatnonzero(~mask.any(axis=1))[0])
        raise ValidationError(f"BatchData: row {row} is all padding (attention_mask 0). Leave it out.")
    stray = (labels != IGNORE) & (mask == 0)
    if stray.any():
        row, column = np.argwhere(stray)[0]
        raise ValidationError(
            f"BatchData.labels[{row}][{column}] is {labels[row, column]} where attention_mask is 0: "
            f"padding must have the label {IGNORE}."
        )
    if (labels == IGNORE).all():
        why = "the rows are one token long" if derived else f"every label is {IGNORE}"
        raise ValidationError(f"BatchData has nothing to learn from: {why}. Label at least one position.")


def check_shift(ids: Array, mask: Array, labels: Array) -> None:
    """Refuse labels that are the tokens of their own positions, and not all of the next ones: nobody shifted them."""
    labelled = labels != IGNORE
    if not (labels == ids)[labelled].all():
        return
    following = next_token_labels(ids, mask)
    compared = labelled & (following != IGNORE)
    if (labels == following)[compared].all():  # a text of one token over and over, or nothing follows
        return
    raise ValidationError(
        "BatchData.labels are the tokens of their own positions: the model would learn to repeat each token. Labels "
        "are shifted here: labels[t] is the token that comes after position t. Leave labels out, and the next "
        "tokens are taken; or shift them, labels = [row[1:] + [-100] for row in labels]. If they are meant like this: "
        "labels_are_shifted=True."
    )


def array_of(value: ArrayLike, name: str, *, equal_rows: bool = False) -> Array:
    """Return a copy: the caller may reuse its buffer while the batch waits in the queue."""
    check_size(value, name, equal_rows)
    try:
        array = np.asarray(value).copy()
        merged = array.dtype.kind in "OSTU" or (
            array.dtype.kind == "f"
            and not hasattr(value, "dtype")
            and bool((np.abs(array) >= MOST_EXACT).any())
        )
        entries = np.asarray(value, dtype=object) if merged else array
    except Exception as error:  # a tensor that numpy cannot read; or whatever an object of the user's raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValidationError(f"BatchData.{name} cannot be read as one array of numbers: {reason}") from error
    if merged and array.dtype.kind == "f":
        check_exact(entries, array, name)
    elif merged:
        return of_one_kind(entries, name)
    return array


def of_one_kind(entries: Array, name: str) -> Array:
    """Return objects as an array of texts, of bytes or of numbers; numpy alone would take 1 and "1" for one text.

    Raises:
        ValidationError: Names the first entry that is none, or of another kind than the first.
    """
    listed = entries.ravel().tolist()
    first = next((what for what, kind in KINDS.items() if listed and isinstance(listed[0], kind)), None)
    for number, entry in enumerate(listed):
        if first is None or not isinstance(entry, KINDS[first]):
            wanted = "numbers or texts" if first is None else f"{first}, like the entries before it"
            raise ValidationError(
                f"{place_of(number, entries, name)} is {as_given(entry)}: expected {wanted}."
            )
        if (isinstance(entry, str) and "\0" in entry) or (isinstance(entry, bytes) and b"\0" in entry):
            raise ValidationError(
                f"{place_of(number, entries, name)} is {as_given(entry)}: a text must not hold a NUL."
            )
    array = np.asarray(entries.tolist())
    if array.dtype.kind == "O":
        number = next(n for n, entry in enumerate(listed) if np.asarray(entry).dtype.kind == "O")
        raise ValidationError(
            f"{place_of(number, entries, name)} is {as_given(listed[number])}: no array holds so large a number."
        )
    return array


def check_exact(entries: Array, array: Array, name: str) -> None:
    """Refuse whole numbers that are not what became of them among fractions, where two may be taken for one."""
    for number, (entry, kept) in enumerate(
        zip(entries.ravel().tolist(), array.ravel().tolist(), strict=True)
    ):
        if isinstance(entry, int) and entry != kept:
            raise ValidationError(
                f"{place_of(number, entries, name)} is {as_given(entry)}, which an array that also holds fractions, or "
                f"numbers below 0, would round: give whole numbers of 64 bits, or texts."
            )


def place_of(number: int, entries: Array, name: str) -> str:
    """Return how an entry is called that has this number among all."""
    place = "".join(f"[{index}]" for index in np.unravel_index(number, entries.shape))
    return f"BatchData.{name}{place}"


def extra_of(value: ArrayLike, name: str, rows: int) -> Array:
    """Return an extra as an array (B, …): whatever it holds, its first dimension is the batch's rows."""
    array = array_of(value, name)
    if array.ndim == 0 or len(array) != rows:
        raise ValidationError(
            f"BatchData.{name} has shape {array.shape}: the first dimension must be the {rows} rows of the batch."
        )
    return array
