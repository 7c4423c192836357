"""Replicas as actors of a Ray cluster, and links to processes that score there: Ray places and watches them.

Not this process is connected to the cluster, but one of its own, see `ray_driver`: Ray is not imported here. Actors get
no key, no vault and no token, and are not restarted by Ray: a new one takes the state of a replica that is left.
"""

import contextlib
import itertools
import json
import os
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import cloudpickle  # type: ignore[import-untyped, unused-ignore]

from tensafe_nb.cluster.frames import read_frame, write_frame
from tensafe_nb.cluster.group import Inbox
from tensafe_nb.cluster.local_places import SECRETS, ShippedOnce, ended
from tensafe_nb.config import TrainingConfig
from tensafe_nb.errors import ClusterError
from tensafe_nb.locks import hold
from tensafe_nb.rlvr.scoring import links
from tensafe_nb.rlvr.scoring.lasting import STARTER
from tensafe_nb.rlvr.scoring.shipping import arrived
from tensafe_nb.store.home import Home

PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[4]); "
    "from tensafe_nb.cluster.ray_driver import serve; serve(int(sys.argv[1]), sys.argv[2], sys.argv[3])"
)
# Without a token Ray takes orders from whoever reaches its ports; a busy machine starts its agents slowly.
LOCAL_RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_agent_register_timeout_ms": "120000",
    "RAY_USAGE_STATS_ENABLED": "0",
}
PATIENCE = 300.0  # seconds for an actor to find room, and a function to be loaded beside it
LAST_WORDS = 2_000  # characters of what a driver has written
FOLDERS = Path("/tmp")  # Ray keeps sockets in its own, whose names may be 107 characters long
REMOVING = 20.0  # seconds in which the processes of a Ray that was killed have ended, and write no more


class RayDriver:
    """The process that is connected to a Ray cluster, the pipe to it, and the threads that write and read.

    Args:
        address: "auto", "local", or that of a head.

    Raises:
        OSError: No process can be started.
    """

    def __init__(self, address: str) -> None:
        self.address, self.gone = address, ""
        self._connected = False
        self.numbers = itertools.count(1)  # of actors
        self._heard: dict[int, Hears] = {}
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        sweep()
        self._folder = tempfile.mkdtemp(prefix="tsnb-ray-", dir=FOLDERS)
        self._held = Path(self._folder, "held").open("x+b")  # noqa: SIM115  # until the folder is removed
        hold(self._held)
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  # read once the process has ended
        left = {key: value for key, value in os.environ.items() if key not in SECRETS}
        if address == "local":
            left |= {**LOCAL_RAY, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            left["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # for the processes of the actors
        self._process = STARTER.start(
            [
                sys.executable,
                "-P",
                "-c",
                PROGRAM,
                str(os.getpid()),
                address,
                self._folder,
                json.dumps(sys.path),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env=left,
            start_new_session=True,  # interrupts of the kernel do not reach it
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._reader = threading.Thread(
            target=self.read, args=(self._process.stdout,), name="tsnb-ray-answers", daemon=True
        )
        self._writer = threading.Thread(
            target=self.write, args=(self._process.stdin,), name="tsnb-ray-requests", daemon=True
        )
        self._reader.start()
        self._writer.start()

    @property
    def idle(self) -> bool:
        """Whether no actor is left there."""
        return not self._heard

    def start(self, kind: str, actor: "Hears", cpus: int, gpus: int) -> None:
        """Start an actor: a "replica", or one for "scoring".

        Raises:
            ClusterError: The cluster is gone.
        """
        self._heard[actor.number] = actor
        if self.gone:
            del self._heard[actor.number]
            raise ClusterError(self.gone)
        self.order("start", actor.number, kind, cpus, gpus)

    def order(self, order: str, number: int, *arguments: Any) -> None:
        """Let the driver do something; takes no lock and does not wait, so that anything may be freed at any time."""
        self._frames.put(cloudpickle.dumps((order, number, *arguments)))

    def end(self, actor: "Hears") -> None:
        """End an actor; idempotent."""
        if self._heard.pop(actor.number, None) is not None:
            self.order("end", actor.number)

    def write(self, requests: IO[bytes]) -> None:
        """Pass orders on until there are no more."""
        with contextlib.suppress(OSError), requests:  # it has ended: the reader says so
            while (frame := self._frames.get()) is not None:
                write_frame(requests, frame)

    def read(self, answers: IO[bytes]) -> None:
        """Pass messages on to whom they concern until the process ends, and then their end."""
        refused = ""
        with answers, contextlib.suppress(OSError):
            while (frame := read_frame(answers)) is not None:
                match cloudpickle.loads(frame):
                    case ("connected", _):
                        self._connected = True
                    case ("refused", reason):
                        refused = str(reason)
                    case (number, message) if (actor := self._heard.get(number)) is not None:
                        actor.hear(message)
        self._kill()  # what is left of its group
        how = ended(self._process.wait())
        self._words.seek(0)
        words = self._words.read().decode(errors="replace").strip().splitlines()
        self._words.close()
        remove(self._folder)
        self._held.close()
        if not self._connected:
            self.gone = refusal(self.address, refused or f"nothing has answered it, and {how}")
        else:
            last = f" Its last words: {words[-1][-LAST_WORDS:]}" if words else ""
            self.gone = f"The Ray cluster at {self.address!r} is gone: {how}.{last}"
        self._frames.put(None)
        for actor in list(self._heard.values()):
            actor.hear(("lost", self.gone))

    def leave(self) -> None:
        """Let the process leave its cluster and end; one that is not connected yet ends at once."""
        self._frames.put(None)
        if not self._connected:
            self._kill()

    def close(self) -> None:
        """End the process, and wait for that; idempotent."""
        self.leave()
        self._writer.join()
        self._reader.join()

    def _kill(self) -> None:
        if self._process.returncode is None:  # else its number may be another's
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


def remove(folder: str) -> None:
    """Remove a driver's folder, in which Ray's processes may write for a while after it was killed."""
    until = time.monotonic() + REMOVING
    shutil.rmtree(folder, ignore_errors=True)
    while Path(folder).exists() and time.monotonic() < until:
        time.sleep(0.1)
        shutil.rmtree(folder, ignore_errors=True)


def sweep() -> None:
    """Remove the folders of processes that ended while their driver was connecting: nobody was left to do it."""
    for held in FOLDERS.glob("tsnb-ray-*/held"):
        with contextlib.suppress(OSError), held.open("r+b") as file:
            if hold(file):
                shutil.rmtree(held.parent, ignore_errors=True)


def refusal(address: str, reason: str) -> str:
    """Say why there is no cluster, and what to do."""
    reason = reason.rstrip(".")
    if address == "local":
        return f"Ray could not be started here: {reason}. A machine that is very busy starts it too slowly: try again."
    return (
        f"There is no Ray cluster at {address!r}: {reason}. Start one with `ray start --head`, or take "
        f'RayCluster("local").'
    )


class Hears(Protocol):
    """Whoever a driver tells what it knows of an actor."""

    @property
    def number(self) -> int: ...
    def hear(self, message: Any) -> None:
        """Take in what the actor says, as bytes, or ("at", where), ("waiting", reason), ("lost", reason)."""


class RayPlaces:
    """Actors of a Ray cluster.

    Args:
        driver: Who is connected to it.
        cpus: Cores for each.
        gpus: GPUs for each.
        home: Where converted models are, if the actors are on this machine.
    """

    def __init__(self, driver: RayDriver, cpus: int, gpus: int, home: Home | None) -> None:
        self._driver, self._cpus, self._gpus, self._home = driver, cpus, gpus, home
        self._shipping = ShippedOnce()

    def start(self, inbox: Inbox) -> "RayPlace":
        return RayPlace(self._driver, self._cpus, self._gpus, inbox, self._shipping)

    def load_arguments(self, config: TrainingConfig) -> Sequence[Any]:
        return config, self._home


class RayPlace:
    """An actor that is a replica.

    Raises:
        ClusterError: The cluster is gone.
    """

    def __init__(self, driver: RayDriver, cpus: int, gpus: int, inbox: Inbox, shipping: ShippedOnce) -> None:
        self.number, self._driver, self._inbox = next(driver.numbers), driver, inbox
        self.name, self._shipping = f"replica {self.number}", shipping
        driver.start("replica", self, cpus, gpus)

    def send(self, call: int, method: str, arguments: Sequence[Any]) -> None:
        self._driver.order("call", self.number, call, method, self._shipping(arguments))

    def interrupt(self) -> None:
        self._driver.order("interrupt", self.number)

    def end(self) -> None:
        self._driver.end(self)

    def hear(self, message: Any) -> None:
        """Pass on what the driver says of the actor."""
        match message:
            case bytes():
                self._inbox.put((self, arrived(message)))
            case ("at", where):
                self.name += f" ({where})"
            case _:
                self._inbox.put((self, message))


class RayLink:
    """A process that calls user functions, beside an actor with a core of its own; see `links.Link`.

    Raises:
        ClusterError: The cluster is gone.
    """

    patience = PATIENCE

    def __init__(self, driver: RayDriver, inbox: links.Inbox) -> None:
        self.number, self.lack, self._driver, self._inbox = next(driver.numbers), "", driver, inbox
        driver.start("scoring", self, 1, 0)

    def load(self, key: int, blob: bytes) -> None:
        self._driver.order("call", self.number, links.loading(key, blob), 1)

    def run(self, key: int, first: int, units: Sequence[links.Unit]) -> None:
        self._driver.order("call", self.number, links.calling(key, first, units), len(units))

    def kill(self) -> None:
        """Let it be ended; the cluster does so soon."""
        self._driver.end(self)

    def hear(self, message: Any) -> None:
        """Pass on what the driver says of the process, or of its actor."""
        match message:
            case bytes():
                self._inbox.put((self, json.loads(message)))
            case ("waiting", lack):
                self.lack = lack
            case ("at", _):
                self.lack = ""
            case ("lost", reason):
                self._inbox.put((self, reason))
