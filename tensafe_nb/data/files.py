"""Files of rows: JSON lines, a JSON array, CSV, TSV and Parquet; each row with the line it begins at."""

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from tensafe_nb.data.layouts import COLUMNS
from tensafe_nb.data.messages import is_chat
from tensafe_nb.data.values import shortened
from tensafe_nb.errors import ValidationError

Numbered: TypeAlias = Iterator[tuple[int | None, Any]]  # its line, and the row or what is wrong with it
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
CONVERT = {
    ".xlsx": "pandas.read_excel({path!r})",
    ".xls": "pandas.read_excel({path!r})",
    ".arrow": "datasets.Dataset.from_file({path!r})",
    ".feather": "pandas.read_feather({path!r})",
    ".pkl": "pandas.read_pickle({path!r})",
    ".txt": "open({path!r}).read().splitlines()  # a row for each line",
    ".md": "[open({path!r}).read()]  # one row",
    ".yaml": "yaml.safe_load(open({path!r}))",
    ".yml": "yaml.safe_load(open({path!r}))",
    ".zst": "pandas.read_json({path!r}, lines=True)",
    ".zip": "pandas.read_csv({path!r})",
    ".tar": "datasets.load_dataset({path!r})",
}
KNOWN = ".jsonl, .json, .csv, .tsv and .parquet (also with .gz, .bz2 or .xz behind)"


def read_file(path: Path) -> Numbered:
    """Read the rows of a file, as its name says what it is; an unknown name is read as JSON lines.

    Raises:
        ValidationError: No such file, another kind of file, or one that cannot be read; says what would.
    """
    with contextlib.suppress(RuntimeError):  # "~nobody/rows.csv" stays as it is
        path = path.expanduser()
    if not is_file(path):
        raise missing_file(path)
    kind = path.suffix.lower()
    opener = OPENERS.get(kind)
    if opener is not None:
        kind = Path(path.stem).suffix.lower()
    if kind in CONVERT:
        line = CONVERT[kind].format(path=str(path))
        raise ValidationError(f"{path} is read by {line}: give that. Files that are read here: {KNOWN}.")
    if kind == ".parquet":
        return parquet_rows(path)
    text = file_text(path, opener)
    if kind in (".csv", ".tsv"):
        return csv_rows(path, text, "\t" if kind == ".tsv" else None)
    if kind == ".json" or text.lstrip()[:1] == "[":  # arrays are found under the name .jsonl, too
        return json_rows(path, text)
    return json_lines(text)


def is_file(path: Path) -> bool:
    """Whether there is such a file; a text that is too long to be a path, or holds what none may hold, is none."""
    with contextlib.suppress(OSError, ValueError):
        return path.is_file()
    return False


def missing_file(path: Path) -> ValidationError:
    """Return why nothing is read at a path, and the line that reads what may be meant."""
    where, is_folder = str(path), False
    with contextlib.suppress(OSError, ValueError):
        is_folder = path.is_dir()
    if is_folder:
        saved = (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
        line = (
            f"datasets.load_from_disk({where!r})"
            if saved
            else f"[row for path in sorted(pathlib.Path({where!r}).glob('*.jsonl')) for row in data.read_rows(path)]"
        )
        return ValidationError(f"{where!r} is a folder. Give one of its files, or {line}.")
    if "*" in Path(where).name and " " not in where:
        rows = f"[row for path in sorted(glob.glob({where!r})) for row in data.read_rows(path)]"
        return ValidationError(f"{where!r} is a pattern of files: {rows} reads those.")
    where = shortened(where)
    if "://" in where or ":/" in where:  # Path makes one slash of two
        return ValidationError(
            f"{where!r} is an address: pandas.read_json(…, lines=True) reads those. Give the frame."
        )
    return ValidationError(
        f"There is no file {where!r} (looked in {Path.cwd()}). A text goes in a list: [text]. "
        f"A data set of the hub: datasets.load_dataset({where!r}, split='train')."
    )


def file_text(path: Path, opener: Callable[..., Any] | None) -> str:
    try:
        if opener is None:
            return path.read_text(encoding="utf-8-sig")
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            return str(file.read())
    except UnicodeDecodeError as error:
        data = bytes(error.object)
        line = 1 + data.count(b"\n", 0, error.start)
        wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        raise ValidationError(
            f"{path}, line {line}: not UTF-8 (byte {error.start}). Save the file as UTF-8, for instance by "
            f"p = pathlib.Path({str(path)!r}); p.write_text(p.read_text({'utf-16' if wide else 'cp1252'!r}), 'utf-8')."
        ) from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValidationError(f"{path} cannot be read: {error}. Is it whole?") from error


def json_lines(text: str) -> Numbered:
    # JSON may hold every other line separator as it is
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, json_row(line)


def json_row(line: str) -> Any:
    """Return the row that a line holds, or what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        comma = " This one ends in a comma: leave it out." if line.rstrip().endswith(",") else ""
        return ValidationError(
            f"not JSON ({what_is_wrong(error)}). One JSON object per line is expected.{comma}"
        )
    if not isinstance(row, str | Mapping):
        return ValidationError(f"a {type(row).__name__}: one JSON object per line is expected.")
    return row


def what_is_wrong(error: Exception) -> str:
    """Return in a few words why a text could not be read as JSON."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return getattr(error, "msg", "a number of thousands of digits")  # which Python does not convert


def json_rows(path: Path, text: str) -> Numbered:
    """Read an array of rows, {"data": [rows]}, or JSON lines under another name."""
    start = _skip(text, 0)
    if text[start : start + 1] == "[":
        return json_array(path, text, start + 1)
    try:
        whole, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return json_lines(text)
    if _skip(text, end) < len(text) or not isinstance(whole, Mapping):
        return json_lines(text)
    if isinstance(whole.get("data"), list) and "columns" not in whole:
        return ((None, row) for row in whole["data"])
    if any(isinstance(whole.get(name), str) or is_chat(whole.get(name)) for name in COLUMNS):
        return iter([(1 + text.count("\n", 0, start), whole)])  # one row
    raise other_object(path, whole)


def other_object(path: Path, whole: Mapping[str, Any]) -> ValidationError:
    """Return why an object of JSON is no list of rows, and the line that makes one of it."""
    lists = [name for name, value in whole.items() if isinstance(value, list)]
    line = f"json.load(open({str(path)!r}))" + (f"[{lists[0]!r}]" if len(lists) == 1 else "")
    rows = [name for name in lists if is_chat(whole[name])]
    if rows:
        line = f"json.load(open({str(path)!r}))[{('train' if 'train' in rows else rows[0])!r}]"
    elif "columns" in whole and "data" in whole:
        line = f"pandas.read_json({str(path)!r}, orient='split')"
    elif len(lists) > 1 or (
        COLUMNS & whole.keys() and all(isinstance(one, Mapping) for one in whole.values())
    ):
        line = f"pandas.read_json({str(path)!r}), if these are columns"
    elif whole and all(isinstance(one, Mapping) for one in whole.values()):
        line = f"list({line}.values())"
    elif not lists:
        line = f"[{line}]"
    keys = sorted(whole)
    names = str(keys) if len(keys) <= 10 else f"{str(keys[:10])[:-1]}, …]"
    return ValidationError(f"{path} is one object with the keys {names}, not a list of rows. Give {line}.")


def json_array(path: Path, text: str, at: int) -> Numbered:
    """Read an array from behind its bracket on, one row after the other, so that each knows its line."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = _skip(text, at)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            where = getattr(error, "lineno", line)
            raise ValidationError(f"{path}, line {where}: not JSON ({what_is_wrong(error)}).") from error
        yield line, row
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            where = 1 + text.count("\n", 0, at)
            raise ValidationError(
                f"{path}, line {where}: not JSON (a comma or the end of the array is expected)."
            )
    if _skip(text, at + 1) < len(text):
        raise ValidationError(
            f"{path}: something stands behind the array, from line {1 + text.count(chr(10), 0, at)} on."
        )


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def csv_rows(path: Path, text: str, delimiter: str | None) -> Numbered:
    """Read a table with its names in the first line; an empty cell is no value."""
    csv.field_size_limit(sys.maxsize)  # of the process; cells of documents are longer than its 131,072
    head = text.lstrip("\r\n").split("\n", 1)[0]
    if delimiter is None:  # a spreadsheet of a country that writes 1,5 saves with semicolons
        delimiter = max(",;\t", key=head.count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(filter(None, lines), [])]  # after empty lines
    except csv.Error as error:
        raise ValidationError(f"{path}, line 1: not CSV ({error}).") from error
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValidationError(f"{path}: its first line, the names of the columns, has {twice[0]!r} twice.")
    return csv_cells(path, lines, names)


def csv_cells(path: Path, lines: Any, names: list[str]) -> Numbered:
    while True:
        line = lines.line_num + 1
        try:
            cells = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValidationError(f"{path}, line {line}: not CSV ({error}).") from error
        if len(cells) == len(names):
            yield line, {name: cell or None for name, cell in zip(names, cells, strict=True)}
        elif cells:
            yield (
                line,
                ValidationError(
                    f"{len(cells)} cells where the first line names {len(names)} columns. A comma or line break in "
                    "a cell wants double quotes around it."
                ),
            )


def parquet_rows(path: Path) -> Numbered:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValidationError(f"To read {path}: pip install pyarrow.") from error
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValidationError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    return ((None, without_none(row)) for batch in file.iter_batches() for row in batch.to_pylist())


def without_none(value: Any) -> Any:
    """Return a row of a table as it was before it was one: with lists, and without the keys that have no value.

    A table gives every dict of a column the keys of all of them, with None. The row's own columns stay, and so does
    the content of a message.
    """
    if isinstance(value, Mapping):
        return {name: _inner(item) for name, item in value.items()}
    return value


def _inner(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _inner(v) for k, v in value.items() if v is not None or k == "content"}
    if isinstance(value, list | np.ndarray):
        return [_inner(item) for item in value]
    return value
