"""Replicas as actors of a Ray cluster: Ray places them, watches them and grows; it keeps nothing of ours.

The only file that imports Ray. Actors get no key, no vault and no token, and are not restarted by Ray: a new one takes
the state of a replica that is left, see `cluster.group`.
"""

import contextlib
import os
import queue
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from tensafe_nb.cluster.group import Inbox, Message
from tensafe_nb.cluster.local_places import SECRETS
from tensafe_nb.cluster.replica import Replica
from tensafe_nb.config import TrainingConfig
from tensafe_nb.errors import ClusterError
from tensafe_nb.rlvr.scoring.shipping import arrived, shipped

ENDS = ("answer", "error")
LOCAL_CORES = 1_000
LOOK_UP = 1.0  # seconds until whoever waits for an actor looks whether it is still wanted


class RayReplica:
    """A replica on whichever machine Ray has found for it."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._work: queue.SimpleQueue[tuple[int, str, bytes]] = queue.SimpleQueue()
        self._replica = Replica(self._messages.put)
        # one thread for all calls: what torch keeps for a thread it keeps once
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            call, method, arguments = self._work.get()
            self._replica.do(call, method, arrived(arguments))

    def where(self) -> str:
        """Return where it is, for people."""
        return f"{socket.gethostname()}, process {os.getpid()}"

    def do(self, call: int, method: str, arguments: bytes) -> Iterator[Message]:
        """Carry out a call; yield its messages, the last of which says how it ended."""
        self._work.put((call, method, arguments))
        while True:
            message = self._messages.get()
            yield message
            if message[0] in ENDS:
                return

    @ray.method(concurrency_group="control")
    def interrupt(self) -> None:
        """Let what is being asked end soon."""
        self._replica.interrupt()


Actor: Any = ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"control": 1})(RayReplica)  # type: ignore[call-overload]


class RayPlaces:
    """Actors of the Ray cluster that this process is connected to.

    Args:
        cpus: Cores for each.
        gpus: GPUs for each.
    """

    def __init__(self, cpus: int, gpus: int) -> None:
        self._cpus, self._gpus = cpus, gpus
        self._started = 0

    def start(self, inbox: Inbox) -> "RayPlace":
        if not ray.is_initialized():
            raise ClusterError(
                "This process has left its Ray cluster: create a new ServiceClient(cluster=…)."
            )
        self._started += 1
        actor = Actor.options(num_cpus=self._cpus, num_gpus=self._gpus).remote(self._cpus)
        return RayPlace(f"replica {self._started}", actor, inbox)

    def load_arguments(self, config: TrainingConfig) -> Sequence[Any]:
        return config, None  # converted models are in the home folder of whoever computes


class RayPlace:
    """An actor, and the thread that reads what it says."""

    def __init__(self, name: str, actor: Any, inbox: Inbox) -> None:
        self.name, self._actor, self._ended = name, actor, False
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._reader = threading.Thread(
            target=self.read, args=(inbox,), name="tsnb-replica-actor", daemon=True
        )
        self._reader.start()

    def send(self, call: int, method: str, arguments: Sequence[Any]) -> None:
        messages = self._actor.do.options(num_returns="streaming").remote(call, method, shipped(arguments))
        self._calls.put(messages)

    def interrupt(self) -> None:
        self._actor.interrupt.remote()

    def read(self, inbox: Inbox) -> None:
        """Pass messages on to the inbox until the actor is gone, and then its end."""
        try:
            self.name += f" ({self._arrived(self._actor.where.remote())})"
            while (messages := self._calls.get()) is not None:
                for message in messages:
                    if (told := self._arrived(message)) is None:
                        return
                    inbox.put((self, told))
        except (RayError, OSError, RuntimeError) as error:
            inbox.put((self, ("lost", str(error).strip().splitlines()[0])))

    def _arrived(self, message: Any) -> Any:
        """Return a message once it is here; None where nobody waits for it any more.

        Of an actor that is killed before it has begun, Ray waits for an answer for good.
        """
        while not self._ended:
            try:
                return ray.get(message, timeout=LOOK_UP)
            except GetTimeoutError:
                continue
        return None

    def end(self) -> None:
        self._ended = True
        if ray.is_initialized():  # else it has ended with Ray, which a call would look for again
            with contextlib.suppress(RayError, RuntimeError):
                ray.kill(self._actor, no_restart=True)
        self._calls.put(None)
        if threading.current_thread() is not self._reader:
            self._reader.join()


def connect(address: str) -> bool:
    """Connect this process to a Ray cluster, or start one here ("local"); return whether that was done now.

    Args:
        address: "auto", "local", or that of a head.

    Raises:
        ClusterError: There is none.
    """
    if ray.is_initialized():
        return False
    # what Ray starts inherits our environment, and it takes over the handler of SIGTERM
    hidden = {name: os.environ.pop(name) for name in SECRETS if name in os.environ}
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if main else None
    own: dict[str, Any] = {"address": address}
    if address == "local":
        # Ray lets no actor begin for which no core is left: here they share what there is
        own = {"include_dashboard": False, "num_cpus": LOCAL_CORES, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(**own, log_to_driver=False, configure_logging=False, namespace="tensafe_nb")
    except Exception as error:  # Ray raises its own, OSError, ValueError, and plain Exception
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ClusterError(
            f"Ray could not be started here: {reason} A machine that is very busy starts it too slowly: try again."
            if address == "local"
            else f"There is no Ray cluster at {address!r}: {reason} Start one with `ray start --head`, or take "
            f'RayCluster("local").'
        ) from error
    finally:
        os.environ.update(hidden)
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return True


def disconnect() -> None:
    """Leave the cluster; one that was started here ends."""
    ray.shutdown()
