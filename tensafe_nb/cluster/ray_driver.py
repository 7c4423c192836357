"""The driver: the process that is connected to a Ray cluster, and does there what another asks through a pipe.

The only file that imports Ray, and a program: Ray ends the process whose cluster is gone, takes over its signals and
hands its environment on, and none of that shall happen to a notebook. When the notebook ends, however it does, the
driver leaves the cluster in order, and a Ray that was started here ends with it.
"""

import asyncio
import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import cloudpickle  # type: ignore[import-untyped, unused-ignore]
import ray
from ray.exceptions import RayError

from tensafe_nb.cluster.frames import read_frame, write_frame
from tensafe_nb.rlvr.scoring.child import end_with, take_pipes
from tensafe_nb.rlvr.scoring.links import Inbox, ProcessLink
from tensafe_nb.rlvr.scoring.shipping import arrived, shipped

ENDS = ("answer", "error")
STARTS = 2  # of a Ray here, before it counts as one that does not start
STARTING = 90.0  # seconds for its processes: Ray gives them 30, which a busy machine may need longer for
PATIENCE = 5.0  # seconds that an actor may take to start before it is asked what it lacks
LONGEST = 300  # characters of a cause
JOINING, LEAVING = 240, 20  # seconds to be connected to a cluster, and to leave it in order


class RayReplica:
    """A replica on whichever machine Ray has found for it.

    Args:
        threads: Of torch.
        gpus: How many it has.
    """

    def __init__(self, threads: int, gpus: int) -> None:
        end_with(os.getppid())  # else it looks for its cluster for a minute
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._messages: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self._work: queue.SimpleQueue[tuple[int, str, bytes]] = queue.SimpleQueue()
        self._replica: Any = None
        # One thread for all calls: what torch keeps for a thread it keeps once. It is imported there, too: an actor
        # that has found its machine says so at once.
        threading.Thread(target=self._serve, args=(threads,), daemon=True).start()

    def _serve(self, threads: int) -> None:
        try:
            import torch

            from tensafe_nb.cluster.replica import Replica

            torch.set_num_threads(threads)
            self._replica = Replica(lambda message: self._messages.put((message[0], shipped(message))))
            while True:
                call, method, arguments = self._work.get()
                self._replica.do(call, method, arrived(arguments))
        finally:
            os._exit(1)  # whoever waits for an answer shall know that none comes

    def where(self) -> str:
        """Return where it is, for people."""
        return f"{socket.gethostname()}, process {os.getpid()}"

    def do(self, call: int, method: str, arguments: bytes) -> Iterator[bytes]:
        """Carry out a call; yield its messages, the last of which says how it ended."""
        self._work.put((call, method, arguments))
        kind = ""
        while kind not in ENDS:
            kind, message = self._messages.get()
            yield message

    def interrupt(self) -> None:
        """Let what is being asked end soon."""
        if self._replica is not None:
            self._replica.interrupt()


class RayScoring:
    """Has a process beside it that calls user functions: one that brings it down costs its call, not this actor."""

    def __init__(self) -> None:
        end_with(os.getppid())
        self._inbox: Inbox = queue.SimpleQueue()
        self._link = ProcessLink(self._inbox)

    def where(self) -> str:
        """Return where it is, for people."""
        return f"{socket.gethostname()}, process {os.getpid()}"

    def do(self, request: bytes, answers: int) -> Iterator[bytes]:
        """Pass a request on; yield its answers as JSON, and null once the process has ended."""
        self._link.write(request)
        message: Any = []
        while answers and message is not None:
            _, message = self._inbox.get()
            answers -= 1
            yield json.dumps(message).encode()

    def finish(self) -> None:
        """End the process, and what it has started."""
        self._link.kill()


ACTORS: dict[str, Any] = {
    kind: ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"control": 1})(actor)
    for kind, actor in (("replica", RayReplica), ("scoring", RayScoring))
}


class Listener:
    """An actor, and what listens to it.

    Args:
        driver: Whose it is.
        number: Its own.
        kind: Which of `ACTORS`.
        cpus: Cores it is given; on a Ray that was started here they are shared.
        gpus: GPUs it is given.
    """

    def __init__(self, driver: "Driver", number: int, kind: str, cpus: int, gpus: int) -> None:
        self._driver, self._number, self._kind, self._begun = driver, number, kind, False
        self._wants = {"CPU": 0 if driver.shared else cpus, "GPU": gpus}
        given: dict[str, Any] = {"num_cpus": self._wants["CPU"], "num_gpus": gpus}
        if kind == "scoring":
            self._actor = ACTORS[kind].options(**given, scheduling_strategy="SPREAD").remote()
        else:
            self._actor = ACTORS[kind].options(**given).remote(cpus, gpus)
        self._calls: asyncio.Queue[Any] = asyncio.Queue()
        self.task = asyncio.create_task(self.listen())

    def call(self, *arguments: Any) -> None:
        """Let the actor carry out a call, behind those before it."""
        self._calls.put_nowait(self._actor.do.options(num_returns="streaming").remote(*arguments))

    def interrupt(self) -> None:
        """Let it end what it is asked soon."""
        self._actor.interrupt.options(concurrency_group="control").remote()

    async def listen(self) -> None:
        """Tell what the actor says until it is gone, and then its end."""
        try:
            self._tell(("at", await self._started()))
            self._begun = True
            while True:
                async for message in await self._calls.get():
                    self._tell(await message)
        except (RayError, OSError, RuntimeError) as error:
            self._tell(("lost", in_short(error)))

    async def _started(self) -> str:
        """Wait until it has begun; say what is missing for that, if it takes long."""
        where = asyncio.ensure_future(self._actor.where.remote())
        told = ""
        while not (await asyncio.wait([where], timeout=PATIENCE))[0]:
            lack = await asyncio.to_thread(lacking, self._wants)
            if lack and lack != told:
                told = lack
                self._tell(("waiting", lack))
        return str(where.result())

    def _tell(self, message: Any) -> None:
        self._driver.tell((self._number, message))

    async def end(self) -> None:
        """End the actor, and hear nothing more of it: Ray waits for good for one that is killed before it began."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        with contextlib.suppress(RayError, RuntimeError):
            if self._begun and self._kind == "scoring":
                finishing = self._actor.finish.options(concurrency_group="control").remote()
                await asyncio.wait([asyncio.ensure_future(finishing)], timeout=PATIENCE)
            ray.kill(self._actor, no_restart=True)


def lacking(wants: dict[str, int]) -> str:
    """Say what a cluster lacks to start an actor; "" if it is slow only."""
    there, free = ray.cluster_resources(), ray.available_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    short = [name for name, many in wants.items() if many > free.get(name, 0)]
    wanted = " and ".join(f"{many} {name}" for name, many in wants.items() if many)
    has = ", ".join(f"{free.get(name, 0):g} of {there.get(name, 0):g} {name}" for name in wants)
    if not any(all(many <= node.get(name, 0) for name, many in wants.items()) for node in nodes):
        return f"it wants {wanted} on one machine, and no machine of the cluster has as much"
    return f"it wants {wanted}; free in the whole cluster: {has}" if short else ""


class Driver:
    """Does what comes through the pipe, and tells through the other what the actors say.

    Args:
        answers: Takes frames, each a pickled (number of an actor, message); what an actor says is shipped bytes.
        parent: The process that asks.
        shared: Actors share the cores of this machine.
    """

    def __init__(self, answers: BinaryIO, parent: int, shared: bool) -> None:
        self._answers, self._parent, self.shared = answers, parent, shared
        self._listeners: dict[int, Listener] = {}
        self._ends: set[asyncio.Task[None]] = set()

    def tell(self, message: Any) -> None:
        """Pass a message on; nobody may be there any more to read it."""
        with contextlib.suppress(OSError):
            write_frame(self._answers, cloudpickle.dumps(message))

    async def serve(self, requests: BinaryIO) -> None:
        """Serve until the requests end, or SIGTERM comes."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def end(
            *_: Any,
        ) -> None:  # it comes again and again, once for each thread of the process that has ended
            if not loop.is_closed():
                loop.call_soon_threadsafe(ended.set)

        signal.signal(signal.SIGTERM, end)
        end_with(self._parent, signal.SIGTERM)

        def read() -> None:
            while (frame := read_frame(requests)) is not None:
                loop.call_soon_threadsafe(self._obey, *cloudpickle.loads(frame))
            end()

        threading.Thread(target=read, daemon=True).start()
        await ended.wait()
        signal.alarm(2 * LEAVING)
        for number in list(self._listeners):
            self._obey("end", number)
        await asyncio.gather(*self._ends, return_exceptions=True)

    def _obey(self, order: str, number: int, *arguments: Any) -> None:
        try:
            if order == "start":
                self._listeners[number] = Listener(self, number, *arguments)
            elif order == "end":
                if number in self._listeners:
                    ending = asyncio.create_task(self._listeners.pop(number).end())
                    self._ends.add(ending)
                    ending.add_done_callback(self._ends.discard)
            elif number in self._listeners:
                getattr(self._listeners[number], order)(*arguments)
        except Exception as error:  # noqa: BLE001  # of Ray's, whatever it is: that actor answers no more
            self.tell((number, ("lost", in_short(error))))


def connect(address: str, folder: str) -> None:
    """Connect this process to a Ray cluster, or start one on this machine ("local").

    Raises:
        Exception: What Ray raises: OSError, ValueError, RuntimeError, and plain Exception.
    """
    usual: dict[str, Any] = {"log_to_driver": False, "configure_logging": False, "namespace": "tensafe_nb"}
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address != "local":
        if address != "auto":  # where nothing is, Ray tries again and again
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
        ray.init(address=address, **usual)
        return
    usual |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "_temp_dir": folder}
    with contextlib.suppress(AttributeError):  # a Ray without it is as patient as it is
        ray._private.services.get_node = patient(ray._private.services.get_node)
    for attempt in range(1, STARTS + 1):
        try:
            ray.init(address="local", num_cpus=0, **usual)  # no worker before there is an actor
            return
        except Exception:
            ray.shutdown()
            if attempt == STARTS:
                raise


def patient(look: Callable[..., Any]) -> Callable[..., Any]:
    """Let a look for something that is still starting take longer."""

    def wait(*given: Any, **more: Any) -> Any:
        until = time.monotonic() + STARTING
        while True:
            try:
                return look(*given, **more)
            except RuntimeError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    return wait


def leave(folder: str) -> None:
    """Leave the cluster, and end what a Ray of this machine may have left, and this process."""
    import psutil  # type: ignore[import-untyped, unused-ignore]  # Ray brings it along

    signal.alarm(2 * LEAVING)
    own = psutil.Process().children(recursive=True)
    leaving = threading.Thread(target=ray.shutdown, daemon=True)
    leaving.start()
    leaving.join(LEAVING)
    for process in own:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(own, timeout=LEAVING)  # one that still writes would leave its files
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def in_short(error: BaseException) -> str:
    """Return the first line of what an error says, and the last, which is often the cause; or what it is."""
    lines = [line for line in map(str.strip, str(error).splitlines()) if line] or [type(error).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1][-LONGEST:]}"


def serve(parent: int, address: str, folder: str) -> None:
    """Be a driver until standard input ends: the program of the process, which is the first of its group."""
    end_with(parent)  # while Ray tries to connect it hears nothing
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt of the notebook is not ours
    requests, answers = take_pipes()
    driver = Driver(answers, parent, shared=address == "local")
    signal.alarm(JOINING)
    try:
        connect(address, folder)
    except Exception as error:  # noqa: BLE001  # whatever it is, whoever asked is to know
        driver.tell(("refused", in_short(error)))
    else:
        signal.alarm(0)
        driver.tell(("connected", ray.__version__))
        asyncio.run(driver.serve(requests))
    leave(folder)
