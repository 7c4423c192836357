"""Links to whoever calls a user function: a process with one pipe, or a thread where there is no other way.

A cluster may have links of its own, to processes of its machines.

The processes are started by `subprocess`, not `multiprocessing`: that would import the user's main script again in
each.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, TypeAlias, runtime_checkable

import cloudpickle  # type: ignore[import-untyped, unused-ignore]

from tensafe_nb.rlvr.rewards.builtin.code import remove_left_behind
from tensafe_nb.rlvr.scoring.lasting import STARTER
from tensafe_nb.rlvr.scoring.shipping import shipped

LOAD_SECONDS = 60.0  # to start a process and import what a function needs
_PROGRAM = Path(__file__).with_name("child.py")
Unit: TypeAlias = list[Any]  # the rollouts of one call, or a turn of an environment
Message: TypeAlias = (
    "list[Any] | str | None"  # None: its process has ended; a text: its machine is gone, and why
)
Inbox: TypeAlias = "queue.SimpleQueue[tuple[Link, Message]]"


class Callee(Protocol):
    """What is called: a reward's function, or the stage of an environment."""

    def answered(self, unit: Unit, /) -> list[Any]:
        """Make one call and return what came of it, as JSON knows it."""


class Link(Protocol):
    """The way to whoever makes the calls; its answers come to an inbox.

    Attributes:
        patience: Seconds to start a process and import what a function needs.
        lack: Why it has not begun yet, where that is known.
    """

    @property
    def patience(self) -> float: ...
    @property
    def lack(self) -> str: ...
    def load(self, key: int, blob: bytes) -> None: ...
    def run(self, key: int, first: int, units: Sequence[Unit]) -> None: ...
    def kill(self) -> None: ...


StartLink: TypeAlias = "Callable[[Inbox], Link]"


@runtime_checkable
class ScoringCluster(Protocol):
    """Where user functions may be called instead of in processes of this machine."""

    def start_scoring(self, inbox: Inbox) -> Link:
        """Start a process that calls functions.

        Raises:
            OSError: The operating system refuses.
            ClusterError: There is no cluster any more.
        """


def loading(key: int, blob: bytes) -> bytes:
    """Return the request to take on a function."""
    return bytes(cloudpickle.dumps(("load", key, blob)))


def calling(key: int, first: int, units: Sequence[Unit]) -> bytes:
    """Return the request to call a function; pickling what it is called on may raise anything."""
    return bytes(cloudpickle.dumps(("run", key, shipped((first, units)))))


class ProcessLink:
    """A process, the pipe to it and the thread that reads from it."""

    patience, lack = LOAD_SECONDS, ""

    def __init__(self, inbox: Inbox) -> None:
        own_group: dict[str, Any] = {"start_new_session": True}  # interrupts of the kernel do not reach it
        if sys.platform == "win32":
            own_group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        self._process = STARTER.start(
            [sys.executable, "-P", str(_PROGRAM), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            **own_group,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests: IO[bytes] = self._process.stdin
        self._reader = threading.Thread(
            target=self.read, args=(self._process.stdout, inbox), name="tsnb-reward-pipe", daemon=True
        )
        self._reader.start()
        self.write(json.dumps(sys.path).encode())

    def load(self, key: int, blob: bytes) -> None:
        self.write(loading(key, blob))

    def run(self, key: int, first: int, units: Sequence[Unit]) -> None:
        self.write(calling(key, first, units))

    def read(self, answers: IO[bytes], inbox: Inbox) -> None:
        """Pass answers on to the inbox until the process ends, and then its end."""
        with answers:
            for line in answers:
                inbox.put((self, json.loads(line)))
        inbox.put((self, None))

    def kill(self) -> None:
        """End the process and what it started, and its thread, and remove what it could not."""
        if sys.platform == "win32":
            self._process.kill()
        elif self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        with contextlib.suppress(OSError):  # what was not written yet has no reader now
            self._requests.close()
        remove_left_behind()

    def write(self, body: bytes) -> None:
        """Send a request."""
        with contextlib.suppress(OSError):  # it has died: the reader says so
            self._requests.write(len(body).to_bytes(8, "big") + body)
            self._requests.flush()


class ThreadLink:
    """A thread of this process instead, for functions that cannot be sent elsewhere. It cannot be killed."""

    patience, lack = LOAD_SECONDS, ""

    def __init__(self, inbox: Inbox, calls: Sequence[Callee]) -> None:
        self._inbox, self._calls = inbox, calls
        self._requests: queue.SimpleQueue[tuple[int, int, Sequence[Unit]] | None] = queue.SimpleQueue()
        self._abandoned = False
        self._thread = threading.Thread(target=self.serve, name="tsnb-reward-call", daemon=True)
        self._thread.start()

    def load(self, key: int, blob: bytes) -> None:
        self._inbox.put((self, ["loaded", None]))

    def run(self, key: int, first: int, units: Sequence[Unit]) -> None:
        self._requests.put((key, first, units))

    def kill(self) -> None:
        """Let go of it: it ends as soon as the function returns, if it ever does."""
        self._abandoned = True
        self._requests.put(None)
        self._inbox.put((self, None))

    def join(self) -> None:
        """Wait for a thread that has nothing to do."""
        self._thread.join()

    def serve(self) -> None:
        """Make the calls, one after the other, until nobody waits for them any more."""
        while (request := self._requests.get()) is not None:
            key, first, units = request
            for index, unit in enumerate(units, first):
                if self._abandoned:
                    return
                self._inbox.put((self, [index, self._calls[key].answered(unit)]))
