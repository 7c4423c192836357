"""The training clients of a server: each kernel's operations in the order it gave them, and what became of each."""

import asyncio
import json
import threading
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import dropwhile
from typing import Any

from tensafe_nb.core.worker import Worker
from tensafe_nb.errors import FutureFailedError, NotFoundError, TGTinkerError, ValidationError
from tensafe_nb.events import (
    Event,
    OperationCancelled,
    OperationFailed,
    OperationFinished,
    StateLoaded,
    StatusChanged,
)
from tensafe_nb.futures import FutureHandle, promise_of
from tensafe_nb.protocol import wire
from tensafe_nb.protocol.codec import encode
from tensafe_nb.protocol.operations import ForwardBackward, Operation, Sample, SaveState
from tensafe_nb.protocol.results import FutureStatus

KEPT_HANDLES = 2_000  # of operations that have ended: their results can still be fetched
KEPT_ANSWERS = 4_096  # of one submitter: a repeated submission gets the first answer
LONGEST_GAP = 30.0  # s; how long a submission waits for those before it
LONGEST_WAY = 10.0  # s; how long a request about an operation waits for that operation to arrive
MOST_BEHIND = (
    50_000  # events a stream's reader may be behind: then it ends, and begins again where the reader stands
)
LONGEST_DRAIN = 60.0  # s that what runs may take when the server stops
HEARTBEAT = 10.0  # s between signs of life
INLINE = 1 << 16  # bytes of JSON: a larger result is fetched by its future's id
ENDS = (OperationFinished, OperationFailed, OperationCancelled)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a submission is answered with.

    Attributes:
        status: Of the answer.
        content: Its JSON.
        in_turn: It was refused, and fails when its turn comes: the stream tells of it.
    """

    status: int
    content: dict[str, Any]
    in_turn: bool = False


@dataclass(slots=True)
class Submitter:
    """One kernel: its operations run in the order of its numbers 1, 2, 3, however they arrive."""

    next: int = 1
    held: int = 0  # submissions that wait for one before them
    answers: "OrderedDict[int, Answer]" = field(default_factory=OrderedDict)
    turn: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def in_turn(
        self, number: int, submit: Callable[[], Awaitable[Answer]], lost: Callable[[int], Awaitable[None]]
    ) -> Answer:
        """Submit when all before it have been; a repeat gets the first answer, a refused one has had its turn, too.

        Args:
            number: Its place.
            submit: Does it.
            lost: Is told of a number that did not come in time: the others go on without it.

        Raises:
            ValidationError: Its answer is not kept any more.
        """
        async with self.turn:
            self.held += 1
            try:
                async with asyncio.timeout(LONGEST_GAP):
                    await self.turn.wait_for(lambda: number <= self.next)
            except TimeoutError:
                if number > self.next:
                    await lost(self.next)
                    self.next = number
            finally:
                self.held -= 1
            if number < self.next:
                if number not in self.answers:
                    raise ValidationError(f"Submission {number} has had its turn; ask for its future.")
                return self.answers[number]
            try:
                answer = self.answers[number] = await submit()
            finally:
                self.next += 1
                self.turn.notify_all()
            if len(self.answers) > KEPT_ANSWERS:
                self.answers.popitem(last=False)
            return answer


class ServedClient:
    """A training client of this server, as its routes see it: lives on the server's loop.

    Args:
        channel: Its core.
    """

    def __init__(self, channel: Worker) -> None:
        self.channel, self.hung_up = channel, False
        self._submitters: dict[str, Submitter] = {}
        self._handles: OrderedDict[str, FutureHandle[Any]] = OrderedDict()
        self._arrivals: dict[str, asyncio.Event] = {}
        self._readers: set[asyncio.Queue[Event | dict[str, Any] | None]] = set()

    @property
    def held(self) -> int:
        """How many submissions wait for one that has not come."""
        return sum(submitter.held for submitter in self._submitters.values())

    @property
    def lags(self) -> list[int]:
        """How many events each reader of its stream is behind."""
        return [reader.qsize() for reader in self._readers]

    # operations

    async def in_turn(self, submitter: str, number: int, submit: Callable[[], Awaitable[Answer]]) -> Answer:
        """Run a submitter's submissions in the order of their numbers; see `Submitter.in_turn`."""

        async def lost(missing: int) -> None:
            error = FutureFailedError(f"Submission {missing} of {submitter} never came.")
            await self.refuse(ForwardBackward, f"fut-lost-{missing}", error)

        return await self._submitters.setdefault(submitter, Submitter()).in_turn(number, submit, lost)

    def may_refuse(self, submitter: str, number: int) -> bool:
        """Whether a submission can be told to come again later: not if others are held until it has come."""
        known = self._submitters.get(submitter)
        return known is None or number > known.next or (number == known.next and not known.held)

    async def submit(
        self,
        operation: Operation[Any],
        future_id: str | None = None,
        knows_of: Iterable[str] = (),
        *,
        cancelled: bool = False,
    ) -> FutureHandle[Any]:
        """Queue an operation.

        Args:
            operation: The operation.
            future_id: As its submitter named it; None names it here.
            knows_of: Failed operations of which its submitter has been told since it last submitted one.
            cancelled: It was cancelled on its way, and only leaves its mark.
        """
        for name in knows_of:
            if name in self._handles:
                promise_of(self._handles[name]).told = True
        future_id = future_id or f"fut-{uuid.uuid4().hex[:12]}"
        # on the loop itself: it takes 0.1 ms and waits for no disk, and a thread would take longer to be woken
        handle = self._keep(self.channel.submit(operation, future_id))
        if isinstance(operation, Sample) and operation.stream:
            self._pass_pieces_on(handle)
        if cancelled:
            await asyncio.to_thread(handle.cancel)
        return handle

    async def refuse(self, kind: type[Operation[Any]], future_id: str, error: TGTinkerError) -> bool:
        """Let what could not be taken fail in its turn, and its step with it. False if the client is closed."""
        with suppress(TGTinkerError):  # a closed client takes nothing more
            self._keep(self.channel.refuse(kind, future_id, error))
            return True
        return False

    def _pass_pieces_on(self, handle: FutureHandle[Any]) -> None:
        """Put the pieces of a sample on the streams there are, between the events: neither stored nor numbered."""
        loop, promise = asyncio.get_running_loop(), promise_of(handle)
        passing, passed = threading.Lock(), 0

        def pass_on() -> None:
            nonlocal passed
            with passing, suppress(RuntimeError):  # the loop has ended
                for piece in promise.pieces[passed:]:
                    item = {"piece": encode(piece), "future_id": handle.future_id}
                    for reader in tuple(self._readers):
                        loop.call_soon_threadsafe(reader.put_nowait, item)
                    passed += 1

        promise.watch(pass_on)
        pass_on()  # what was drawn before this

    def _keep(self, handle: FutureHandle[Any]) -> FutureHandle[Any]:
        self._handles[handle.future_id] = handle
        if handle.future_id in self._arrivals:
            self._arrivals.pop(handle.future_id).set()
        while len(self._handles) > KEPT_HANDLES and next(iter(self._handles.values())).done():
            self._handles.popitem(last=False)
        return handle

    def handle(self, future_id: str) -> FutureHandle[Any] | None:
        """Return the handle of an operation, as long as it is kept."""
        return self._handles.get(future_id)

    async def arrived(self, future_id: str) -> FutureHandle[Any]:
        """Return the handle of an operation that may still be on its way here.

        Raises:
            NotFoundError: It did not come.
        """
        if future_id not in self._handles:
            coming = self._arrivals.setdefault(future_id, asyncio.Event())
            with suppress(TimeoutError):
                async with asyncio.timeout(LONGEST_WAY):
                    await coming.wait()
        if future_id not in self._handles:
            self._arrivals.pop(future_id, None)
            raise NotFoundError(
                f"There is no operation {future_id!r} here, or its result is not kept any more."
            )
        return self._handles[future_id]

    async def cancel(self, future_ids: Iterable[str]) -> int:
        """Cancel operations, in the order given; return how many were."""
        found = [self._handles[name] for name in future_ids if name in self._handles]
        return await asyncio.to_thread(lambda: sum(handle.cancel() for handle in found))

    # its stream

    async def stream(self, after: int) -> AsyncGenerator[dict[str, Any]]:
        """Iterate over events above a number and what becomes of operations, in one order, until it hangs up.

        An event that ends an operation brings the outcome along, so that no result precedes the events before it.
        """
        loop = asyncio.get_running_loop()
        waiting: asyncio.Queue[Event | dict[str, Any] | None] = asyncio.Queue()

        def put(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(waiting.put_nowait, event)

        unsubscribe = await asyncio.to_thread(self.channel.subscribe, put, after)
        self._readers.add(waiting)
        try:
            while waiting.qsize() < MOST_BEHIND and not (self.hung_up and waiting.empty()):
                try:
                    async with asyncio.timeout(HEARTBEAT):
                        event = await waiting.get()
                except TimeoutError:
                    yield {}
                    continue
                if isinstance(event, Event):
                    yield await self._told(event)
                elif event is not None:
                    yield event
        finally:
            self._readers.discard(waiting)
            unsubscribe()

    async def _told(self, event: Event) -> dict[str, Any]:
        item: dict[str, Any] = {"event": encode(event)}
        if isinstance(event, ENDS):
            handle = self._handles.get(event.future_id)
            if handle is not None:
                await ended(handle)
                item["outcome"] = outcome_of(handle)
        if isinstance(event, (*ENDS, StatusChanged, StateLoaded)):
            item["info"] = encode(self.channel.info())
        return item

    # its end

    async def drain(self) -> None:
        """Finish what runs, and the checkpoint that comes next; cancel what waits behind it."""
        undone = [handle for handle in self._handles.values() if not handle.done()]
        waiting = dropwhile(
            lambda handle: handle.state is FutureStatus.RUNNING or handle.operation == SaveState.verb, undone
        )
        for handle in reversed(list(waiting)):
            await asyncio.to_thread(handle.cancel)
        for handle in undone:
            await ended(handle, LONGEST_DRAIN)
        await asyncio.to_thread(self.channel.close)

    def hang_up(self) -> None:
        """Write out the log and end the streams; what runs tell after this is not recorded."""
        self.channel.hang_up()
        self.hung_up = True
        for reader in self._readers:
            reader.put_nowait(None)


async def ended(handle: FutureHandle[Any], seconds: float | None = None) -> bool:
    """Wait until an operation has ended; False where it has not in time."""
    if handle.done():
        return True
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def tell() -> None:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(done.set)

    forget = promise_of(handle).on_done(tell)
    try:
        async with asyncio.timeout(seconds):
            await done.wait()
    except TimeoutError:
        return False
    finally:
        forget()
    return True


def outcome_of(handle: FutureHandle[Any]) -> dict[str, Any]:
    """Return what became of an operation that has ended: its result, a note that it is to be fetched, or its error.

    Looking does not count as telling: a window that failed is forgiven to a user who was told, not to the server.
    """
    promise = promise_of(handle)
    outcome: dict[str, Any] = {"future_id": handle.future_id, "state": str(promise.state)}
    if promise.state is FutureStatus.COMPLETED:
        media_type, body = wire.pack(promise.value)
        if media_type == wire.JSON and len(body) <= INLINE:
            return outcome | {"result": json.loads(body)}
        return outcome | {"fetch": len(body)}
    if promise.state is FutureStatus.FAILED:
        return outcome | {"error": error_of(promise.error)}
    return outcome


def error_of(error: BaseException | None) -> dict[str, Any]:
    """Return an error as it is sent: never a traceback; of a foreign exception its name and its text."""
    if not isinstance(error, TGTinkerError):
        error = FutureFailedError(f"The operation failed: {type(error).__name__}: {error}")
    details = {name: value for name, value in error.details.items() if is_plain(value)}
    return {"code": error.code, "message": error.message, "details": details, "request_id": error.request_id}


def is_plain(value: object) -> bool:
    """Whether a value is JSON as it is."""
    match value:
        case None | bool() | str() | int() | float():
            return True
        case list() | tuple():
            return all(is_plain(item) for item in value)
        case dict():
            return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return False
