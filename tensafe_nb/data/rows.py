"""Sources of rows: files, tables, lists and streams → one row after the other, each with its number and line."""

import contextlib
import hashlib
import io
import json
import os
import sys
import warnings
from collections.abc import AsyncIterable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

from tensafe_nb.checks import checked
from tensafe_nb.data.columns import PromptColumns, column_of
from tensafe_nb.data.files import OPENERS, Numbered, is_file, read_file, without_none
from tensafe_nb.data.layouts import COLUMNS
from tensafe_nb.data.messages import is_chat
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.batch import BatchData

T = TypeVar("T")
Row: TypeAlias = str | Mapping[str, Any]
Rows: TypeAlias = Any  # a path, or any table or iterable of rows: read by `open_rows`
OnBadRows: TypeAlias = Literal["raise", "skip"]
MOST_ROWS = 10_000_000  # of one source
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", *OPENERS)
TABLES = ("pandas", "polars", "pyarrow", "datasets")  # libraries of tables; none is imported here
PACKAGE = str(Path(__file__).parents[1])


@dataclass(frozen=True, slots=True)
class Source:
    """Rows as they stand in what was given.

    Attributes:
        each: Each row's line in its file, or None; and the row, or the `ValidationError` that says what is wrong.
        name: Of the file.
        size: How many there are, where that is known.
        what: What they are called in an error.
    """

    each: Numbered
    name: str | None = None
    size: int | None = None
    what: str = "rows"

    def place(self, number: int, line: int | None) -> str:
        """Return where a row stands, for an error: rows are counted from 0, lines from 1."""
        row = f"Row {number}" if self.what == "rows" else f"{self.what}: row {number}"
        return row if line is None else f"{row} ({self.name}, line {line})"


@checked
def read_rows(
    source: Rows,
    *,
    prompt: str | None = None,
    answer: str | None = None,
    answer_after: str | None = None,
    template: str | None = None,
) -> list[Row]:
    """Read the rows of a file, a table, a list, any iterable, or a Hugging Face data set, as they stand there.

    With one of the keywords, as prompts with their answers.

    Args:
        source: What they are read from; see `batches`.
        prompt: The column that is asked.
        answer: The column that holds the right answer; it becomes the column "answer".
        answer_after: Of a solution that ends in its answer, what stands before that: "####" for GSM8K.
        template: A text with names of columns in braces, which becomes the prompt.

    Raises:
        ValidationError: No such file, a line that is not JSON, what is no list of rows, or no row at all; or no column
            of a name.

    Example:
        >>> rows = read_rows("gsm8k.jsonl", prompt="question", answer="answer", answer_after="####")
    """
    columns = PromptColumns(prompt, answer, answer_after, template)
    rows = open_rows(source)
    read = []
    for number, (line, row) in enumerate(rows.each):
        try:
            if isinstance(row, ValidationError):
                raise row
            read.append(columns.of(row))
        except ValidationError as error:
            raise located(error, rows, number, line) from error
    if not read:
        raise no_rows(rows)
    return read


def open_rows(source: Rows, what: str = "rows") -> Source:
    """Return the rows of a source, unread as far as it is a stream.

    Args:
        source: The path of a file (see `files.read_file`), a frame of pandas or polars, a table of pyarrow, a data set
            of Hugging Face, or any iterable of rows. Errors of an iterator of yours come through as they are.
        what: What they are called in an error.

    Raises:
        ValidationError: Something else; says the line that makes rows of it.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        try:
            return Source(read_file(path), path.name, what=what)
        except ValidationError as error:
            if what == "rows":
                raise
            raise ValidationError(f"{what}: {error}") from error
    if isinstance(source, Mapping):
        raise refused_mapping(source, what)
    each = table_rows(source, what)
    if each is None:
        refuse_no_rows(source, what)
        each = ((None, row) for row in bounded_rows(source, what))
    size = None
    with contextlib.suppress(
        TypeError, NotImplementedError
    ):  # streams of Hugging Face have a len() that raises
        size = len(source)
    return Source(each, size=size, what=what)


def bounded_rows(source: Iterable[Any], what: str) -> Iterator[Any]:
    """Yield what an iterable yields, and refuse it where no memory would hold it all."""
    for number, row in enumerate(source):
        if number == MOST_ROWS:
            raise ValidationError(
                f"{what}: more than {MOST_ROWS:,} rows. If they have an end, give them in parts."
            )
        yield row


def located(error: ValidationError, rows: Source, number: int, line: int | None) -> ValidationError:
    """Return an error of a row with its place in front."""
    return ValidationError(
        f"{rows.place(number, line)}: {error}",
        details={"row": number, **({} if line is None else {"line": line})},
    )


def no_rows(rows: Source) -> ValidationError:
    """Return the error of a source that holds nothing."""
    return ValidationError(f"There are no rows in {rows.name or 'the data'}.")


def check_on_bad_rows(on_bad_rows: str) -> None:
    """Refuse what is neither "raise" nor "skip"."""
    if on_bad_rows not in ("raise", "skip"):
        raise ValidationError(f"on_bad_rows={as_given(on_bad_rows)} must be 'raise' or 'skip'.")


def warn_of_unread(counts: Mapping[str, int], rows: int) -> None:
    """Name, once, the columns that nobody reads."""
    if counts:
        names = ", ".join(repr(name) for name in sorted(counts))
        most = max(counts.values())
        level, frame = 1, sys._getframe(0)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
            level, frame = level + 1, frame.f_back
        warnings.warn(
            f"Nobody reads {'the column' if len(counts) == 1 else 'the columns'} {names} "
            f"(in {most} of {rows} rows): training does not see what is in them.",
            stacklevel=level,  # the first line outside this package: the one that the warning is about
        )


# tables


def refuse_table(source: Any, message: str) -> None:
    """Refuse a frame, a table or a data set where something else is expected."""
    library = type(source).__module__.partition(".")[0]
    if library in TABLES and type(source).__name__ not in ("Series", "Column"):
        raise ValidationError(message)


def table_rows(source: Any, what: str) -> Numbered | None:
    """Return the rows of a table of pandas, polars, pyarrow or datasets; None if it is none of these.

    None of them is imported: what was given has been made by it.
    """
    library = type(source).__module__.partition(".")[0]
    kind = type(source).__name__
    if library == "pandas" and kind == "DataFrame":
        if hidden := [name for name in source.index.names if name in COLUMNS]:
            raise ValidationError(f"{what}: {hidden} are in the frame's index. Give frame.reset_index().")
        names = _column_names(list(source.columns), what)
        rows = source.itertuples(index=False, name=None)
        return ((None, without_none(dict(zip(names, cells, strict=True)))) for cells in rows)
    if library == "polars" and kind == "DataFrame":
        return ((None, without_none(row)) for row in source.iter_rows(named=True))
    if library == "polars" and kind == "LazyFrame":
        raise ValidationError(f"{what}: this frame is not computed yet. Give frame.collect().")
    if library == "pyarrow" and hasattr(source, "schema"):  # a table, a batch, a reader, a data set
        _column_names(source.schema.names, what)
        batches = source.to_batches() if hasattr(source, "to_batches") else source
        return (
            (None, without_none(row))
            for batch in ([source] if kind == "RecordBatch" else batches)
            for row in batch.to_pylist()
        )
    if library == "pyarrow":
        raise ValidationError(
            f"{what}: of pyarrow, a Table is read. Give column.to_pylist() of a single column."
        )
    if library == "datasets":
        if (getattr(source, "format", None) or {}).get("type") in ("pandas", "polars", "arrow"):
            source = source.with_format(None)  # each row would be a table of its own
        return ((None, without_none(row)) for row in source)
    return None


def _column_names(names: Sequence[Any], what: str) -> list[str]:
    for name in names:
        if not isinstance(name, str):
            raise ValidationError(
                f"{what}: the frame's columns are called {names[:5]}. Name them: "
                f"frame.columns = ['prompt', 'completion']."
            )
    if len(set(names)) < len(names):
        raise ValidationError(f"{what}: the frame has two columns of one name: {sorted(names)}.")
    return list(names)


# what is no list of rows


def refuse_no_rows(source: Any, what: str) -> None:
    """Refuse what can be iterated, or looks as if, and whose items are no rows."""
    name = type(source).__name__
    if isinstance(source, BatchData) or name in ("Batches", "PoissonDraws"):
        raise ValidationError(
            f"{what}: a {name} holds batches already: give it to fit() or forward_backward()."
        )
    if isinstance(source, range):
        raise ValidationError(f"{what}: {as_given(source)} holds numbers. Rows are texts or dicts.")
    if isinstance(source, bytes | bytearray):
        raise ValidationError(f"{what}: these are bytes. A text goes in a list: [data.decode()].")
    if isinstance(source, io.IOBase):
        file = getattr(source, "name", "rows.jsonl")
        raise ValidationError(f"{what}: this is an open file. Give its path instead: {as_given(file)}.")
    if isinstance(source, set | frozenset):
        raise ValidationError(f"{what}: a set has no order, so that no seed repeats it. Give sorted(rows).")
    if isinstance(source, AsyncIterable):
        raise ValidationError(f"{what}: this is asynchronous. Give [row async for row in rows].")
    if isinstance(source, np.ndarray) and (
        source.ndim != 1 or source.dtype.kind not in "OUV" or source.dtype.names
    ):
        raise ValidationError(
            f"{what}: an array of shape {source.shape} and type {source.dtype} holds no rows. Give a list of texts or "
            f"dicts{', or pandas.DataFrame(array)' if source.dtype.names else ''}."
        )
    first = source[0] if isinstance(source, list | tuple) and source else None
    if isinstance(first, str) and first.lower().endswith(SUFFIXES) and is_file(Path(first)):
        raise ValidationError(
            f"{what}: {first!r} is the name of a file, not a text. Of files, give "
            f"[row for path in paths for row in tensafe_nb.data.read_rows(path)]."
        )
    library = type(source).__module__.partition(".")[0]
    if library == "torch" and name == "DataLoader":
        raise ValidationError(f"{what}: a DataLoader makes batches. Give its rows: loader.dataset.")
    if not isinstance(source, Iterable):
        if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
            raise ValidationError(
                f"{what}: a {name} is not iterable. Give [data[i] for i in range(len(data))]."
            )
        raise ValidationError(
            f"{what}: what is of type {name} is no list of rows. A single row goes in a list: [row]."
        )
    if is_chat(source) and all(isinstance(message.get("role"), str) for message in source):
        chat = "{'messages': messages}" if what == "rows" else "messages"
        raise ValidationError(f"{what}: this is one chat. Give a list of chats: [{chat}].")


def refused_mapping(source: Mapping[Any, Any], what: str) -> ValidationError:
    """Tell splits from columns from a row."""
    names = list(source)
    if names and all(is_split(value) for value in source.values()):
        split = "train" if "train" in source else names[0]
        return ValidationError(
            f"{what}: this holds the splits {names}. Give one of them: data[{as_given(split)}]."
        )
    known = {*COLUMNS, "role", "content"}.intersection(names)
    columns = [value for name, value in source.items() if not known or name in known]
    if columns and all(isinstance(value, Mapping) for value in source.values()):
        line = 'frame.to_dict("records")' if known else "list(rows.values())"
        return ValidationError(f"{what}: this is a dict of dicts. Give {line}.")
    if columns and all(is_column(value) for value in columns):
        return ValidationError(
            f"{what}: this is a dict of columns. Give its rows: "
            f"[dict(zip(columns, cells)) for cells in zip(*columns.values())]."
        )
    return ValidationError(
        "One row was given where rows are expected: put it in a list, [row]."
        if what == "rows"
        else f"{what}: one row was given where a list of them is expected: put it in a list, [row]."
    )


def is_split(value: Any) -> bool:
    """Whether a value is a split: rows, not the messages of a chat."""
    if type(value).__module__.partition(".")[0] in TABLES:
        return type(value).__name__ not in ("Series", "Column")
    return is_chat(value) and not any({"role", "from"} & message.keys() for message in value)


def is_column(value: Any) -> bool:
    if isinstance(value, str | Mapping | bytes) or not isinstance(value, Iterable):
        return False
    return not is_chat(value)


# held-out rows


@checked
def split_rows(
    source: Rows, held_out: float, *, seed: int = 0, by: str | None = None
) -> tuple[list[Row], list[Row]]:
    """Part rows into those to train on and those to hold out.

    On which side a row falls depends on its content and the seed alone: it stays there when rows are added, taken away
    or shuffled, and two rows with the same content are on the same side.

    Args:
        source: Rows, as for `read_rows`.
        held_out: The share to hold out, between 0 and 1; what falls on that side is near it, not equal to it.
        seed: Another one parts them otherwise.
        by: The column that decides; the whole row when None.

    Returns:
        The rows to train on, and those held out, each in their order.

    Raises:
        ValidationError: No share, or one of the sides is empty.

    Example:
        >>> train, test = split_rows("rows.jsonl", held_out=0.1)
    """
    rows = read_rows(source)
    found = open_rows(rows)
    contents = []
    for number, row in enumerate(rows):
        if by is not None and not isinstance(row, Mapping):
            raise located(
                ValidationError(f"it is a text, and has no column {as_given(by)}."), found, number, None
            )
        contents.append(row if by is None else column_of(row, by, "split_rows: by"))  # type: ignore[arg-type]
    return parted(rows, contents, held_out, seed)


def parted(rows: Sequence[T], contents: Sequence[Any], held_out: float, seed: int) -> tuple[list[T], list[T]]:
    """Part rows by what decides of each; see `split_rows`."""
    if not 0 < held_out < 1:
        raise ValidationError(f"held_out={as_given(held_out)} must be a share between 0 and 1, such as 0.1.")
    sides: tuple[list[T], list[T]] = ([], [])
    for row, content in zip(rows, contents, strict=True):
        sides[int(_share_of(content, seed) < held_out)].append(row)
    for side, name in zip(sides, ("to train on", "to hold out"), strict=True):
        if not side:
            raise ValidationError(
                f"held_out={held_out:g} of {len(rows)} rows leaves none {name}: a row falls on a side by its content. "
                f"Give more rows, another share, or another seed."
            )
    return sides


def _share_of(content: Any, seed: int) -> float:
    """Return a number in [0, 1) that depends on a content and the seed alone."""
    try:
        written = json.dumps([seed, content], sort_keys=True, default=str)
    except (RecursionError, ValueError, TypeError) as error:
        raise ValidationError(
            f"held_out: the content of a row cannot be told from another's ({type(error).__name__}: {error})."
        ) from error
    return int.from_bytes(hashlib.blake2b(written.encode(), digest_size=8).digest(), "big") / 2**64
