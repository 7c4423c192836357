"""Warnings of libraries, on one thread: `warnings.catch_warnings` silences all threads of a process, the user's too.

Until Python 3.14 (and there by default) the filters are one list of all threads: a model that loads on its thread would
swallow what a cell warns of meanwhile, and put back filters that the cell has changed. So one filter stands in the list
that asks, for each warning, on which thread it comes.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _OnQuietThreads:
    """Stands where a filter has the pattern of its messages: it matches all of a thread that is quiet."""

    def __init__(self) -> None:
        self.here = threading.local()

    def match(self, message: str) -> bool:
        return getattr(self.here, "quiet", False)


_THREADS = _OnQuietThreads()
_FILTER: Any = ("ignore", _THREADS, Warning, None, 0)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out the warnings that come on this thread; those of others are heard."""
    if warnings.filters[:1] != [_FILTER]:
        warnings.filters.insert(0, _FILTER)  # type: ignore[attr-defined]
    before = _THREADS.match("")
    _THREADS.here.quiet = True
    try:
        yield
    finally:
        _THREADS.here.quiet = before
