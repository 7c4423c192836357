"""The training clients of a server: each kernel's operations in the order it gave them, and what became of each."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tensafe_nb.core.worker import Worker
from tensafe_nb.errors import FutureFailedError, TGTinkerError, ValidationError
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
from tensafe_nb.protocol.operations import Operation
from tensafe_nb.protocol.results import ClientStatus, FutureStatus

logger = logging.getLogger(__name__)

KEPT_HANDLES = 2_000  # of operations that have ended: their results can still be fetched
KEPT_ANSWERS = 4_096  # of one submitter: a repeated submission gets the first answer
LONGEST_GAP = 30.0  # s; how long a submission waits for those before it
MOST_BEHIND = (
    50_000  # events a stream's reader may be behind: then it ends, and begins again where the reader stands
)
HEARTBEAT = 10.0  # s between signs of life
INLINE = 1 << 16  # bytes of JSON: a larger result is fetched by its future's id
ENDS = (OperationFinished, OperationFailed, OperationCancelled)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a submission is answered with."""

    status: int
    content: dict[str, Any]


@dataclass(slots=True)
class Submitter:
    """One kernel: its operations run in the order of its numbers 1, 2, 3, however they arrive."""

    next: int = 1
    answers: "OrderedDict[int, Answer]" = field(default_factory=OrderedDict)
    turn: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def in_turn(self, number: int, submit: Callable[[], Any]) -> Answer:
        """Submit when all before it have been; a repeat gets the first answer.

        Raises:
            ValidationError: One before it did not come in time, or the answer is not kept any more.
        """
        async with self.turn:
            try:
                async with asyncio.timeout(LONGEST_GAP):
                    await self.turn.wait_for(lambda: number <= self.next)
            except TimeoutError:
                raise ValidationError(
                    f"Submission {number} waited {LONGEST_GAP:g} s for number {self.next}, which did not come. Send "
                    f"that first."
                ) from None
            if number < self.next:
                if number not in self.answers:
                    raise ValidationError(f"Submission {number} was answered long ago; ask for its future.")
                return self.answers[number]
            answer: Answer = await submit()
            self.answers[number] = answer
            if len(self.answers) > KEPT_ANSWERS:
                self.answers.popitem(last=False)
            self.next += 1  # a refused one has had its turn, too
            self.turn.notify_all()
            return answer


class ServedClient:
    """A training client as the server holds it.

    Args:
        channel: The line to its core.
    """

    def __init__(self, channel: Worker) -> None:
        self.channel = channel
        self.submitters: dict[str, Submitter] = {}
        self._handles: OrderedDict[str, FutureHandle[Any]] = OrderedDict()

    def submit(
        self, operation: Operation[Any], future_id: str | None = None, knows_of: str | None = None
    ) -> FutureHandle[Any]:
        """Queue an operation.

        Args:
            operation: The operation.
            future_id: As its submitter named it; None names it here.
            knows_of: The failed operation of which its submitter had been told.
        """
        failed = self._handles.get(knows_of or "")
        if failed is not None:
            promise_of(failed).told = True
        return self._keep(self.channel.submit(operation, future_id))

    def refuse(self, kind: type[Operation[Any]], future_id: str, error: TGTinkerError) -> None:
        """Let what could not be taken fail in its turn, so that its step is not taken without it."""
        with suppress(TGTinkerError):  # a closed client, a full queue: nothing of it will be taken
            self._keep(self.channel.refuse(kind, future_id, error))

    def _keep(self, handle: FutureHandle[Any]) -> FutureHandle[Any]:
        self._handles[handle.future_id] = handle
        ended = [name for name, kept in self._handles.items() if kept.done()]
        for name in ended[: len(self._handles) - KEPT_HANDLES]:
            del self._handles[name]
        return handle

    def handle(self, future_id: str) -> FutureHandle[Any] | None:
        """Return the handle of an operation, as long as it is kept."""
        return self._handles.get(future_id)

    async def stream(self, after: int) -> AsyncIterator[dict[str, Any]]:
        """Iterate over events above a number and what becomes of operations, in one order, until the client is closed.

        An event that ends an operation brings the outcome along, so that no result precedes the events before it.
        """
        loop = asyncio.get_running_loop()
        waiting: asyncio.Queue[Event | None] = asyncio.Queue()

        def put(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(waiting.put_nowait, event)

        unsubscribe = await asyncio.to_thread(self.channel.subscribe, put, after)
        try:
            while waiting.qsize() < MOST_BEHIND:
                try:
                    async with asyncio.timeout(HEARTBEAT):
                        event = await waiting.get()
                except TimeoutError:
                    yield {}
                    continue
                assert event is not None
                yield await self._told(event)
                if isinstance(event, StatusChanged) and event.status == ClientStatus.TERMINATED:
                    return
        finally:
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


async def ended(handle: FutureHandle[Any], seconds: float | None = None) -> bool:
    """Wait until an operation has ended; False where it has not in time."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    handle.add_done_callback(lambda _: loop.call_soon_threadsafe(done.set))
    try:
        async with asyncio.timeout(seconds):
            await done.wait()
    except TimeoutError:
        return False
    return True


def outcome_of(handle: FutureHandle[Any], *, whole: bool = False) -> dict[str, Any]:
    """Return what became of an operation that has ended: its result, a note that it is to be fetched, or its error.

    Looking does not count as telling: a window that failed is forgiven to a user who was told, not to the server.
    """
    promise = promise_of(handle)
    outcome: dict[str, Any] = {"future_id": handle.future_id, "state": str(promise.state)}
    if promise.state is FutureStatus.COMPLETED:
        media_type, body = wire.pack(promise.value)
        if whole or (media_type == wire.JSON and len(body) <= INLINE):
            return outcome | {"result": encode(promise.value)}
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
