"""Replicas on this machine: each in a process of its own, or, to try a group out, in a thread.

The processes are started by `subprocess`, not `multiprocessing`: that would import the user's main script again in
each. They know neither keys nor tokens.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any, Protocol

from tensafe_nb.cluster.frames import read_frame, write_frame
from tensafe_nb.cluster.group import Inbox, Message
from tensafe_nb.cluster.replica import Replica
from tensafe_nb.config import TrainingConfig
from tensafe_nb.rlvr.scoring.child import end_with, take_pipes
from tensafe_nb.rlvr.scoring.lasting import STARTER
from tensafe_nb.rlvr.scoring.shipping import arrived, shipped
from tensafe_nb.store.home import Home

SECRETS = ("TENSAFE_KEK", "TENSAFE_PASSPHRASE", "TENSAFE_API_KEY")  # no replica has any business with them
PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); "
    "from tensafe_nb.cluster.local_places import serve; serve(int(sys.argv[1]), int(sys.argv[2]))"
)
INTERRUPT = "interrupt"


class ProcessPlaces:
    """Processes of this machine.

    Args:
        threads: Of torch, in each.
        home: Where converted models are.
        environment: What is different in each of them, one after the other: which GPU it sees, for instance.
    """

    def __init__(self, threads: int, home: Home, environment: Sequence[Mapping[str, str]] = ()) -> None:
        self._threads, self._home, self._environment = threads, home, environment
        self._started, self._shipping = 0, ShippedOnce()

    def start(self, inbox: Inbox) -> "ProcessPlace":
        own = self._environment[self._started % len(self._environment)] if self._environment else {}
        self._started += 1
        return ProcessPlace(f"replica {self._started}", self._threads, own, inbox, self._shipping)

    def load_arguments(self, config: TrainingConfig) -> Sequence[Any]:
        return config, self._home


class ShippedOnce:
    """Pickles what goes to all replicas, such as a sum of gradients, once: arguments that were the last ones, too."""

    def __init__(self) -> None:
        self._arguments: Sequence[Any] | None = None
        self._frame = b""

    def __call__(self, arguments: Sequence[Any]) -> bytes:
        """Return them as bytes."""
        if arguments is not self._arguments:
            self._arguments, self._frame = arguments, shipped(arguments)
        return self._frame


class ProcessPlace:
    """A process, the pipe to it and the thread that reads from it."""

    def __init__(
        self, name: str, threads: int, environment: Mapping[str, str], inbox: Inbox, shipping: "ShippedOnce"
    ) -> None:
        own_group: dict[str, Any] = {"start_new_session": True}  # interrupts of the kernel do not reach it
        if sys.platform == "win32":
            own_group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        left = {key: value for key, value in os.environ.items() if key not in SECRETS}
        self._process = STARTER.start(
            [sys.executable, "-P", "-c", PROGRAM, str(os.getpid()), str(threads), json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**left, "OMP_NUM_THREADS": str(threads), **environment},
            **own_group,
        )
        self.name = f"{name} (process {self._process.pid})"
        self.pid = self._process.pid
        assert self._process.stdin is not None and self._process.stdout is not None
        self._shipping = shipping
        self._requests: IO[bytes] = self._process.stdin
        self._answers: IO[bytes] = self._process.stdout
        self._writing = threading.Lock()
        self._reader = threading.Thread(
            target=self.read, args=(inbox,), name="tsnb-replica-pipe", daemon=True
        )
        self._reader.start()

    def send(self, call: int, method: str, arguments: Sequence[Any]) -> None:
        self._write(shipped((call, method)), self._shipping(arguments))

    def interrupt(self) -> None:
        self._write(shipped(INTERRUPT))

    def read(self, inbox: Inbox) -> None:
        """Pass messages on to the inbox until the process ends, and then its end."""
        with self._answers, contextlib.suppress(OSError):
            while (frame := read_frame(self._answers)) is not None:
                inbox.put((self, arrived(frame)))
        inbox.put((self, ("lost", ended(self._process.wait()))))

    def end(self) -> None:
        if sys.platform == "win32":
            self._process.kill()
        elif self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if threading.current_thread() is not self._reader:
            self._reader.join()
        with contextlib.suppress(OSError):  # what was not written yet has no reader now
            self._requests.close()

    def _write(self, *frames: bytes) -> None:
        with contextlib.suppress(OSError, ValueError), self._writing:  # it has died: the reader says so
            for frame in frames:
                write_frame(self._requests, frame)


def ended(code: int) -> str:
    """Say how a process has ended."""
    if code >= 0:
        return f"its process has ended with status {code}"
    how = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    memory = " Was there memory enough?" if how == "SIGKILL" else ""
    return f"its process was killed ({how}).{memory}"


def serve(parent: int, threads: int) -> None:
    """Be a replica until standard input ends: the program of the process."""
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt of the notebook is not ours
    requests, answers = take_pipes()
    import torch

    torch.set_num_threads(threads)
    writing = threading.Lock()
    work: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def emit(message: Message) -> None:
        frame = shipped(message)
        with writing:
            write_frame(answers, frame)

    replica = Replica(emit)

    def read() -> None:  # on a thread, so that this process ends with the one that asks, whatever it is doing
        while (frame := read_frame(requests)) is not None:
            request = arrived(frame)
            if request == INTERRUPT:
                replica.interrupt()
            elif (frame := read_frame(requests)) is not None:
                work.put((*request, arrived(frame)))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        replica.do(*work.get())


class ThreadPlaces:
    """Threads of this process: nothing is gained by them but a group that is there at once."""

    def __init__(self) -> None:
        self.places: list[ThreadPlace] = []

    def start(self, inbox: Inbox) -> "ThreadPlace":
        place = ThreadPlace(f"replica {len(self.places) + 1}", inbox)
        self.places.append(place)
        return place

    def load_arguments(self, config: TrainingConfig) -> Sequence[Any]:
        return config, None


class Watch(Protocol):
    """Called with every call, before or behind it; may end the place."""

    def __call__(self, place: "ThreadPlace", method: str) -> None: ...


class ThreadPlace:
    """A thread with a replica. What goes to and fro is pickled, as between processes: nothing is shared."""

    def __init__(self, name: str, inbox: Inbox) -> None:
        self.name, self._inbox = name, inbox
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._replica = Replica(self._emit)
        self.lost = False
        self.watch: Watch | None = None
        self.behind: Watch | None = None
        self._thread = threading.Thread(target=self.serve, name="tsnb-replica", daemon=True)
        self._thread.start()

    def send(self, call: int, method: str, arguments: Sequence[Any]) -> None:
        self._requests.put(shipped((call, method, arguments)))

    def interrupt(self) -> None:
        self._replica.interrupt()

    def serve(self) -> None:
        """Carry out calls, one after the other."""
        while (request := self._requests.get()) is not None and not self.lost:
            call, method, arguments = arrived(request)
            if self.watch is not None:
                self.watch(self, method)
            if not self.lost:
                self._replica.do(call, method, arguments)
            if self.behind is not None:
                self.behind(self, method)

    def lose(self) -> None:
        """Be gone as a process that was killed is: nothing of it arrives any more."""
        if not self.lost:
            self.lost = True
            self._inbox.put((self, ("lost", "it was killed")))
            self._requests.put(None)
            self._replica.interrupt()

    def end(self) -> None:
        self.lose()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _emit(self, message: Message) -> None:
        if not self.lost:
            self._inbox.put((self, arrived(shipped(message))))
