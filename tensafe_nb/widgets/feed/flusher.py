"""`tsnb-view`, the one thread that sends to pages: whoever has something to show is a member and is flushed by it.

Everybody else (runs, workers, message handlers) only wakes it, so no training step ever waits for a page.
"""

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

logger = logging.getLogger(__name__)

PERIOD = 0.2  # s between two flushes, unless a page asked for something


class Member(Protocol):
    """Something that is shown."""

    def flush(self) -> float | None:
        """Send what is new; return the seconds after which to be called again, None to wait for a wake."""

    @property
    def live(self) -> bool:
        """Whether anything may still come; the thread forgets a member that is not, until it wakes it again."""

    @property
    def busy(self) -> bool:
        """Whether it has something to show that it has not shown yet."""


class Flusher:
    """The thread and its members. It starts with the first wake and ends with the last live member."""

    def __init__(self) -> None:
        self.start_anew()

    def start_anew(self) -> None:
        """Forget everything; a forked child has no thread, and its parent's pages are not its own."""
        self._changed = threading.Condition()
        self._due: dict[Member, float | None] = {}
        self._thread: threading.Thread | None = None
        self._urgent = self._woken = self._closing = False
        self._flushed_at = 0.0
        self._begun = self._done = 0  # rounds of flushes
        self.met = False  # whether a page ever said hello to any of those that are shown: widgets load here

    def wake(self, member: Member, *, urgent: bool = False) -> None:
        """Have a member flushed soon, or at once if urgent; from any thread, never waits."""
        with self._changed:
            if self._closing:
                return
            self._due.setdefault(member, None)
            self._woken, self._urgent = True, self._urgent or urgent
            if self._thread is None:
                self._thread = threading.Thread(target=self.work, name="tsnb-view", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def aside(self, work: Callable[[], None]) -> None:
        """Do slow work that sends nothing on a thread of its own, so that pages are answered meanwhile."""
        threading.Thread(target=work, name="tsnb-aside", daemon=True).start()

    def now(self) -> float:
        """Return the time by which members keep their pace, in seconds."""
        return time.monotonic()

    def settle(self, members: Sequence[Member], timeout: float) -> bool:
        """Wait until these members have shown all there is to show now; False if they have not in time.

        A member that is not live has then left; one that is has been flushed since, and is not busy.
        """
        with self._changed:
            begun = self._begun
            if any(member in self._due for member in members):
                self._woken = self._urgent = True
                self._changed.notify_all()

            def at_rest() -> bool:
                waiting = [member for member in members if member in self._due]
                if not all(member.live for member in waiting) or any(member.busy for member in waiting):
                    return False
                return not waiting or self._done > begun  # a round that began afterwards is over

            settled = self._changed.wait_for(at_rest, timeout)
            ending = self._thread if not self._due else None
        if ending is not None and ending is not threading.current_thread():
            ending.join(timeout)
        return settled

    def close(self) -> None:
        """End the thread with the interpreter."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(1.0)

    def work(self) -> None:
        """Flush whoever is due, round after round; the thread's own."""
        while members := self._next():
            for member in members:
                self._flush(member)
            with self._changed:
                self._done = self._begun
                self._changed.notify_all()

    def _next(self) -> list[Member]:
        """Wait until a flush is due and return whom to flush; nobody when the thread is to end."""
        with self._changed:
            while not self._closing and self._due:
                wait = self.seconds_to_wait()
                if wait is not None and wait <= 0:
                    self._urgent = self._woken = False
                    self._begun += 1
                    self._flushed_at = self.now()
                    return list(self._due)
                self._changed.wait(wait)
            self._thread = None
            return []

    def seconds_to_wait(self) -> float | None:
        """Return the seconds until a flush is due; None where nothing is."""
        if self._urgent:
            return 0.0
        due = [moment for moment in self._due.values() if moment is not None]
        if self._woken:
            due.append(0.0)
        return max(min(due), self._flushed_at + PERIOD) - self.now() if due else None

    def _flush(self, member: Member) -> None:
        try:
            again = member.flush()
        except Exception:  # one broken widget must not silence the others
            logger.exception("%r could not be brought up to date", type(member).__name__)
            again = None
        with self._changed:
            if member.live or self._woken:
                self._due[member] = None if again is None else self.now() + again
            else:
                self._due.pop(member, None)
                self._changed.notify_all()


FLUSHER = Flusher()
atexit.register(FLUSHER.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=FLUSHER.start_anew)
