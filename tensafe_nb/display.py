"""Display: shows what a cell ends with, as one line of text and as one small table, from one template.

Nothing here waits, computes on a model or reads a file: what is shown is what the object already knows. The tables
carry no colours of their own, so they are readable in any theme, and every text in them is escaped.
"""

import dataclasses
import html
import importlib
import itertools
import re
import reprlib
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

C = TypeVar("C", bound=type)
T = TypeVar("T")
Facts = Mapping[str, object]
WIDGETS = "tensafe_nb.widgets"
LONGEST = 200  # characters of a value
MOST_ROWS = 50  # of a listing
LONGEST_GIVEN = 400  # characters of a value in a message
FEW = 8  # items that are shown one by one
DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def shown(cls: C) -> C:
    """Class decorator: a notebook shows a table of `_facts()`, which must neither wait nor raise.

    A dataclass without `_facts` is told by its fields, and its repr becomes one short line of them.
    """
    if not hasattr(cls, "_facts"):
        cls._facts = fields_of  # type: ignore[attr-defined]
        cls.__repr__ = line_of_fields  # type: ignore[assignment]
    cls._repr_html_ = lambda self: table(type(self).__name__, self._facts())  # type: ignore[attr-defined]
    return cls


def widgets() -> Any:
    """Return the module of the widgets, which is imported when something is first shown: a first cell stays light.

    This is the one door from what a user holds to how a page shows it.
    """
    return importlib.import_module(WIDGETS)


def settle(ended: Any) -> None:
    """Let whatever may be showing a client or a run show its end; nothing does before the widgets are imported."""
    if WIDGETS in sys.modules:
        widgets().settle(ended)


def fields_of(value: Any) -> dict[str, object]:
    """Return the fields of a dataclass by name."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def with_article(noun: str) -> str:
    """Return a noun with "a" or "an" before it."""
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"


class Listing(list[T]):
    """A list that a notebook shows as a table: one row for each, one column for each fact.

    Args:
        items: What it lists.
        columns: The facts of one of them, by the names of the columns.
    """

    def __init__(self, items: Iterable[T], columns: Callable[[T], Facts]) -> None:
        super().__init__(items)
        self._columns = columns

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)  # elsewhere it is what it holds

    def _repr_html_(self) -> str:
        rows = [self._columns(item) for item in self[:MOST_ROWS]]
        left = len(self) - len(rows)
        return listing(f"{len(self)} in all" + (f", the first {len(rows)} shown" if left else ""), rows)


RIGHT = 'style="text-align: right"'
LEFT = 'style="text-align: left"'  # JupyterLab aligns what has no style of its own to the right


def table(caption: str, facts: Facts) -> str:
    """Return a table of names and values."""
    rows = "".join(
        f'<tr><th scope="row" {LEFT}>{escaped(name)}</th><td {LEFT}>{escaped(_readable(name, value))}</td></tr>'
        for name, value in facts.items()
    )
    return f'<table class="tsnb-facts"><caption>{escaped(caption)}</caption><tbody>{rows}</tbody></table>'


def listing(caption: str, rows: Sequence[Facts]) -> str:
    """Return a table with a head, one row for each; all rows have the names of the first.

    Numbers stand on the right of their columns, everything else on the left.
    """
    sides = {name: RIGHT if all(is_number(row[name]) for row in rows) else LEFT for name in (rows or [{}])[0]}
    head = "".join(f'<th scope="col" {side}>{escaped(name)}</th>' for name, side in sides.items())
    cells = (
        "".join(f"<td {sides[name]}>{escaped(_readable(name, value))}</td>" for name, value in row.items())
        for row in rows
    )
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return (
        f'<table class="tsnb-facts"><caption>{escaped(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _readable(name: str, value: object) -> object:
    """Return what people read of Unix seconds, in whatever is named `…_at`, and of bytes, in whatever is `…_bytes`."""
    if name.endswith("_at") and isinstance(value, float):
        return f"{datetime.fromtimestamp(value).astimezone():%Y-%m-%d %H:%M:%S}"
    if name.endswith("_bytes") and isinstance(value, int):
        return size_text(value)
    return value


def size_text(count: int) -> str:
    """Return bytes in units, as the panel shows them: 999 B, 1.20 kB, 12.5 MB."""
    if count < 1000:
        return f"{count} B"
    size = float(f"{count:.3g}")  # 999,600 is 1.00 MB
    power = min(4, (len(f"{size:.0f}") - 1) // 3)
    return f"{f'{size / 1000**power:#.3g}'.rstrip('.')} {' kMGT'[power]}B"


def escaped(value: object) -> str:
    """Return a value as HTML text: short, escaped, with nothing in it that cannot be seen."""
    return html.escape(short(value))


def short(value: object) -> str:
    """Return a value in a few words: a dash for None, six digits of a number, the shape of an array."""
    match value:
        case None:
            return "—"
        case str():
            text = value
        case float():
            text = f"{value:.6g}"
        case Mapping():
            text = ", ".join(f"{name} {short(item)}" for name, item in value.items()) or "—"
        case tuple() | list():
            text = few_words(value)
        case _ if hasattr(value, "shape") and hasattr(value, "dtype"):
            text = f"{tuple(value.shape)} {value.dtype}"
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            text = short(fields_of(value))
        case _:
            text = str(value)
    text = visible(text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def as_given(value: object) -> str:
    """Return a value as an error message names what it was given: as `repr` does, and short, whatever it is.

    What is long, deep or cyclic is cut; what cannot be told is named by its type.
    """
    text = _GIVEN.repr(value)
    return text if len(text) <= LONGEST_GIVEN else f"{text[:LONGEST_GIVEN]}..."


class GivenRepr(reprlib.Repr):
    """`repr` with an end: reprlib, made total, and with the entries of a dict as they stand."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, LONGEST, LONGEST
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = FEW

    def repr1(self, x: Any, level: int) -> str:
        try:
            return super().repr1(x, level)
        except Exception:  # noqa: BLE001  # what a user made may do anything when it is asked for its repr
            return f"<{type(x).__name__} that cannot be shown>"

    def repr_int(self, x: int, level: int) -> str:
        bits = int.bit_length(x)
        return repr(x) if bits < 500 else f"<a number of about {int(bits * 0.30103) + 1} digits>"

    def repr_dict(self, x: Mapping[Any, Any], level: int) -> str:
        if level <= 0 and x:
            return "{...}"
        few = itertools.islice(x.items(), self.maxdict)
        parts = [f"{self.repr1(key, level - 1)}: {self.repr1(item, level - 1)}" for key, item in few]
        return "{" + ", ".join(parts + ["..."] * (len(x) > self.maxdict)) + "}"

    def repr_instance(self, x: Any, level: int) -> str:
        text = visible(repr(x))
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


_GIVEN = GivenRepr()


def as_markdown(text: str) -> str:
    """Return a text as Markdown that renders as just this text: no markup of it comes into force, HTML's neither."""
    return html.escape(
        re.sub(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", visible(" ".join(text.split()))), quote=False
    )


def visible(text: str) -> str:
    """Return a text with control characters, and those that turn its direction, as codes."""
    return "".join(code_of(c) if c in DIRECTIONS or unicodedata.category(c) in _UNSEEN else c for c in text)


_UNSEEN = ("Cc", "Zl", "Zp", "Cs")


def code_of(character: str) -> str:
    r"""Return a character as Python writes it in a text: \n, \x1b."""
    named = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    number = ord(character)
    return named.get(character) or (f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}")


def few_words(items: Sequence[object]) -> str:
    """Return a few items as they are, many as their number."""
    if items and dataclasses.is_dataclass(items[0]):
        return f"{len(items)} × {type(items[0]).__name__}"
    if len(items) > FEW:
        return f"{len(items)}: {', '.join(short(item) for item in items[:3])}, …"
    return ", ".join(short(item) for item in items) or "—"


def line_of_fields(self: Any) -> str:
    """Return the repr of a dataclass, as short as it can be read."""
    parts = ", ".join(f"{name}={_argument(value)}" for name, value in fields_of(self).items())
    return f"{type(self).__name__}({parts})"


def _argument(value: object) -> str:
    if isinstance(value, str):
        text = repr(str(value))
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}…'"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {_argument(item)}" for name, item in value.items()) + "}"
    if (
        isinstance(value, tuple | list)
        and value
        and not dataclasses.is_dataclass(value[0])
        and len(value) <= FEW
    ):
        return f"({', '.join(map(_argument, value))})"
    if (isinstance(value, tuple | list) and value) or hasattr(value, "shape"):
        return f"<{short(value)}>"
    return visible(repr(value))
