"""Curves on the wire: small deltas as JSON, long stretches as binary columns. The other end is `static/wire.js`.

The kernel holds the history and a page is a cache: every message says at which point of a series it starts, and a
page that finds a gap says `hello` and is told everything anew.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

from tensafe_nb.protocol.batch import Array

VERSION = 1
DELTA_POINTS = 200  # more than this travels binary
CHUNK_POINTS = 32_768  # × (uint32 step + float32 value) = 256 kB

Message = tuple[dict[str, Any], list[bytes]]


class Columns(Protocol):
    """A history of curves."""

    def series(self, name: str, start: int) -> tuple[Array, Array]:
        """Return (steps, values) from point number `start` on."""


class Outbox:
    """Knows how much of each series the page was sent."""

    def __init__(self) -> None:
        self._sent: dict[str, int] = {}
        self._anew = True

    @property
    def points(self) -> int:
        """The number of points that a page holds which missed nothing."""
        return sum(self._sent.values())

    def start_over(self) -> None:
        """Send everything again: a page is new, or missed something."""
        self._sent.clear()
        self._anew = True

    def messages(self, history: Columns, names: Sequence[str]) -> Iterator[Message]:
        """Return what of the named series was not sent yet."""
        fresh = {name: self._fresh(history, name) for name in names}
        if self._anew or sum(len(steps) for _, steps, _ in fresh.values()) > DELTA_POINTS:
            for content, columns in chain.from_iterable(
                full_messages(name, *column) for name, column in fresh.items()
            ):
                yield content | ({"new": True} if self._anew else {}), columns
                self._anew = False
        else:
            yield from delta_of(fresh)

    def _fresh(self, history: Columns, name: str) -> tuple[int, Array, Array]:
        offset = self._sent.get(name, 0)
        steps, values = history.series(name, offset)
        if len(steps):
            self._sent[name] = offset + len(steps)
        return offset, steps, values


def delta_of(fresh: Mapping[str, tuple[int, Array, Array]]) -> Iterator[Message]:
    """Yield one message with the few new points of all series, if there are any."""
    series = {
        name: [offset, steps.tolist(), [json_number(value) for value in values.tolist()]]
        for name, (offset, steps, values) in fresh.items()
        if len(steps)
    }
    if series:
        yield {"t": "delta", "s": series}, []


def full_messages(name: str, offset: int, steps: Array, values: Array) -> Iterator[Message]:
    """Yield the points of one series from number `offset` on, as columns of at most 256 kB."""
    for start in range(0, len(steps), CHUNK_POINTS):
        stretch = slice(start, start + CHUNK_POINTS)
        columns = [
            steps[stretch].astype("<u4").tobytes(),
            values[stretch].astype("<f4").tobytes(),
        ]  # little endian
        yield {"t": "full", "name": name, "o": offset + start}, columns


def json_number(value: float) -> float | str:
    """Return a number as JSON can carry it: 7 digits (a page draws float32), non-finite ones by name."""
    return float(f"{value:.7g}") if math.isfinite(value) else str(value)
