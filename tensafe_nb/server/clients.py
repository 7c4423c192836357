"""The training clients of a server: each kernel's operations in the order it gave them, and what became of each."""

import asyncio
import json
import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tensafe_nb.core.queue import Job
from tensafe_nb.core.worker import Worker
from tensafe_nb.errors import (
    FutureFailedError,
    NotFoundError,
    StorageError,
    TGTinkerError,
    ValidationError,
    error_of_code,
)
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
from tensafe_nb.protocol.operations import VERBS, ForwardBackward, Operation, Sample
from tensafe_nb.protocol.results import ClientStatus, FutureStatus
from tensafe_nb.server.answers import STATUS, error_of, told
from tensafe_nb.server.journal import Journal, Record

logger = logging.getLogger(__name__)

KEPT_HANDLES = 2_000  # of operations that have ended: their results can still be fetched
KEPT_ANSWERS = 4_096  # of one submitter: a repeated submission gets the first answer
KEPT_DRAWS = 64  # of a training client: as long as a request is sent again, no more are on their way
LONGEST_GAP = (
    150.0  # s that a submission waits for those before it: longer than their kernel tries to bring them
)
LONGEST_WAY = 10.0  # s; how long a request about an operation waits for that operation to arrive
MOST_BEHIND = (
    50_000  # events a stream's reader may be behind: then it ends, and begins again where the reader stands
)
LONGEST_DRAIN = 60.0  # s that what runs may take when the server stops
RETRY = 0.5  # s between tries to write what a full disk has refused
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


@dataclass(frozen=True, slots=True)
class Place:
    """Where a submission stands among those of its kernel, and what it says beside its operation.

    Attributes:
        verb: Of the operation, should its body not be readable.
        submitter: The kernel; None for a caller that keeps no order, such as curl.
        number: 1, 2, 3, …
        future_id: The operation's id, made by the kernel.
        knows_of: Failed operations of which it has been told since its last submission.
        cancelled: It was cancelled on its way.
        is_repeated: An earlier process may have taken it.
    """

    verb: str
    submitter: str | None = None
    number: int | None = None
    future_id: str | None = None
    knows_of: tuple[str, ...] = ()
    cancelled: bool = False
    is_repeated: bool = False

    @property
    def for_journal(self) -> dict[str, Any]:
        """What of it has to outlive the process."""
        turn = (self.submitter, self.number) if self.number is not None else (None, None)
        return {
            "submitter": turn[0],
            "number": turn[1],
            "knows_of": list(self.knows_of),
            "cancelled": self.cancelled,
        }


@dataclass(slots=True)
class Submitter:
    """One kernel: its operations run in the order of its numbers 1, 2, 3, however they arrive."""

    next: int = 1
    held: int = 0  # submissions that wait for one before them
    answers: "OrderedDict[int, Answer]" = field(default_factory=OrderedDict)
    turn: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def in_turn(
        self,
        number: int,
        submit: Callable[[], Awaitable[Answer]],
        lost: Callable[[int], Awaitable[None]],
        check: Callable[[], None],
    ) -> Answer:
        """Submit when all before it have been; a repeat gets the first answer, a refused one has had its turn, too.

        Args:
            number: Its place.
            submit: Does it.
            lost: Is told of a number that did not come in time: the others go on without it.
            check: Raises where nothing is taken any more: the turn is left to the process to come.

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
            check()
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
        journal: What it is brought back from, should this process be killed.
    """

    def __init__(self, channel: Worker, journal: Journal) -> None:
        self.channel, self.journal, self.hung_up = channel, journal, False
        self.used_at = time.monotonic()
        self.recalled = not journal.results  # what ended in an earlier process has handles here
        self._submitters: dict[str, Submitter] = {}
        self._handles: OrderedDict[str, FutureHandle[Any]] = OrderedDict()
        self._arrivals: dict[str, asyncio.Event] = {}
        self._drawing = threading.Lock()
        self._draws: OrderedDict[str, tuple[int, bytes]] = OrderedDict()  # by the key of whoever asked
        self._readers: set[asyncio.Queue[Event | dict[str, Any] | None]] = set()
        self._streamed: dict[str, FutureHandle[Any]] = {}  # samples whose pieces are told as they come
        redrawn = reversed(
            channel.redrawn
        )  # what is owed of draws made in an earlier process, the last first
        for key, numbered in zip(reversed(journal.drawn_keys), redrawn, strict=False):
            if key is not None:
                self._draws[key] = numbered
        for name, known in journal.submitters.items():
            answers = OrderedDict((number, answer_of(answer)) for number, answer in known.answers)
            self._submitters[name] = Submitter(known.next, answers=answers)

    def recall(self) -> None:
        """Make handles of the operations that ended in an earlier process."""
        if not self.recalled:
            self.recalled, since = True, self._handles
            self._handles = OrderedDict()
            for name, record in self.journal.results.items():
                if name not in since:
                    self._handles[name] = self.channel.remember(ended_job(record))
            self._handles |= since
            self.journal.results.clear()

    @property
    def held(self) -> int:
        """How many submissions wait for one that has not come."""
        return sum(submitter.held for submitter in self._submitters.values())

    @property
    def lags(self) -> list[int]:
        """How many events each reader of its stream is behind."""
        return [reader.qsize() for reader in self._readers]

    # operations

    async def in_turn(
        self,
        submitter: str,
        number: int,
        submit: Callable[[], Awaitable[Answer]],
        check: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Run a submitter's submissions in the order of their numbers; see `Submitter.in_turn`."""

        async def lost(missing: int) -> None:
            error = FutureFailedError(f"Submission {missing} of {submitter} never came.")
            place = Place(ForwardBackward.verb, submitter, number - 1, f"fut-lost-{uuid.uuid4().hex[:12]}")
            self.refuse(place, error)

        self.used_at = time.monotonic()
        return await self._submitters.setdefault(submitter, Submitter()).in_turn(number, submit, lost, check)

    def may_refuse(self, submitter: str, number: int) -> bool:
        """Whether a submission can be told to come again later: not if others are held until it has come."""
        known = self._submitters.get(submitter)
        return known is None or number > known.next or (number == known.next and not known.held)

    def is_turn_of(self, submitter: str, number: int) -> bool:
        """Whether all submissions before it have had their turn."""
        known = self._submitters.get(submitter)
        return number <= (1 if known is None else known.next)

    async def submit(
        self,
        operation: Operation[Any],
        place: Place,
        form: tuple[str, bytes] | None = None,
        *,
        passes_on: bool = True,
    ) -> FutureHandle[Any]:
        """Queue an operation.

        Args:
            operation: The operation.
            place: Whose it is, and where it stands among its submitter's; without a future id it is named here.
            form: Its media type and its body, as they came.
            passes_on: Put the pieces of what is sampled on the streams there are.

        Raises:
            ValidationError: Another operation has its future id.
            StorageError: It cannot be written down.
        """
        self.used_at = time.monotonic()
        future_id = place.future_id or f"fut-{uuid.uuid4().hex[:12]}"
        if self._is_known(future_id):
            raise ValidationError(f"There was an operation {future_id!r} before: each has an id of its own.")
        for name in place.knows_of:
            handle = self.handle(name)
            if handle is not None:
                promise_of(handle).told = True
        media_type, body = wire.pack(operation) if form is None else form

        def write(job: Job) -> None:
            self.journal.submitted(place.for_journal, operation.verb, media_type, body, job)
            if (
                job.kind is ForwardBackward
            ):  # what failed may have to be brought back first, and be known all the same
                job.knows_of = self.journal.known_to(future_id)

        # on the loop itself: it takes 0.2 ms and waits for no disk, and a thread would take longer to be woken
        handle = self.keep(self.channel.submit(operation, future_id, write))
        if isinstance(operation, Sample) and operation.stream and passes_on:
            self._pass_pieces_on(handle)
        if place.cancelled:
            await asyncio.to_thread(handle.cancel)
        return handle

    def refuse(self, place: Place, error: TGTinkerError) -> bool:
        """Let what could not be taken fail in its turn, and its step with it. False if that cannot be."""
        future_id = place.future_id
        if future_id is None or place.verb not in VERBS or self._is_known(future_id):
            return False

        def write(job: Job) -> None:
            try:
                self.journal.refused(place.for_journal, place.verb, job.future_id, error)
            except StorageError as full:  # after a restart its number counts as lost, and fails as well
                logger.error("a refusal cannot be written down: %s", full)
                job.unwritten = True

        with suppress(TGTinkerError):  # a closed client takes nothing more
            self.keep(self.channel.refuse(VERBS[place.verb], future_id, error, write))
            return True
        return False

    def _is_known(self, future_id: str) -> bool:
        return self.handle(future_id) is not None or future_id in self.journal.waiting

    def publish(
        self,
        events: Sequence[Event],
        submitter: str | None = None,
        number: int | None = None,
        *,
        once: str | None = None,
    ) -> int:
        """Number and record what a run tells, and return the last number.

        Args:
            events: What it tells.
            submitter: Whose submission it is, if it has a number.
            number: See `Place`.
            once: Else the name of the request: what it brings is recorded once.

        Raises:
            ValidationError: An event that is the core's own to tell.
        """
        if number is None and once is not None and once in self.journal.published_once:
            return self.journal.published_once[once]
        records = [encode(event) for event in events]
        try:
            return self.channel.publish_all(
                events,
                lambda first: self.journal.publishing(
                    submitter, number, first, records, once=once if number is None else None
                ),
            )
        finally:
            self.journal.published()

    def _pass_pieces_on(self, handle: FutureHandle[Any]) -> None:
        """Put the pieces of a sample on the streams there are, between the events: neither stored nor numbered."""
        loop, promise = asyncio.get_running_loop(), promise_of(handle)
        passing, passed = threading.Lock(), 0
        self._streamed[handle.future_id] = handle

        def pass_on() -> None:
            nonlocal passed
            with passing, suppress(RuntimeError):  # the loop has ended
                for item in pieces_of(handle, passed):
                    for reader in tuple(self._readers):
                        loop.call_soon_threadsafe(reader.put_nowait, item)
                    passed += 1
            if promise.done:
                self._streamed.pop(handle.future_id, None)

        promise.watch(pass_on)
        pass_on()  # what was drawn before this

    def enter_draw(self, unit: str, key: str | None = None) -> tuple[int, bytes]:
        """Number a Poisson draw that is about to be made; see `Worker.enter_draw`. From any thread.

        Args:
            unit: What is drawn.
            key: Of the caller's own: whoever asks again with it owes one draw; in another process it has another
                number.
        """
        with self._drawing:
            if key is not None and key in self._draws:
                return self._draws[key]
            numbered = self.channel.enter_draw(unit)
            self.journal.drawn(unit, key)  # before anybody can draw with it
            if key is not None:
                self._draws[key] = numbered
                if len(self._draws) > KEPT_DRAWS:
                    self._draws.popitem(last=False)
            return numbered

    def keep(self, handle: FutureHandle[Any]) -> FutureHandle[Any]:
        """Keep the handle of an operation for whoever asks for its result."""
        self._handles[handle.future_id] = handle
        if handle.future_id in self._arrivals:
            self._arrivals.pop(handle.future_id).set()
        while len(self._handles) > KEPT_HANDLES and next(iter(self._handles.values())).done():
            self._handles.popitem(last=False)
        return handle

    def handle(self, future_id: str) -> FutureHandle[Any] | None:
        """Return the handle of an operation, as long as it is kept."""
        self.recall()
        return self._handles.get(future_id)

    async def arrived(self, future_id: str) -> FutureHandle[Any]:
        """Return the handle of an operation that may still be on its way here.

        Raises:
            NotFoundError: It did not come.
        """
        if self.handle(future_id) is None:
            coming = self._arrivals.setdefault(future_id, asyncio.Event())
            try:
                async with asyncio.timeout(LONGEST_WAY):
                    await coming.wait()
            except TimeoutError:
                pass
            finally:
                if not coming.is_set():
                    self._arrivals.pop(future_id, None)
        if future_id not in self._handles:
            raise NotFoundError(
                f"There is no operation {future_id!r} here, or its result is not kept any more."
            )
        return self._handles[future_id]

    async def cancel(self, future_ids: Iterable[str]) -> int:
        """Cancel operations, in the order given; return how many were."""
        self.recall()
        found = [self._handles[name] for name in future_ids if name in self._handles]
        return await asyncio.to_thread(lambda: sum(handle.cancel() for handle in found))

    # its stream

    async def stream(
        self, after: int, known: Mapping[str, int] | None = None
    ) -> AsyncGenerator[dict[str, Any]]:
        """Iterate over events above a number and what becomes of operations, in one order, until it hangs up.

        An event that ends an operation brings the outcome along, so that no result precedes the events before it.
        Of what is being sampled, pieces come between the events.

        Args:
            after: The number of the last event that is known.
            known: Of what is being sampled, how many pieces are.
        """
        loop = asyncio.get_running_loop()
        waiting: asyncio.Queue[Event | dict[str, Any] | None] = asyncio.Queue()

        behind = False

        def keep(event: Event) -> None:
            nonlocal behind  # a reader that has stopped reading holds up this generator, and must not fill the memory
            behind = behind or waiting.qsize() >= MOST_BEHIND
            if not behind:
                waiting.put_nowait(event)

        def put(event: Event) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(keep, event)

        unsubscribe = await asyncio.to_thread(self.channel.subscribe, put, after)
        self._readers.add(waiting)
        for handle in tuple(self._streamed.values()):
            for item in pieces_of(handle, (known or {}).get(handle.future_id, 0)):
                waiting.put_nowait(item)
        try:
            while not ((self.hung_up or behind) and waiting.empty()):
                try:
                    async with asyncio.timeout(HEARTBEAT):
                        event = await waiting.get()
                except TimeoutError:
                    yield {}
                    continue
                if isinstance(event, Event):
                    while not self.channel.bus.is_written():  # the disk is full: the number is not final yet
                        yield {}
                        await asyncio.sleep(RETRY)
                    yield await self._told(event)
                elif event is not None:
                    yield event
        finally:
            self._readers.discard(waiting)
            unsubscribe()

    async def _told(self, event: Event) -> dict[str, Any]:
        item: dict[str, Any] = {"event": told(event)}
        if isinstance(event, ENDS):
            handle = self.handle(event.future_id)
            if handle is not None:
                await ended(handle)
                item["outcome"] = outcome_of(handle)
        if isinstance(event, (*ENDS, StatusChanged, StateLoaded)):
            item["info"] = told(self.channel.info())
        return item

    # its end

    def put_away_if_idle(self, seconds: float | None) -> None:
        """Let go of the model where nobody has used it for so long; the next operation brings it back."""
        info = self.channel.info()
        if info.queue_depth or info.status == ClientStatus.INITIALIZING:
            self.used_at = time.monotonic()
        elif seconds is not None and not info.away and time.monotonic() - self.used_at > seconds:
            self.channel.put_away()

    async def drain(self) -> None:
        """Finish what runs, and the checkpoint that comes next; what waits behind it goes on when the server is back.

        What takes too long is left to be begun again, as if the server had been killed.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(LONGEST_DRAIN):
                await asyncio.to_thread(self.channel.stop)

    def hang_up(self) -> None:
        """Write out log and journal and end the streams; what runs tell after this is not recorded."""
        self.channel.hang_up()
        self.hung_up = True
        if self.channel.status is ClientStatus.TERMINATED:
            self.journal.remove()
        else:
            self.journal.close()
        for reader in self._readers:
            reader.put_nowait(None)


def answer_of(kept: Mapping[str, Any]) -> Answer:
    """Return what a submission was answered with in an earlier process."""
    if "seq" in kept:
        return Answer(200, dict(kept))
    if kept["error"] is not None:
        return Answer(STATUS.get(kept["error"]["code"], 500), {"error": kept["error"]}, in_turn=True)
    return Answer(202, taken(kept["future_id"], kept["verb"], kept["at"], FutureStatus.PENDING, None))


def taken(future_id: str, verb: str, at: float, state: FutureStatus, position: int | None) -> dict[str, Any]:
    """Return the content of the answer to a submission that was taken."""
    return {
        "future_id": future_id,
        "status": str(state),
        "operation": verb,
        "created_at": at,
        "queue_position": position,
    }


def pieces_of(handle: FutureHandle[Any], first: int) -> list[dict[str, Any]]:
    """Return the pieces of what is being sampled, from number `first` on, as items of a stream."""
    pieces = enumerate(promise_of(handle).pieces[first:], first)
    return [
        {"piece": encode(piece), "future_id": handle.future_id, "number": number} for number, piece in pieces
    ]


def ended_job(record: Record, job: Job | None = None) -> Job:
    """Return the job of an operation that ended in an earlier process, as it ended."""
    job = job or Job(None, VERBS[record["verb"]], future_id=record["future_id"])
    promise = job.promise
    if record["started"]:
        promise.start()
    if record["error"] is not None:
        promise.fail(error_of_code(**record["error"]))
    elif record["type"] is not None:
        promise.succeed(wire.unpack(record["type"], record.body))
    else:
        promise.cancel()
    return job


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
