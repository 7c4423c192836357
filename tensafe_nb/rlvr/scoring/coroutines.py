"""The pool that awaits coroutine functions: many at a time, on the lasting loop, never on the notebook's.

They stay in this process, so that they can use the clients and sessions they close over.
"""

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from tensafe_nb.errors import ClientClosedError
from tensafe_nb.rlvr.rewards.conventions import Call, RewardSample, Verdict, awaited_outcomes
from tensafe_nb.rlvr.scoring.lasting import LOOP
from tensafe_nb.rlvr.scoring.processes import NOTHING, Modules

AT_ONCE = 32  # calls under way: what a judge behind an API bears


class CoroutinePool:
    """Awaits the calls of coroutine functions, each within a time limit, and returns outcomes in order.

    Args:
        timeout: Seconds a call may take.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._calls: list[Call] = []
        self._lock = threading.Lock()
        self._round: Future[Any] | None = None
        self._closed = False

    def add(self, call: Call, modules: Modules = NOTHING) -> int:
        """Take on a coroutine function and return its number."""
        self._calls.append(call)
        return len(self._calls) - 1

    def forget(self, key: int) -> None:
        """Keep what costs nothing."""

    def evaluate(self, key: int, samples: Sequence[RewardSample]) -> list[Verdict]:
        """Await function number `key` on all samples.

        Raises:
            ClientClosedError: The pool was closed meanwhile.
        """
        call = self._calls[key]
        units = call.units(samples)
        outcomes: list[list[Verdict] | None] = [None] * len(units)
        free = asyncio.Semaphore(AT_ONCE)

        async def one(index: int) -> None:
            async with contextlib.nullcontext() if call.limits_itself else free:
                outcomes[index] = await self.within_limit(call, units[index])

        async def every() -> None:
            await asyncio.gather(*(one(index) for index in range(len(units))))

        with self._lock:
            self._round, loop = LOOP.submit(every())
            try:
                self.wait_for(self._round, loop)
            finally:
                self._round.cancel()
            if self._closed:
                raise ClientClosedError("The scorer was closed while it scored. Make a new Scorer to go on.")
        text = f"blocked its event loop for longer than {self._timeout:g} s: it must await, not wait"
        blocked = Verdict(error=text, timed_out=True)
        done = [given or [blocked] * len(unit) for given, unit in zip(outcomes, units, strict=True)]
        return [outcome for unit in done for outcome in unit]

    def close(self) -> None:
        """Cancel what is awaited. Again: nothing."""
        self._closed = True
        if self._round is not None:
            self._round.cancel()

    async def within_limit(self, call: Call, unit: Sequence[RewardSample]) -> list[Verdict]:
        """Await one call, and cancel it after the time limit."""
        awaited = asyncio.ensure_future(awaited_outcomes(call, unit))
        try:
            limit = None if call.limits_itself else self._timeout
            done, _ = await asyncio.wait([awaited], timeout=limit)
        finally:
            awaited.cancel()
        if awaited.cancelled():
            return [Verdict(error="the call was cancelled by itself")] * len(unit)
        if done:
            return awaited.result()
        text = f"took longer than {self._timeout:g} s and was cancelled"
        return [Verdict(error=text, timed_out=True)] * len(unit)

    def wait_for(self, round_: "Future[Any]", loop: asyncio.AbstractEventLoop) -> None:
        """Wait for a round as long as its loop answers; a blocked loop is left behind."""
        settled = threading.Event()
        round_.add_done_callback(lambda _: settled.set())
        while not settled.wait(self._timeout):
            alive = threading.Event()
            loop.call_soon_threadsafe(alive.set)
            if not alive.wait(self._timeout):
                LOOP.leave(loop)
                return
