"""Hosts of generators: where an environment's conversations live between turns, each turn within a time limit.

As rewards do: in processes that can be ended, on a thread of this one where the environment cannot be sent, on an
event loop where it is asynchronous, and here without a limit. A turn that hangs costs its own conversation only: the
others of its process are played again, in a new one, up to where they were.
"""

import asyncio
import queue
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from tensafe_nb.display import as_given
from tensafe_nb.errors import ClientClosedError, RewardError, ValidationError
from tensafe_nb.rlvr.environments.environment import Environment, RolloutEnded
from tensafe_nb.rlvr.environments.play import Host
from tensafe_nb.rlvr.environments.stage import (
    Cue,
    Reply,
    Stage,
    after_the_end,
    not_caught,
    outcome,
    told_or_over,
)
from tensafe_nb.rlvr.rewards.conventions import failed, number_of
from tensafe_nb.rlvr.scoring.coroutines import AT_ONCE, CoroutinePool
from tensafe_nb.rlvr.scoring.lasting import LOOP
from tensafe_nb.rlvr.scoring.links import Inbox, Link, Message, ThreadLink
from tensafe_nb.rlvr.scoring.processes import (
    GIVE_UP,
    TRIES,
    CannotShip,
    Crew,
    crew_of,
    machines_lost,
    not_loaded,
)
from tensafe_nb.rlvr.scoring.shipping import shipped

CLOSED = "The environment's processes were closed while it played. Play again to go on."


class HereHost:
    """Generators that live in this process and are called on this thread, without a limit.

    Args:
        stage: Where they live.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def play(self, cues: Sequence[Cue]) -> list[Reply]:
        """Give each cue."""
        return [self._stage.play(cue) for cue in cues]

    def close(self) -> None:
        """End nothing: there is nothing to end."""


@dataclass(slots=True, eq=False)
class House:
    """One process, and what it has been told and not answered yet.

    Attributes:
        link: The way to it; None before it has work.
        loaded: Whether it has the environment; None while it loads it.
        waiting: Cues to give, each with what it was answered before if it is given again.
        under_way: Cues that were given.
        since: When it last answered, on the monotonic clock.
    """

    link: Link | None = None
    loaded: bool | None = False
    waiting: deque[tuple[Cue, Reply | None]] = field(default_factory=deque)
    under_way: deque[tuple[Cue, Reply | None]] = field(default_factory=deque)
    since: float = 0.0

    @property
    def busy(self) -> bool:
        return self.loaded is None or bool(self.under_way)

    def deadline(self, timeout: float) -> float:
        return self.since + (self.link.patience if self.loaded is None and self.link else timeout)


class ProcessHost:
    """Generators that live in processes; which one, their number says.

    Args:
        stage: Where they live, in each process; as it is now.
        name: The environment's.
        blob: The stage, to be sent; None lets them live on threads of this process.
        timeout: Seconds a turn may take.
        crew: The processes.
    """

    def __init__(self, stage: Stage, name: str, blob: bytes | None, timeout: float, crew: Crew) -> None:
        self._stage, self._name, self._blob, self._timeout = stage, name, blob, timeout
        self._inbox: Inbox = queue.SimpleQueue()
        self._houses = [House() for _ in range(1 if blob is None else crew.many)]
        self._crew = crew
        # Of each conversation that goes on: its cues, and what they were answered.
        self._past: dict[int, list[tuple[Cue, Reply]]] = {}
        self._replies: dict[int, Reply] = {}
        self._wanted: set[int] = set()
        self._ended: dict[int, Reply] = {}  # conversations that were lost while nobody asked for them
        self._lost = 0  # turns in a row that hung or ended their process
        self._gone = 0  # processes in a row that were lost with their machines
        self._instead: ProcessHost | None = None
        self._lock = threading.Lock()
        self._closed = False

    def play(self, cues: Sequence[Cue]) -> list[Reply]:
        """Give each cue to the process of its conversation, and return the replies in order.

        Raises:
            ClientClosedError: The host was closed meanwhile.
            RewardError: No process could be started, or it ended while it loaded the environment.
        """
        if self._instead is not None:
            return self._instead.play(cues)
        with self._lock:
            self._replies, self._wanted, self._lost = {}, {cue.number for cue in cues}, 0
            try:
                while not self._inbox.empty():  # of what happened between rounds
                    self.listen()
                for cue in cues:
                    self.enter(cue)
                while self._wanted - self._replies.keys():
                    for house in self._houses:
                        self.feed(house)
                    self.listen()
            except CannotShip as reason:
                self._end_all()
                self._instead = on_a_thread(self._stage, self._name, self._timeout, reason)
            except BaseException:  # interrupted: no late reply may reach the next round
                self._end_all()
                raise
        if self._instead is not None:
            return self._instead.play(cues)
        return [self._replies[cue.number] for cue in cues]

    def enter(self, cue: Cue) -> None:
        """Let a cue wait for its process."""
        if cue.kind == "begin":
            self._past[cue.number] = []
            self._ended.pop(cue.number, None)
        if cue.number in self._ended:
            self._replies[cue.number] = self._ended.pop(cue.number)
        else:
            self.house_of(cue.number).waiting.append((cue, None))

    def close(self) -> None:
        """End all processes, also in the middle of a turn. Again: nothing."""
        self._closed = True
        if self._instead is not None:
            self._instead.close()
        for house in self._houses:
            if house.link is not None:
                house.link.kill()
        with self._lock:  # a round that was under way has seen it
            self._end_all()

    def _end_all(self) -> None:
        for house in self._houses:
            if house.link is not None:
                house.link.kill()
                if isinstance(house.link, ThreadLink) and not house.busy:
                    house.link.join()
        self._houses = [House() for _ in self._houses]
        self._past.clear()
        self._ended.clear()

    def house_of(self, number: int) -> House:
        """Return where a conversation lives."""
        return self._houses[number % len(self._houses)]

    def feed(self, house: House) -> None:
        """Give a process what waits for it; start it, and let it load the environment, where that is due.

        Raises:
            ClientClosedError: The host was closed meanwhile.
            RewardError: The operating system refuses a process.
        """
        if self._closed:
            raise ClientClosedError(CLOSED)
        if not house.waiting or house.busy:
            return
        house.since = time.monotonic()
        if house.link is None:
            house.link, house.loaded = self.start(), None
            house.link.load(0, self._blob or b"")
            return
        house.under_way, house.waiting = house.waiting, deque()
        try:
            house.link.run(0, 0, [list(cue) for cue, _ in house.under_way])
        except Exception as error:  # noqa: BLE001  # pickling the rows may raise anything
            text = f"the row's columns cannot be sent: {failed(error).error}"
            for cue, _ in house.under_way:
                self.settle(cue, Reply(error=text))
            house.under_way.clear()

    def start(self) -> Link:
        """Start a process, or a thread.

        Raises:
            RewardError: The operating system refuses.
        """
        try:
            if self._blob is None:
                return ThreadLink(self._inbox, [self._stage.again()])
            return self._crew.start(self._inbox)
        except OSError as error:
            raise RewardError(
                f"No process could be started for the environment ({sys.executable}: {error})."
            ) from error

    def listen(self) -> None:
        """Take in one message, or find out who has run out of time."""
        busy = [house for house in self._houses if house.busy]
        patience = min((house.deadline(self._timeout) for house in busy), default=0.0) - time.monotonic()
        try:
            link, message = self._inbox.get(timeout=min(max(patience, 0.0), threading.TIMEOUT_MAX))
        except queue.Empty:
            for house in busy:
                if house.deadline(self._timeout) <= time.monotonic():
                    late = Reply(error=f"took longer than {self._timeout:g} s and was ended", timed_out=True)
                    self.lose(house, late, not_loaded("environment", house.link) if house.link else "")
            return
        found = next((house for house in self._houses if house.link is link), None)
        if found is not None:
            self.take(found, message)

    def take(self, house: House, message: Message) -> None:
        """Take in what a process says: that it has loaded the environment, a reply, or nothing, for it is dead."""
        if message is None or isinstance(message, str):
            if self._closed:
                raise ClientClosedError(CLOSED)
            if message is not None:
                self.lose(house, None, message)
                return
            dead = Reply(error="the process of the environment ended during this turn")
            self.lose(house, dead, "The environment's process ended while it loaded it; see its output.")
        elif message[0] == "loaded":
            if message[1] is not None:
                raise CannotShip(message[1])
            house.loaded = True
        else:
            house.since, self._lost, self._gone = time.monotonic(), 0, 0
            cue, before = house.under_way.popleft()
            reply = Reply(*message[1])
            if before is None:
                self.settle(cue, reply)
            elif reply.told != before.told:
                text = "another conversation of its process had to be ended; played again, it told something else"
                self.give_up(house, cue.number, Reply(error=text))

    def settle(self, cue: Cue, reply: Reply) -> None:
        """Note what a cue was answered, and that the conversation goes on, or is over."""
        self._replies[cue.number] = reply
        if reply.over:
            self._past.pop(cue.number, None)
        else:
            self._past.setdefault(cue.number, []).append((cue, reply))

    def give_up(self, house: House, number: int, reply: Reply) -> None:
        """Let one conversation end with this reply, whatever else was to be said in it."""
        house.waiting = deque(item for item in house.waiting if item[0].number != number)
        if number not in self._wanted:
            self._ended[number] = reply
        self._replies.setdefault(number, reply)
        self._past.pop(number, None)
        if any(cue.number == number for cue, _ in house.under_way):  # these are answered all the same
            house.under_way = deque(
                (cue, Reply(told=None) if cue.number == number else before) for cue, before in house.under_way
            )

    def lose(self, house: House, reply: Reply | None, why: str) -> None:
        """End a process that hangs or is dead: one conversation ends with this reply, the others are played again.

        A machine that is lost is not the fault of what was played there: without a reply, all are played again.

        Raises:
            RewardError: It was still loading the environment, or the cluster loses one process after the other.
        """
        loading = house.loaded is None
        if house.link is not None:
            house.link.kill()
        house.link, house.loaded = None, False
        if reply is None:
            self._gone += 1
            if self._gone >= TRIES * len(self._houses):
                raise RewardError(machines_lost(self._gone, why))
        elif loading:
            raise RewardError(why)
        left, house.under_way = house.under_way, deque()
        pending = {cue.number: cue for cue, before in (*left, *house.waiting) if before is None}
        house.waiting = deque()
        if left and reply is not None:
            guilty = left[0][0].number
            pending.pop(guilty, None)
            self.give_up(house, guilty, reply)
            self._lost += 1
        others = sorted({number for number in self._past if self.house_of(number) is house} | pending.keys())
        if self._lost >= GIVE_UP and reply is not None:
            text = f"not played: {self._lost} turns in a row were lost, the last of them: {reply.error}"
            for number in others:
                self.give_up(house, number, Reply(error=text))
            return
        for number in others:
            house.waiting += self._past.get(number, [])
            if number in pending:
                house.waiting.append((pending[number], None))


class CoroutineHost:
    """Async generators, many at a time, on the lasting loop, never on the notebook's.

    They stay in this process, so that they can use the clients and sessions they close over.

    Args:
        stage: Whose environment they are of.
        timeout: Seconds a turn may take.
    """

    def __init__(self, stage: Stage, timeout: float) -> None:
        self._stage, self._timeout = stage, timeout
        self._pool = CoroutinePool(timeout)
        self._playing: dict[int, Any] = {}
        self._round: Future[Any] | None = None
        self._closed = False

    def play(self, cues: Sequence[Cue]) -> list[Reply]:
        """Give each cue, and await the replies.

        Raises:
            ClientClosedError: The host was closed meanwhile.
        """
        replies: list[Reply | None] = [None] * len(cues)
        free = asyncio.Semaphore(AT_ONCE)

        async def one(index: int) -> None:
            async with free:
                replies[index] = await self.within_limit(cues[index])

        async def every() -> None:
            await asyncio.gather(*(one(index) for index in range(len(cues))))

        self._round, loop = LOOP.submit(every())
        try:
            self._pool.wait_for(self._round, loop)
        finally:
            self._round.cancel()
        if self._closed:
            raise ClientClosedError(CLOSED)
        text = f"blocked its event loop for longer than {self._timeout:g} s: it must await, not wait"
        blocked = Reply(error=text, timed_out=True)
        return [blocked if reply is None else reply for reply in replies]

    def close(self) -> None:
        """Cancel what is awaited. Again: nothing."""
        self._closed = True
        if self._round is not None:
            self._round.cancel()
        self._playing.clear()

    async def within_limit(self, cue: Cue) -> Reply:
        """Await one reply, and cancel it after the time limit."""
        awaited = asyncio.ensure_future(self.reply(cue))
        try:
            done, _ = await asyncio.wait([awaited], timeout=self._timeout)
        finally:
            awaited.cancel()
        if awaited.cancelled():
            reply = Reply(error="the turn was cancelled by itself")
        elif done:
            reply = awaited.result()
        else:
            text = f"took longer than {self._timeout:g} s and was cancelled"
            reply = Reply(error=text, timed_out=True)
        if reply.over:
            self._playing.pop(cue.number, None)
        return reply

    async def reply(self, cue: Cue) -> Reply:
        """Let one conversation go on; what its generator raises becomes text."""
        try:
            if cue.kind == "begin":
                self._playing[cue.number] = self._stage.begun(cue)
            generator = self._playing.get(cue.number)
            if cue.kind == "forget" or generator is None:
                if generator is not None:
                    await generator.aclose()
                return Reply()
            reply = await awaited_reply(generator, cue)
            if reply.over:
                await generator.aclose()
        except (Exception, SystemExit) as error:  # noqa: BLE001  # user code may raise anything: kept as text, counted
            return Reply(error=failed(error).error)
        return reply


async def awaited_reply(generator: Any, cue: Cue) -> Reply:
    """Let an async generator go on to its next yield, or its end."""
    try:
        match cue.kind:
            case "begin":
                value = await anext(generator)
            case "said":
                value = await generator.asend(cue.value)
            case _:
                value = await generator.athrow(RolloutEnded(cue.value))
    except StopAsyncIteration:
        return Reply(
            error="it ended without a reward: an async generator yields it last, as rlvr.Outcome(reward)"
        )
    except RolloutEnded as ended:
        if cue.kind != "over":
            raise
        return not_caught(ended)
    if number_of(value) is not None:  # it cannot return one
        return outcome(value)
    return told_or_over(value) if cue.kind != "over" else after_the_end(value, cue.value)


def on_a_thread(stage: Stage, name: str, timeout: float, reason: CannotShip) -> ProcessHost:
    """Return a host on a thread of this process, and warn of what that means."""
    warnings.warn(
        f"The environment {as_given(name)} cannot be sent to another process ({reason}), so it runs in a thread of "
        f"this one: a turn that hangs is given up after {timeout:g} s but cannot be ended. Make what cannot be pickled "
        f"inside the function rather than before it.",
        stacklevel=2,
    )
    return ProcessHost(stage, name, None, timeout, Crew(1))


def host_of(
    environment: Environment, timeout: float | None, crew: Crew | None = None, *, apart: bool = False
) -> Host:
    """Choose where an environment's generators live.

    Args:
        environment: Whose.
        timeout: Seconds a turn may take; None calls it here, without a limit.
        crew: The processes in which they live, where they can; None takes some of this machine.
        apart: Each conversation gets a copy of the environment of its own, so that none knows of another.

    Raises:
        ValidationError: It cannot be copied.
    """
    stage = Stage(environment)
    if apart:
        try:
            stage = Stage(environment, shipped(environment, environment.identity.modules))
        except Exception as error:  # pickling user objects may raise anything
            raise ValidationError(
                f"With differential privacy each conversation is played by a copy of the environment of its own, so "
                f"that none knows of another row, and {as_given(environment.name)} cannot be copied "
                f"({type(error).__name__}: {error}). Make what cannot be pickled inside the function."
            ) from error
    if environment.asynchronous:
        return CoroutineHost(stage, threading.TIMEOUT_MAX if timeout is None else timeout)
    if timeout is None:
        return HereHost(stage)
    try:
        blob = shipped(stage.again(alone=True), environment.identity.modules)
    except Exception as error:  # noqa: BLE001  # pickling user objects may raise anything
        return on_a_thread(stage, environment.name, timeout, CannotShip(f"{type(error).__name__}: {error}"))
    return ProcessHost(stage, environment.name, blob, timeout, crew or crew_of("", None, None))
