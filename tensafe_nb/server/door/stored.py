"""How many bytes a tenant stores: looked through now and then, and counted in between, so that asking costs nothing."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tensafe_nb.events import CheckpointSaved, Event
from tensafe_nb.store.home import Home

KINDS = ("artifacts", "journals", "logs", "records")
SECONDS, SHARE = 10.0, 20  # between two walks, and how many times as long as one takes, at least


class Stored:
    """What one tenant stores: artifacts; journals with automatic checkpoints; event logs; audit log, ledger, answers.

    What is written between two walks is counted where it is large, and found by the next one where it is not.

    Args:
        home: Its share of the home folder.

    Attributes:
        bytes: By kind.
    """

    def __init__(self, home: Home) -> None:
        self._home, self._lock = home, threading.Lock()
        self.bytes = dict.fromkeys(KINDS, 0)
        self._at, self._took = float("-inf"), 0.0
        self.is_changed = True  # since the last walk, perhaps

    def total(self) -> int:
        """Return all of it; the first to ask waits for a walk, and so does whoever asks after something was deleted."""
        if self._at == float("-inf"):
            self.measure()
        return sum(self.bytes.values())

    def add(self, count: int) -> None:
        """Count what has come in as an artifact."""
        with self._lock:
            self.bytes["artifacts"] += count

    def count(self, event: Event) -> None:
        """Take in an event of any of its training clients."""
        if isinstance(event, CheckpointSaved):
            self.add(event.size_bytes)

    def forget(self) -> None:
        """Let the next who asks look: something was deleted."""
        self._at = float("-inf")

    @property
    def is_due(self) -> bool:
        """Whether to look through it again."""
        return self.is_changed and time.monotonic() - self._at > max(SECONDS, SHARE * self._took)

    def measure(self) -> None:
        """Look through the folders."""
        began, self.is_changed = time.monotonic(), False
        home, found = self._home, dict.fromkeys(KINDS, 0)
        found["artifacts"] = sum(size for _, size in files_in(home.artifacts()))
        for path, size in files_in(home.runs()):
            found[
                "journals" if Path(path).relative_to(home.runs()).parts[1].startswith("journal") else "logs"
            ] += size
        for folder in (home.audit(), home.ledger(), home.answers()):
            found["records"] += sum(size for _, size in files_in(folder))
        with self._lock:
            self.bytes, self._at = found, time.monotonic()
            self._took = self._at - began


def files_in(folder: Path | str) -> Iterator[tuple[str, int]]:
    """Yield the path and the size of every file in a folder and below; what is removed meanwhile is left out."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    yield from files_in(entry.path)
                else:
                    yield entry.path, entry.stat(follow_symlinks=False).st_size
