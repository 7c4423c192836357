"""The door for rows: files, lists, any iterable → rows to be trained on."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from tensafe_nb.errors import ValidationError

Row: TypeAlias = str | Mapping[str, Any]
EXPECTED = (
    "Expected 'text', 'prompt' and 'completion', or 'messages'; "
    "of a pair, 'prompt', 'chosen' and 'rejected', or 'anchor' and 'positive'."
)


def read_rows(source: str | Path | Iterable[Row]) -> list[Row]:
    """Read rows from a .jsonl file, a list, any iterable, or a Hugging Face dataset.

    Raises:
        ValidationError: No such file, a line that is not JSON, or no row at all.
    """
    if isinstance(source, Mapping):
        raise ValidationError("One row was given where rows are expected: put it in a list, [row].")
    rows = _read_jsonl(Path(source)) if isinstance(source, str | Path) else list(source)
    if not rows:
        raise ValidationError(
            f"There are no rows in {source if isinstance(source, str | Path) else 'the data'}."
        )
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    if not path.is_file():
        raise ValidationError(
            f"There is no file {str(path)!r} (looked in {Path.cwd()}). A text goes in a list: [text]."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValidationError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    lines = enumerate(text.split("\n"), start=1)  # JSON may hold every other line separator as it is
    return [_read_line(path, number, line) for number, line in lines if line.strip()]


def _read_line(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValidationError(f"{path}, line {number}: not JSON ({error.msg}).") from error
    if not isinstance(row, str | Mapping):
        raise ValidationError(
            f"{path}, line {number} is a {type(row).__name__}: one JSON object per line is expected."
        )
    return row


def shortened(row: Row) -> str:
    text = repr(row)
    return text if len(text) <= 80 else f"{text[:80]}…"
