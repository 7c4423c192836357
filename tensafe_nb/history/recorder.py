"""The log of a training client while it grows: every event is written, added to the curves, and told to subscribers."""

import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TextIO

from tensafe_nb.errors import ValidationError
from tensafe_nb.events import UNRECORDED, Event
from tensafe_nb.futures import telling
from tensafe_nb.history.log import RunHistory
from tensafe_nb.history.stream import Subscriber, check_subscriber, name_of_subscriber
from tensafe_nb.locks import hold
from tensafe_nb.protocol.codec import encode, writer_of

logger = logging.getLogger(__name__)

line_of = writer_of(json.JSONEncoder(allow_nan=False))
MOST_UNWRITTEN = 10_000  # events that are remembered in case whoever writes them has ended


class Recorder:
    """Records events that have their number, and hands them out.

    One writes a log at a time: another recorder of the same log, as a second kernel has for a server's training client,
    reads what the first one writes, and goes on writing when that one has ended.

    Args:
        path: The log; created with its folder, readable by its owner only. What is in it already is the history.
        mirrors: It is a copy of what a server's log holds. A server that has the same home folder writes its own there,
            and nobody else may, even while it does not run.
    """

    def __init__(self, path: Path, *, mirrors: bool = False) -> None:
        self._may_write = not (mirrors and (path.parent / "journal").exists())
        self._refused = False
        self._pid = os.getpid()
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            opened = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        except OSError as error:
            raise ValidationError(
                f"The event log {path} cannot be written ({error.strerror}). "
                f"Set TENSAFE_HOME to a folder that can be."
            ) from error
        self._log: TextIO = os.fdopen(opened, "w", encoding="utf-8")
        self._writes = self._may_write and hold(self._log)
        self._unwritten: deque[Event] = deque(maxlen=MOST_UNWRITTEN)  # by this one, as another writes
        if self._writes:
            cut_torn_line(path)
        self.history = RunHistory.load(path)
        self._lock = threading.RLock()
        self._subscribers: list[Subscriber] = []

    def record(self, event: Event) -> None:
        """Write an event down, and tell the subscribers."""
        with self._lock:
            if not self._log.closed and os.getpid() == self._pid:
                if not isinstance(event, UNRECORDED):
                    self._put(event)
                self.history.add(event)
            for subscriber in tuple(self._subscribers):
                try:
                    with telling():
                        subscriber(event)
                except (
                    Exception
                ):  # it would fail at every event to come, and be told of in whatever cell runs then
                    self._drop(subscriber)
                    logger.exception(
                        "The subscriber %s failed at %s and is told nothing more; the work goes on. Mend it, and "
                        "subscribe it again: tc.subscribe(…, after=%d) tells it what it missed.",
                        name_of_subscriber(subscriber),
                        type(event).__name__,
                        event.seq - 1,
                    )

    def _drop(self, subscriber: Subscriber) -> None:
        with self._lock, suppress(ValueError):
            self._subscribers.remove(subscriber)

    def _put(self, event: Event) -> None:
        if not self._may_write:
            return
        if not self._writes:
            self._unwritten.append(event)
            self._writes = hold(self._log)
            if not self._writes:
                return
            cut_torn_line(self.history.path)  # whoever wrote it has ended, in the middle of a line perhaps
            written = RunHistory.load(self.history.path).last_seq
            for missing in self._unwritten:
                if missing.seq > written:
                    self._write(line_of(encode(missing)) + "\n")
            self._unwritten.clear()
            return
        self._write(line_of(encode(event)) + "\n")

    def _write(self, line: str) -> None:
        """Write a line. What a full disk refuses stays in the file's buffer and is tried again with the next one."""
        try:
            self._log.write(line)
            self._log.flush()
        except OSError as error:
            if not self._refused:
                logger.error(
                    "%s cannot be written (%s); it is tried again", self.history.path, error.strerror
                )
            self._refused = True
        else:
            self._refused = False

    def is_written(self) -> bool:
        """Whether the system has all that was recorded; what a full disk has refused is tried again."""
        with self._lock:
            if self._refused and not self._log.closed:
                self._write("")
            return not self._refused or self._log.closed

    def subscribe(self, subscriber: Subscriber, after: int | None = None) -> Callable[[], None]:
        """Call `subscriber(event)` for every event: recorded ones above `after` first, then live ones.

        A subscriber must be quick and must not wait for an operation. Without `after` only live events come. One that
        raises is reported once, and told no more.

        Returns:
            A function that ends the subscription.

        Raises:
            ValidationError: A subscriber that cannot be called, or is a coroutine function.
        """
        check_subscriber(subscriber)
        with self._lock:
            if after is not None:
                for event in self.history.events(after):
                    subscriber(event)
            self._subscribers.append(subscriber)
        return partial(self._drop, subscriber)

    def sync(self) -> None:
        """Put everything recorded so far on the disk."""
        with self._lock:
            if self._log.closed or os.getpid() != self._pid:
                return
            log = os.dup(self._log.fileno())
        try:
            os.fsync(log)  # a slow disk holds up nobody who records meanwhile
        finally:
            os.close(log)

    def close(self) -> None:
        """Write out the log; later events are still handed to subscribers but recorded no more."""
        self.sync()
        with self._lock:
            try:
                self._log.close()
            except OSError as error:  # whoever closes has others to close
                logger.error("the last events of %s are lost (%s)", self.history.path, error.strerror)

    def __del__(self) -> None:
        if hasattr(self, "_log"):  # it was opened
            try:  # noqa: SIM105  # at the interpreter's end, imported names are gone
                self._log.close()
            except OSError:
                pass


def cut_torn_line(path: Path) -> None:
    """Cut off a last line that a killed process did not finish: what follows would be joined to it."""
    if not path.exists():
        return
    with path.open("rb+") as log:
        content = log.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            log.truncate(whole)
