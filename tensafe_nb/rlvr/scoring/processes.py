"""The pool that calls user functions: processes that can be killed, each call within a time limit.

A hung call cannot be interrupted, only its process ended; `ProcessPoolExecutor` cannot do that.
"""

import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from tensafe_nb.display import as_given
from tensafe_nb.errors import ClientClosedError, RewardError, ValidationError
from tensafe_nb.rlvr.rewards.conventions import Call, RewardSample, Verdict, failed
from tensafe_nb.rlvr.scoring.links import (
    Inbox,
    Link,
    Message,
    ProcessLink,
    ScoringCluster,
    StartLink,
    ThreadLink,
    Unit,
)
from tensafe_nb.rlvr.scoring.shipping import shipped

GIVE_UP = 8  # calls in a row that hang or kill their process, with no other between
TRIES = 3  # times in a row that all processes of a cluster may be lost with their machines
Modules: TypeAlias = Mapping[str, "frozenset[str] | None"]
NOTHING: Modules = MappingProxyType({})
MAX_PROCESSES = 4
CHUNKS = 4  # per process: small enough to share the work evenly, large enough to write little


@dataclass(frozen=True, slots=True)
class Crew:
    """The processes that call user functions.

    Attributes:
        many: How many there are at most; they start when there is work.
        start: Starts one.
    """

    many: int
    start: StartLink = ProcessLink


def crew_of(whose: str, processes: int | None, cluster: Any) -> Crew:
    """Return the processes that were asked for: of a cluster, else of this machine.

    Args:
        whose: Keywords begin with it in what is refused: "RLVRTrainer: reward_".
        processes: How many at most; by default as many as there are cores, and no more than four, which it is on a
            cluster.
        cluster: Where they are; None for this machine.

    Raises:
        ValidationError: No number of processes, or no cluster.
    """
    if processes is not None and processes < 1:
        raise ValidationError(f"{whose}processes={as_given(processes)} must be at least 1.")
    if cluster is None:
        return Crew(processes or most_processes())
    if isinstance(cluster, type) or not isinstance(cluster, ScoringCluster):
        raise ValidationError(
            f'{whose}cluster={as_given(cluster)}: give RayCluster("auto"), or None for processes of this machine.'
        )
    return Crew(processes or MAX_PROCESSES, cluster.start_scoring)


def most_processes() -> int:
    """Return how many processes of this machine call functions at most: one for each core, and no more than four."""
    ours = hasattr(os, "sched_getaffinity")  # the cores that this process may use, where the system says so
    cores = len(os.sched_getaffinity(0)) if ours else os.cpu_count() or 1
    return min(cores, MAX_PROCESSES)


class CannotShip(Exception):  # never leaves this package: the scorer goes another way
    """A function cannot be sent to another process, or not be loaded there."""


@dataclass(eq=False, slots=True)
class RewardWorker:
    """A link, and what it is doing."""

    link: Link
    loaded: set[int] = field(default_factory=set)
    loading: int | None = None  # the function it is loading
    under_way: deque[int] = field(default_factory=deque)
    since: float = 0.0

    @property
    def busy(self) -> bool:
        return self.loading is not None or bool(self.under_way)

    def deadline(self, timeout: float) -> float:
        """Return when what it does has taken too long, on the monotonic clock."""
        return self.since + (self.link.patience if self.loading is not None else timeout)

    def give(self, round_: "Round", blob: bytes) -> None:
        """Let it load the round's function, or, where it has that, call it on the next rollouts that wait."""
        self.since = time.monotonic()
        if round_.key not in self.loaded:
            self.loading = round_.key
            self.link.load(round_.key, blob)
            return
        chunk = round_.waiting.popleft()
        self.under_way.extend(chunk)
        try:
            self.link.run(round_.key, chunk.start, [round_.units[index] for index in chunk])
        except Exception as error:  # noqa: BLE001  # pickling the prompts' columns may raise anything
            self.under_way.clear()
            text = f"the prompt's columns cannot be sent: {error}"
            for index in chunk:
                round_.fail(index, failed(error)._replace(error=text))


class Round:
    """The calls of one round: which wait, and what came of the others."""

    def __init__(self, key: int, units: Sequence[Unit], processes: int) -> None:
        self.key, self.units = key, units
        self.outcomes: list[list[Verdict] | None] = [None] * len(units)
        size = max(1, -(-len(units) // (CHUNKS * processes)))
        self.waiting = deque(
            range(start, min(start + size, len(units))) for start in range(0, len(units), size)
        )
        self.open = len(units)
        self.lost = 0  # calls in a row that hung or killed their process
        self.gone = 0  # processes in a row that were lost with their machines

    def settle(self, index: int, outcomes: list[Verdict]) -> None:
        self.outcomes[index] = outcomes
        self.open -= 1

    def fail(self, index: int, outcome: Verdict) -> None:
        self.settle(index, [outcome] * len(self.units[index]))


class RewardPool:
    """Makes the calls of user functions, each within a time limit, and returns outcomes in order.

    Args:
        timeout: Seconds a call may take.
        crew: The processes; None uses a thread of this one: a hung call is given up, but goes on.
    """

    def __init__(self, timeout: float, crew: Crew | None) -> None:
        self._timeout, self._crew = timeout, crew
        self._processes = 1 if crew is None else crew.many
        self._calls: list[Call] = []
        self._blobs: list[bytes] = []
        self._inbox: Inbox = queue.SimpleQueue()
        self._workers: dict[Link, RewardWorker] = {}
        self._lock = threading.Lock()
        self._closed = False

    def add(self, call: Call, modules: Modules = NOTHING) -> int:
        """Take on a function, as it is now, and return its number.

        Args:
            call: How to call it.
            modules: The user's modules it reaches, as `Identity.modules` has them.

        Raises:
            CannotShip: It cannot be pickled.
        """
        try:
            blob = b"" if self._crew is None else shipped(call, modules)
        except Exception as error:  # pickling user objects may raise anything
            raise CannotShip(f"{type(error).__name__}: {error}") from error
        self._calls.append(call)
        self._blobs.append(blob)
        return len(self._calls) - 1

    def forget(self, key: int) -> None:
        """Take a function on no more; its number stays its own."""
        self._blobs[key] = b""

    def evaluate(self, key: int, samples: Sequence[RewardSample]) -> list[Verdict]:
        """Call function number `key` on all samples.

        Raises:
            ClientClosedError: The pool was closed meanwhile.
            CannotShip: The function could not be loaded in its process.
            RewardError: The process died while it loaded the function, or the cluster has no room for it.
            ClusterError: The cluster is gone.
        """
        with self._lock:
            self.catch_up()
            round_ = Round(key, self._calls[key].units(samples), self._processes)
            try:
                while round_.open:
                    self.feed(round_)
                    self.listen(round_)
            except BaseException:  # interrupted: no late answer may reach the next round
                self._end_all()
                raise
            return [outcome for unit in round_.outcomes for outcome in unit or ()]

    def close(self) -> None:
        """End all processes, also in the middle of a round. Again: nothing."""
        self._closed = True
        for link in list(self._workers):
            link.kill()
        with self._lock:  # a round that was under way has seen it
            self._end_all()

    def _end_all(self) -> None:
        for worker in self._workers.values():
            worker.link.kill()
            if isinstance(worker.link, ThreadLink) and not worker.busy:
                worker.link.join()
        self._workers.clear()

    def catch_up(self) -> None:
        """Hear what happened between rounds: a process was ready, or ended, and took no call with it."""
        while not self._inbox.empty():
            link, message = self._inbox.get()
            if link in self._workers and isinstance(message, list) and message[1] is None:
                self._loaded(self._workers[link], message)
            elif link in self._workers:
                del self._workers[link]
                link.kill()

    def feed(self, round_: Round) -> None:
        """Give work to whoever is idle, and start as many more workers as there is work for.

        Raises:
            ClientClosedError: The pool was closed meanwhile.
            RewardError: No process could be started.
        """
        if self._closed:
            raise ClientClosedError("The scorer was closed while it scored. Make a new Scorer to go on.")
        idle = [worker for worker in self._workers.values() if not worker.busy]
        more = min(len(round_.waiting) - len(idle), self._processes - len(self._workers))
        for worker in [*idle, *(self.start() for _ in range(more))]:
            if round_.waiting:
                worker.give(round_, self._blobs[round_.key])

    def start(self) -> RewardWorker:
        """Start a worker.

        Raises:
            RewardError: The operating system refuses.
        """
        link: Link
        try:
            crew = self._crew
            link = ThreadLink(self._inbox, self._calls) if crew is None else crew.start(self._inbox)
        except OSError as error:
            raise RewardError(
                f"No process could be started for the reward function ({sys.executable}: {error})."
            ) from error
        worker = self._workers[link] = RewardWorker(link)
        return worker

    def listen(self, round_: Round) -> None:
        """Take in one answer, or find out who has run out of time."""
        busy = [worker for worker in self._workers.values() if worker.busy]
        if not busy:
            return
        patience = min(worker.deadline(self._timeout) for worker in busy) - time.monotonic()
        try:
            link, message = self._inbox.get(timeout=max(patience, 0.0))
        except queue.Empty:
            for worker in busy:
                if worker.deadline(self._timeout) > time.monotonic():
                    continue
                if worker.link.lack and any(other.loaded for other in busy):  # it may wait; the others go on
                    worker.since = time.monotonic()
                    continue
                late = Verdict(error=f"took longer than {self._timeout:g} s and was ended", timed_out=True)
                self._lose(worker, round_, late, not_loaded("reward function", worker.link))
            return
        if link in self._workers:
            self.take(self._workers[link], message, round_)

    def take(self, worker: RewardWorker, message: Message, round_: Round) -> None:
        """Take in what a worker says: that it has loaded a function, what a call gave, or nothing, for it is dead."""
        if isinstance(message, str):
            if not self._closed:
                self._lose(worker, round_, None, message)
        elif message is None:
            if not self._closed:
                dead = Verdict(error="the process that scores ended during this call")
                what = "The process that scores ended while it loaded the reward function; see its output."
                self._lose(worker, round_, dead, what)
        elif message[0] == "loaded":
            self._loaded(worker, message)
        else:
            worker.under_way.popleft()
            worker.since, round_.lost, round_.gone = time.monotonic(), 0, 0
            round_.settle(message[0], [Verdict(*outcome) for outcome in message[1]])

    def _loaded(self, worker: RewardWorker, message: list[Any]) -> None:
        assert worker.loading is not None
        if message[1] is not None:
            raise CannotShip(message[1])
        worker.loaded.add(worker.loading)
        worker.loading = None

    def _lose(self, worker: RewardWorker, round_: Round, outcome: Verdict | None, why: str) -> None:
        """End a worker that hangs or is dead; its call has this outcome, and after eight in a row all others.

        A machine that is lost is not the fault of what it was doing: without an outcome, all is called again elsewhere.
        """
        if worker.under_way and outcome is not None:
            round_.fail(worker.under_way.popleft(), outcome)
            round_.lost += 1
        del self._workers[worker.link]
        worker.link.kill()
        if outcome is None:
            round_.gone += 1
            if round_.gone >= TRIES * self._processes:
                raise RewardError(machines_lost(round_.gone, why))
        elif worker.loading is not None:
            raise RewardError(why)
        if worker.under_way:  # what it had not come to goes back to the head of the queue
            round_.waiting.appendleft(range(worker.under_way[0], worker.under_way[-1] + 1))
        if round_.lost >= GIVE_UP and outcome is not None:
            text = f"not called: {round_.lost} calls in a row were lost, the last of them: {outcome.error}"
            for index in [index for chunk in round_.waiting for index in chunk]:
                round_.fail(index, Verdict(error=text))
            round_.waiting.clear()


def not_loaded(what: str, link: Link) -> str:
    """Say that a function was not loaded in time, and what is known of why."""
    known = f" Its process has not begun: {link.lack}. Make room for it." if link.lack else ""
    return f"The {what} was not loaded after {link.patience:g} s.{known}"


def machines_lost(many: int, why: str) -> str:
    """Say that a cluster loses what is started there."""
    return (
        f"{many} processes in a row were lost with their machines of the cluster, the last of them: {why}. Look at "
        f"the cluster, or leave reward_cluster out: then this machine does it."
    )
