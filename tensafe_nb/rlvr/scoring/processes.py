"""Where user functions are called: in processes of ours that can be killed, each call within a time limit.

A hung call cannot be interrupted, only its process ended; `ProcessPoolExecutor` cannot do that.
"""

import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from tensafe_nb.errors import ClientClosedError, RewardError
from tensafe_nb.rlvr.rewards.conventions import Call, Outcome, RewardSample, failed
from tensafe_nb.rlvr.scoring.links import Inbox, Link, Message, ProcessLink, ThreadLink, Unit
from tensafe_nb.rlvr.scoring.shipping import shipped

LOAD_SECONDS = 60.0  # to start a process and import what a function needs
GIVE_UP = 8  # calls in a row that hang or kill their process, with no other between
Modules: TypeAlias = Mapping[str, "frozenset[str] | None"]
NOTHING: Modules = MappingProxyType({})
CHUNKS = 4  # per process: small enough to share the work evenly, large enough to write little


class CannotShip(Exception):  # never leaves this package: the scorer goes another way
    """A function cannot be sent to another process, or not be loaded there."""


@dataclass(eq=False, slots=True)
class _Worker:
    """A link, and what it is doing."""

    link: Link
    loaded: set[int] = field(default_factory=set)
    loading: int | None = None  # the function it is loading
    under_way: deque[int] = field(default_factory=deque)
    since: float = 0.0

    @property
    def busy(self) -> bool:
        return self.loading is not None or bool(self.under_way)


class _Job:
    """The calls of one round: which wait, and what came of the others."""

    def __init__(self, key: int, units: Sequence[Unit], processes: int) -> None:
        self.key, self.units = key, units
        self.outcomes: list[list[Outcome] | None] = [None] * len(units)
        size = max(1, -(-len(units) // (CHUNKS * processes)))
        self.waiting = deque(
            range(start, min(start + size, len(units))) for start in range(0, len(units), size)
        )
        self.open = len(units)
        self.lost = 0  # calls in a row that hung or killed their process

    def settle(self, index: int, outcomes: list[Outcome]) -> None:
        self.outcomes[index] = outcomes
        self.open -= 1

    def fail(self, index: int, outcome: Outcome) -> None:
        self.settle(index, [outcome] * len(self.units[index]))


class RewardPool:
    """Makes the calls of user functions, each within a time limit, and returns outcomes in order.

    Args:
        timeout: Seconds a call may take.
        processes: How many at most; they start when there is work.
        in_process: Use a thread of this process: a hung call is given up, but goes on.
    """

    def __init__(self, timeout: float, processes: int, in_process: bool = False) -> None:
        self._timeout, self._in_process = timeout, in_process
        self._processes = 1 if in_process else processes
        self._calls: list[Call] = []
        self._blobs: list[bytes] = []
        self._inbox: Inbox = queue.SimpleQueue()
        self._workers: dict[Link, _Worker] = {}
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
        blob = b"" if self._in_process else _shipped(call, modules)
        self._calls.append(call)
        self._blobs.append(blob)
        return len(self._calls) - 1

    def forget(self, key: int) -> None:
        """Take a function on no more; its number stays its own."""
        self._blobs[key] = b""

    def evaluate(self, key: int, samples: Sequence[RewardSample]) -> list[Outcome]:
        """Call function number `key` on all samples.

        Raises:
            ClientClosedError: The pool was closed meanwhile.
            CannotShip: The function could not be loaded in its process.
            RewardError: The process died while it loaded the function.
        """
        with self._lock:
            self._catch_up()
            job = _Job(key, self._calls[key].units(samples), self._processes)
            try:
                while job.open:
                    self._feed(job)
                    self._listen(job)
            except BaseException:  # interrupted: no late answer may reach the next round
                self._end_all()
                raise
            return [outcome for unit in job.outcomes for outcome in unit or ()]

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

    def _catch_up(self) -> None:
        """Hear what happened between rounds: a process was ready, or ended, and took no call with it."""
        while not self._inbox.empty():
            link, message = self._inbox.get()
            if link in self._workers and message is not None and message[1] is None:
                self._loaded(self._workers[link], message)
            elif link in self._workers:
                del self._workers[link]
                link.kill()

    def _feed(self, job: _Job) -> None:
        if self._closed:
            raise ClientClosedError("The scorer was closed while it scored. Make a new Scorer to go on.")
        idle = [worker for worker in self._workers.values() if not worker.busy]
        more = min(len(job.waiting) - len(idle), self._processes - len(self._workers))
        for worker in [*idle, *(self._start() for _ in range(more))]:
            if job.waiting:
                self._assign(worker, job)

    def _start(self) -> _Worker:
        link: Link
        try:
            link = ThreadLink(self._inbox, self._calls) if self._in_process else ProcessLink(self._inbox)
        except OSError as error:
            raise RewardError(
                f"No process could be started for the reward function ({sys.executable}: {error})."
            ) from error
        worker = self._workers[link] = _Worker(link)
        return worker

    def _assign(self, worker: _Worker, job: _Job) -> None:
        worker.since = time.monotonic()
        if job.key not in worker.loaded:
            worker.loading = job.key
            worker.link.load(job.key, self._blobs[job.key])
            return
        chunk = job.waiting.popleft()
        worker.under_way.extend(chunk)
        try:
            worker.link.run(job.key, chunk.start, [job.units[index] for index in chunk])
        except Exception as error:  # noqa: BLE001  # pickling the prompts' columns may raise anything
            worker.under_way.clear()
            for index in chunk:
                job.fail(index, failed(error)._replace(error=f"the prompt's columns cannot be sent: {error}"))

    def _listen(self, job: _Job) -> None:
        """Take in one answer, or find out who has run out of time."""
        busy = [worker for worker in self._workers.values() if worker.busy]
        if not busy:
            return
        patience = min(map(self._deadline, busy)) - time.monotonic()
        try:
            link, message = self._inbox.get(timeout=max(patience, 0.0))
        except queue.Empty:
            for worker in busy:
                if self._deadline(worker) <= time.monotonic():
                    self._overdue(worker, job)
            return
        if link in self._workers:
            self._take(self._workers[link], message, job)

    def _deadline(self, worker: _Worker) -> float:
        return worker.since + (LOAD_SECONDS if worker.loading is not None else self._timeout)

    def _take(self, worker: _Worker, message: Message, job: _Job) -> None:
        if message is None:
            self._died(worker, job)
        elif message[0] == "loaded":
            self._loaded(worker, message)
        else:
            worker.under_way.popleft()
            worker.since, job.lost = time.monotonic(), 0
            job.settle(message[0], [Outcome(*outcome) for outcome in message[1]])

    def _loaded(self, worker: _Worker, message: list[Any]) -> None:
        assert worker.loading is not None
        if message[1] is not None:
            raise CannotShip(message[1])
        worker.loaded.add(worker.loading)
        worker.loading = None

    def _died(self, worker: _Worker, job: _Job) -> None:
        if self._closed:
            return
        if worker.loading is not None:
            self._drop(worker, job)
            raise RewardError(
                "The process that scores ended while it loaded the reward function; see its output."
            )
        self._lose(worker, job, Outcome(error="the process that scores ended during this call"))

    def _overdue(self, worker: _Worker, job: _Job) -> None:
        if worker.loading is not None:
            self._drop(worker, job)
            raise RewardError(f"The reward function was not loaded after {LOAD_SECONDS:g} s.")
        text = f"took longer than {self._timeout:g} s and was ended"
        self._lose(worker, job, Outcome(error=text, timed_out=True))

    def _lose(self, worker: _Worker, job: _Job, outcome: Outcome) -> None:
        if worker.under_way:
            job.fail(worker.under_way.popleft(), outcome)
            job.lost += 1
        self._drop(worker, job)
        if job.lost >= GIVE_UP:
            text = f"not called: {job.lost} calls in a row were lost, the last of them: {outcome.error}"
            for index in [index for chunk in job.waiting for index in chunk]:
                job.fail(index, Outcome(error=text))
            job.waiting.clear()

    def _drop(self, worker: _Worker, job: _Job) -> None:
        """End a worker; the calls it had not come to go back to the head of the queue."""
        del self._workers[worker.link]
        worker.link.kill()
        if worker.under_way:
            job.waiting.appendleft(range(worker.under_way[0], worker.under_way[-1] + 1))


def _shipped(call: Call, modules: Modules) -> bytes:
    try:
        return shipped(call, modules)
    except Exception as error:  # pickling user objects may raise anything
        raise CannotShip(f"{type(error).__name__}: {error}") from error
