"""Tables to take along: columns of equal length, which become a CSV file, a Parquet file or a pandas frame."""

import csv
import importlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, final

from tensafe_nb.checks import checked
from tensafe_nb.display import listing
from tensafe_nb.errors import ValidationError
from tensafe_nb.store.disk import disk_errors, write_whole

Column: TypeAlias = Sequence[Any]
OPERATOR_VIEW = "operator view: computed from the training data, not covered by epsilon"
SHOWN_ROWS = 20
PLAIN = (str, int, float, bool, type(None), datetime)  # what a cell of a CSV file holds as it is


class Tabular(ABC):
    """Base of what can be taken along as a table."""

    __slots__ = ()

    @abstractmethod
    def table(self) -> "Table":
        """Return it as a table."""

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame, one row for each; what is not known is NaN.

        Raises:
            ValidationError: pandas is not installed.
        """
        return self.table().to_pandas()

    @checked
    def to_csv(self, path: str | Path) -> Path:
        """Write a CSV file, one row for each, and return its path; what is not known is an empty cell.

        Raises:
            ValidationError: Under differential privacy, a name that does not say "operator".
            StorageError: It could not be written.
        """
        return self.table().to_csv(path)

    @checked
    def to_parquet(self, path: str | Path) -> Path:
        """Write a Parquet file, one row for each, and return its path.

        Raises:
            ValidationError: pyarrow is not installed; under differential privacy, a name that does not say "operator".
            StorageError: It could not be written.
        """
        return self.table().to_parquet(path)


@final
class Table(Tabular):
    """Columns of equal length. What is not known is None here, NaN in a frame, an empty cell in a CSV file; never 0.

    Args:
        columns: By name.
        operator_view: Whether it tells of private training data what epsilon does not cover: then files are their
            owner's alone, and their names must say so.
    """

    def __init__(self, columns: Mapping[str, Column], operator_view: bool = False) -> None:
        self.columns = {name: list(column) for name, column in columns.items()}
        self.operator_view = operator_view

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]], operator_view: bool = False) -> "Table":
        """Return the table of some rows; a row may lack what others have."""
        names = dict.fromkeys(name for row in rows for name in row)
        return cls({name: [row.get(name) for row in rows] for name in names}, operator_view)

    def __len__(self) -> int:
        return max(map(len, self.columns.values()), default=0)

    def __repr__(self) -> str:
        return f"<Table {len(self)} rows: {', '.join(self.columns)}>"

    def _repr_html_(self) -> str:
        rows = [dict(zip(self.columns, cells, strict=True)) for cells in islice(self.rows(), SHOWN_ROWS)]
        left = f", the first {SHOWN_ROWS} shown" if len(self) > SHOWN_ROWS else ""
        return listing(f"{len(self)} rows{left}", rows)

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Iterate over the rows."""
        return zip(*self.columns.values(), strict=True)

    def table(self) -> "Table":
        return self

    def to_pandas(self) -> Any:
        """Return a pandas DataFrame; what is not known is NaN.

        Raises:
            ValidationError: pandas is not installed.
        """
        frame = extra("pandas", "to_pandas").DataFrame(self.columns)
        if self.operator_view:
            frame.attrs["operator_view"] = OPERATOR_VIEW
        return frame

    @checked
    def to_csv(self, path: str | Path) -> Path:
        """Write a CSV file with a head, and return its path; numbers read back as they are. Missing folders are made.

        Raises:
            ValidationError: Under differential privacy, a name that does not say "operator".
            StorageError: It could not be written.
        """
        lines = io.StringIO(newline="")
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(tuple(map(cell_of, row)) for row in self.rows())
        return self._written(Path(path).expanduser(), lines.getvalue())

    @checked
    def to_parquet(self, path: str | Path) -> Path:
        """Write a Parquet file, and return its path.

        Raises:
            ValidationError: pyarrow is not installed; under differential privacy, a name that does not say "operator".
            StorageError: It could not be written.
        """
        arrow, parquet = extra("pyarrow", "to_parquet"), extra("pyarrow.parquet", "to_parquet")
        columns = {name: arrow.array(_of_one_kind(column)) for name, column in self.columns.items()}
        written = arrow.table(columns)
        if self.operator_view:
            written = written.replace_schema_metadata({"operator_view": OPERATOR_VIEW})
        content = io.BytesIO()
        parquet.write_table(written, content)
        return self._written(Path(path).expanduser(), content.getvalue())

    def _written(self, path: Path, content: str | bytes) -> Path:
        if self.operator_view and "operator" not in path.name:
            named = path.with_name(f"{path.stem}.operator{path.suffix}").name
            raise ValidationError(
                f"This training is private, and what it measured is the operator's view: it was computed from the "
                f"training data, and epsilon does not cover it. Say so in the file's name, for instance {named!r}; "
                f"only you will be able to read the file."
            )
        with disk_errors(f"write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content, shared=not self.operator_view)
        return path


def extra(module: str, wanted_by: str) -> Any:
    """Import a package of the extra for frames.

    Raises:
        ValidationError: It is not installed; says the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValidationError(
            f"{wanted_by}() needs {module.partition('.')[0]}, which is not installed: "
            f'pip install "tensafe_nb[frames]". to_csv() needs nothing.'
        ) from error


def cell_of(value: Any) -> Any:
    """Return a value as a cell of a CSV file: plain ones as they are, dates as ISO 8601, others as JSON."""
    if isinstance(value, datetime):
        return value.isoformat()
    return value if isinstance(value, PLAIN) else json.dumps(value, default=str, ensure_ascii=False)


def _of_one_kind(column: Column) -> Column:
    """Return a column of a single type, as Parquet has them: texts where types differ, or where values have parts."""
    kinds = {type(value) for value in column if value is not None}
    if kinds <= {int, float} or (len(kinds) == 1 and kinds <= set(PLAIN)):
        return [float(value) if value is not None and float in kinds else value for value in column]
    return [None if value is None else str(cell_of(value)) for value in column]
