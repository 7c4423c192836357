"""The line to one training client of a server: what goes out, in order, and the one stream that comes back."""

import asyncio
import hashlib
import json
import logging
import sys
import threading
import time
import uuid
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import httpx

from tensafe_nb.config import TrainingConfig
from tensafe_nb.errors import (
    AuthenticationError,
    ClientClosedError,
    FutureCancelledError,
    QueueFullError,
    ServerConnectionError,
    TGTinkerError,
    TrainingClientNotFoundError,
    ValidationError,
    error_of_code,
)
from tensafe_nb.events import (
    Event,
    LineChanged,
    LineState,
    OperationCancelled,
    OperationFailed,
    OperationFinished,
    OperationQueued,
    OperationStarted,
    Progress,
    StateLoaded,
    StatusChanged,
    check_reported,
)
from tensafe_nb.futures import FutureHandle, Promise, handle_of, promise_of
from tensafe_nb.history.log import RunHistory
from tensafe_nb.history.recorder import Recorder
from tensafe_nb.history.stream import Subscriber
from tensafe_nb.privacy.audit_canary import PrivacyAudit
from tensafe_nb.privacy.ledger.statement import PrivacyStatement
from tensafe_nb.protocol import wire
from tensafe_nb.protocol.codec import decode, encode
from tensafe_nb.protocol.losses import by_name, check_loss
from tensafe_nb.protocol.operations import ForwardBackward, Operation, Sample
from tensafe_nb.protocol.results import (
    ClientStatus,
    FutureStatus,
    SampledPiece,
    StepEstimate,
    TrainingClientInfo,
    missing_pieces,
)
from tensafe_nb.store.home import Home
from tensafe_nb.transports.http_encrypted import RemoteEncrypted
from tensafe_nb.transports.http_requests import (
    Requests,
    check_answer,
    error_in,
    is_servers,
    lines_of,
    waiting_asked_for,
)

logger = logging.getLogger(__name__)

R = TypeVar("R")

SENDERS = 4  # submissions on their way at a time; the server puts them in order
DRAINING = 5.0  # s that the history waits for what runs have told
FIRST_SIGN = 5.0  # s after which a stream that says nothing is taken to be held back by a proxy
WAIT = 10.0  # s that the server keeps an answer back until there is something in it
SILENCE = 30.0  # s without a sign of life, which comes every 10, until a stream is taken to be dead
KNOWN_FAILURES = 256  # of which it is remembered whether somebody was told, and what they were
MOST_EVENTS = 256  # that are told at a time
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 2.0  # s between two tries
BLIP = 2.0  # s: a line that is there again sooner is not said to have broken off


@dataclass(slots=True, eq=False)
class Submission:
    """An operation on its way."""

    number: int
    future_id: str
    verb: str
    media_type: str
    body: bytes
    promise: Promise[Any]
    knows_of: str


@dataclass(slots=True, eq=False)
class Telling:
    """What runs told between two submissions: it has its place among those, and what is queued after it follows it."""

    number: int
    events: list[Event]


class HttpChannel:
    """The line to one training client of a server.

    Its state is what the stream tells. The server's events are written to a log in this home folder, which is the
    training client's history here: panels, list_runs(), load_run() and replay() read it, also without the server.

    Args:
        requests: Sends them, on the thread on which all of this runs.
        info: How the training client stands.
        config: What it is made of.
        home: Where the log is kept.
    """

    def __init__(
        self, requests: Requests, info: TrainingClientInfo, config: TrainingConfig, home: Home
    ) -> None:
        self.training_client_id, self.config = info.training_client_id, config
        self.closed = self._left = False
        self.requests, self._io, self._info, self._home = requests, requests.io, info, home
        self.path = f"/training_clients/{info.training_client_id}"
        self._recorder = Recorder(home.event_log(info.training_client_id), mirrors=True)
        self.submitter = uuid.uuid4().hex
        self._changing = threading.RLock()
        self._waiting: dict[str, Promise[Any]] = {}  # of each future, in order
        self._streamed: set[str] = set()  # samples whose pieces are to come
        self._running: set[str] = set()
        self._queued: set[str] = set()  # whoever queued them
        self._failures: OrderedDict[str, Promise[Any]] = OrderedDict()
        self._untold: set[str] = set()  # those of which the server does not know yet that somebody was told
        self._loaded: Promise[TrainingClientInfo] = Promise()
        self._loaded.owner = self._io.thread
        self._tokenizer: Any = None
        self._numbers = 0  # of submissions and tellings: the server takes both in this one order
        self.unsent: set[str] = set()  # what the server has neither taken nor refused yet
        self.reached = 0  # number of the latest event
        self.heard_at = time.monotonic()  # anything at all, on the stream
        self._line = LineState.OPEN
        self._blip: asyncio.TimerHandle | None = None  # until it is said that the line broke off
        self._owed = 0  # number that the latest event published here was given
        self._changed = threading.Condition()
        self._holders = [self.training_client_id]
        self._outgoing: asyncio.Queue[Submission] = asyncio.Queue()
        self._outbox: deque[Telling] = deque()
        self._open: Telling | None = None  # the last one in there, while more may join it
        self._telling = False
        self._tasks: list[asyncio.Future[Any]] = []
        self._io.soon(self._begin)

    def attach(self) -> bool:
        """Count one more client at this end; False if this line has ended."""
        if self.closed or self._left or self._info.status == ClientStatus.TERMINATED:
            return False
        self._holders.append(self.training_client_id)
        return True

    # on the thread of whoever asks

    @property
    def history(self) -> RunHistory:
        """The log in this home folder; waits, not for long, until what was told here is in it."""
        self._until(lambda: not self._outbox and not self._telling and self.reached >= self._owed)
        return self._recorder.history

    def _until(self, so: Callable[[], bool], seconds: float = DRAINING) -> None:
        """Wait, not for long, until something is so, or this line has ended."""
        if threading.current_thread() is not self._io.thread and not self.requests.is_over:
            with self._changed:
                self._changed.wait_for(lambda: self.closed or self._line is LineState.LOST or so(), seconds)

    def submit(self, operation: Operation[R], future_id: str | None = None) -> FutureHandle[R]:
        """Queue an operation; see `Worker.submit`.

        Raises:
            ValidationError: A Python function as loss, a loss that the server does not know, more than it takes.
            ClientClosedError: The client is closed.
            QueueFullError: Too many wait already.
        """
        operation = by_name(operation)
        self._check(operation)
        media_type, body = wire.pack(operation)
        if len(body) > self.requests.limit("body_bytes", len(body)):
            raise ValidationError(
                f"{operation.verb}: this takes {len(body):,} bytes, and the server reads "
                f"{self.requests.limit('body_bytes', 0):,} at a time. Send it in parts."
            )
        future_id = future_id or f"fut-{uuid.uuid4().hex[:12]}"
        streams = isinstance(operation, Sample) and operation.stream
        promise: Promise[R] = Promise(streams=streams)
        promise.owner = self._io.thread
        with self._changing:
            self._refuse_if_closed(operation.verb)
            self._numbers, self._open = self._numbers + 1, None
            told = self._newly_told()
            submission = Submission(self._numbers, future_id, operation.verb, media_type, body, promise, told)
            self._waiting[future_id] = promise
            if streams:
                self._streamed.add(future_id)
            self.unsent.add(future_id)
            self._io.soon(self._outgoing.put_nowait, submission)

        def cancel() -> bool:
            self._cancel({future_id: promise})
            return promise.state is FutureStatus.CANCELLED

        return FutureHandle(
            promise,
            operation=operation.verb,
            future_id=future_id,
            training_client_id=self.training_client_id,
            result_type=operation.result,
            cancel=cancel,
            position=lambda: self._position(future_id),
        )

    def _check(self, operation: Operation[Any]) -> None:
        """Refuse what the server would: so that it is an error of the call."""
        if isinstance(operation, ForwardBackward) or hasattr(operation, "loss_fn"):
            name = operation.loss_fn or self.config.loss.type
            if isinstance(name, str) and ":" not in name and name not in self.requests.losses:
                self.requests.ask_for_losses()  # one that was registered since
                if name not in self.requests.losses and is_registered_here(name):
                    raise ValidationError(
                        f"The loss {name!r} is registered in this process only, and a server does not run code that "
                        f"it is sent. Ask whoever runs the server to register it there, or train embedded: "
                        f"ServiceClient()."
                    )
            check_loss(operation, self.config.loss, self.requests.losses)
        batch, most = getattr(operation, "batch", None), self.requests.limit("tokens_of_a_batch", 1 << 62)
        if batch is not None and batch.input_ids.size > most:
            rows, tokens = batch.shape
            raise ValidationError(
                f"The batch has {rows} × {tokens} tokens; this server takes {most} in one. Send several with "
                f"forward_backward: their gradients add up."
            )

    def _refuse_if_closed(self, verb: str) -> None:
        self.requests.refuse_if_gone()
        if self.closed or self._info.status == ClientStatus.TERMINATED:
            raise ClientClosedError(
                f"{verb}: the training client {self.training_client_id} is closed. Create a new one."
            )
        most = self.requests.limit("waiting_operations", 1_000)
        if len(self._waiting.keys() - self._running) >= most:
            raise QueueFullError(
                f"{most} operations of this training client are waiting already. Wait for some results "
                f"before you submit more."
            )

    def _newly_told(self) -> str:
        """Name the failures whose outcome has been given to somebody: who goes on then knows of them."""
        told = [name for name in self._untold if self._failures[name].told][:32]
        self._untold.difference_update(told)
        return ",".join(told)

    def cancel(self, handles: Sequence[FutureHandle[Any]]) -> int:
        """Cancel several in one request; see `Channel.cancel`."""
        self._cancel({handle.future_id: promise_of(handle) for handle in handles})
        return sum(handle.state is FutureStatus.CANCELLED for handle in handles)

    def _cancel(self, promises: Mapping[str, Promise[Any]]) -> None:
        wanted = [name for name, promise in promises.items() if not promise.done]
        for name in wanted:
            promises[name].cancel_requested = True  # what has not been sent yet takes the word along
        self._ask_to_cancel([name for name in wanted if name not in self.unsent])
        self._until(lambda: self.unsent.isdisjoint(wanted), self.requests.patience)
        self._ask_to_cancel(
            [name for name in wanted if not promises[name].done]
        )  # what was on its way meanwhile
        for name in wanted:
            promises[name].wait()

    def _ask_to_cancel(self, future_ids: Sequence[str]) -> None:
        if future_ids:
            with suppress(TGTinkerError):
                self.requests.call("POST", f"{self.path}/cancel", json={"future_ids": future_ids})

    def _position(self, future_id: str) -> int | None:
        with self._changing:
            waiting = [name for name in self._waiting if name not in self._running]
        return waiting.index(future_id) if future_id in waiting else None

    def ready(self) -> FutureHandle[TrainingClientInfo]:
        return handle_of(
            self._loaded, "ready", self.training_client_id, TrainingClientInfo, cancel=lambda: False
        )

    def info(self) -> TrainingClientInfo:
        """Return how it stands, as the stream has told it so far."""
        return self._info

    def refresh(self) -> TrainingClientInfo:
        """Ask the server; offline, what is known stays."""
        if not self.closed:
            with suppress(ServerConnectionError):
                self._info = decode(self.requests.get(self.path)["info"], TrainingClientInfo)
        return self._info

    def tokenizer(self) -> Any:
        self._loaded.wait()
        self._loaded.outcome()
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._tokenizer_folder())
        return self._tokenizer

    def _tokenizer_folder(self) -> Path:
        """Return the folder of the tokenizer's files, fetched unless some model's were the same."""
        from tensafe_nb.transports.http import extract

        archive = self.requests.call("GET", f"{self.path}/tokenizer").content
        folder = self._home.root / "tokenizers" / hashlib.sha256(archive).hexdigest()[:32]
        if not folder.exists():
            with TemporaryDirectory() as fetched:
                tar = Path(fetched) / "tokenizer.tar"
                tar.write_bytes(archive)
                try:
                    extract(tar, folder)
                except OSError:
                    if not folder.exists():  # or else somebody has put the same files there meanwhile
                        raise
        return folder

    def subscribe(self, subscriber: Subscriber, after: int | None = None) -> Callable[[], None]:
        return self._recorder.subscribe(subscriber, after)

    def publish(self, event: Event) -> Event:
        """Tell the server; the event comes back numbered on the stream, as all do.

        It gets its number before anything that is submitted after it, however late it arrives.
        """
        check_reported(event)
        with self._changing:
            if self._open is None or len(self._open.events) == MOST_EVENTS:
                self._numbers += 1
                self._open = Telling(self._numbers, [])
                self._outbox.append(self._open)
            self._open.events.append(event)
        self._io.soon(self._tell_soon)
        return event

    def sync(self) -> None:
        _ = self.history
        self._recorder.sync()

    def enter_draw(self, unit: str) -> tuple[int, bytes]:
        asked = {"unit": unit, "key": uuid.uuid4().hex}  # sent again, it is one draw
        drawn = self.requests.call("POST", f"{self.path}/draws", json=asked).json()
        return int(drawn["number"]), bytes.fromhex(drawn["key"])

    def estimate(self, batch_size: int | None, length: int | None) -> StepEstimate:
        asked = {"batch_size": batch_size, "length": length}
        return self.requests.record("POST", f"{self.path}/estimate", StepEstimate, json=asked, timeout=600.0)

    @property
    def encrypted(self) -> RemoteEncrypted:
        return RemoteEncrypted(self.requests, self.path)

    def privacy_statement(self) -> PrivacyStatement:
        return self.requests.record("GET", f"{self.path}/privacy_statement", PrivacyStatement)

    def privacy_audit(self, canaries: int, steps: int) -> PrivacyAudit:
        asked = {"canaries": canaries, "steps": steps}
        return self.requests.record(
            "POST", f"{self.path}/privacy_audit", PrivacyAudit, json=asked, timeout=600.0
        )

    def close(self) -> None:
        """Terminate the training client on the server, behind what was submitted here.

        Raises:
            TGTinkerError: The server does not answer, or lets nobody in: it lives on there. This end has ended all the
                same, and `close()` may be called again.
        """
        if self.requests.is_forked:
            return  # the line, and the log, are the parent's
        refusal: TGTinkerError | None = None
        if self._info.status != ClientStatus.TERMINATED and not self.requests.closed:
            self._until(lambda: not self.unsent)
            try:
                self._terminate()
            except TrainingClientNotFoundError:  # it has ended
                self._info = replace(self._info, status=ClientStatus.TERMINATED)
            except TGTinkerError as error:
                refusal = error
            else:
                self._until(lambda: self._info.status == ClientStatus.TERMINATED)
        self.give_up(FutureCancelledError("The training client was closed."), cancel=True)
        if refusal is not None:
            raise self._lives_on(refusal) from refusal

    def _terminate(self) -> None:
        """Ask the server until it answers; where that takes long, say so, for the cell stands still meanwhile."""
        patience = self.requests.patience
        try:
            self.requests.call("DELETE", self.path, patience=min(DRAINING, patience))
        except ServerConnectionError as error:
            if patience <= DRAINING:
                raise
            logger.warning(
                "%s is not closed yet, and is asked for until %g s are over: %s Interrupt the cell to stop waiting; "
                "the training client then lives on, on the server.",
                self.training_client_id,
                patience,
                error,
            )
            self.requests.call("DELETE", self.path, patience=patience - DRAINING)

    def _lives_on(self, refusal: TGTinkerError) -> TGTinkerError:
        """Return the error of a training client that could not be closed: what to do, and how to reach it later."""
        name = self.training_client_id
        message = (
            f"The training client {name} was not closed: {refusal.message} It lives on, on the server, and counts "
            f"among those that you may have. Close it once the server answers: run tc.close() again, or, in any "
            f"kernel, service.get_training_client({name!r}).close()"
        )
        return error_of_code(
            refusal.code, message, refusal.details | {"training_client_id": name}, refusal.request_id
        )

    def leave(self) -> None:
        """Leave the training client to its server, with what was submitted here."""
        self._until(lambda: not self.unsent)

    def hang_up(self) -> None:
        """End the stream and the log; nothing is recorded after this."""
        if self.requests.is_forked:
            return
        if not self.closed:
            _ = self.history
        with self._changing:
            self.closed = True
        self.give_up(ClientClosedError("This ServiceClient was closed while the operation was under way."))
        self._io.soon(self._end_tasks)
        self._recorder.close()
        _leaving.discard(self)
        self._notify()

    def detach(self) -> None:
        """Leave the training client to the server; never waits."""
        with suppress(IndexError):
            self._holders.pop()
        if not self._holders:
            self._left = True
            self._io.soon(self._leave_if_done)

    def give_up(self, error: TGTinkerError, *, cancel: bool = False) -> None:
        """End whatever still waits."""
        with self._changing:
            waiting = dict(self._waiting)
            if cancel:
                self._waiting.clear()
        for future_id, promise in waiting.items():
            if cancel:
                promise.cancel()
            else:
                self.fail(future_id, error)
        if not self._loaded.done:
            self._loaded.fail(error)

    # on the transport's thread

    def refused(self, error: TGTinkerError) -> None:
        """Fail what waits: the server lets nobody in, or knows the training client no more."""
        if isinstance(error, TrainingClientNotFoundError):
            self._info = replace(self._info, status=ClientStatus.TERMINATED, reason=str(error))
        self.note_line(LineState.LOST, str(error))
        self.give_up(error)

    def _begin(self) -> None:
        """Start the tasks; each holds the channel weakly between two waits, so that it can be let go."""
        self.reached = self._recorder.history.last_seq
        held, self._connections = weakref.ref(self), self.requests.open_line(self.path)
        tasks = [listen(held, self.requests)]
        tasks += [send(held, self.requests, self._outgoing) for _ in range(SENDERS)]
        self._tasks = [asyncio.ensure_future(task) for task in tasks]
        if self._info.status != ClientStatus.INITIALIZING:
            self._note_status(self._info)

    def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        self.requests.end_line(self.path, self._connections)

    def _do(self, work: Any) -> None:
        self._tasks = [task for task in self._tasks if not task.done()]
        self._tasks.append(asyncio.ensure_future(work))

    def _tell_soon(self) -> None:
        if not self._telling and self._outbox and not self.closed:
            self._telling = True
            self._do(self._tell())

    async def _tell(self) -> None:
        """Send what is in the outbox, in order; while the server cannot be reached, it waits there."""
        try:
            while self._outbox and not self.closed:
                telling = self._outbox[0]
                with self._changing:
                    if telling is self._open:
                        self._open = None
                answer = await self._told(telling.number, telling.events)
                if answer is not None and answer.is_success:
                    self._owed = max(self._owed, int(answer.json()["seq"]))
                elif answer is not None:
                    logger.error("the server does not record what a run told: %s", answer.text)
                self._outbox.popleft()
        finally:
            self._telling = False
            self._notify()
            self._leave_if_done()

    async def _told(self, number: int, events: Sequence[Event]) -> httpx.Response | None:
        """Return what the server says to events of which it takes each once; None where it takes no more of them."""
        headers = {"x-submitter": self.submitter, "x-number": str(number)}
        told = [encode(event) for event in events]
        while not self.closed:
            try:
                return await self.requests.send("POST", f"{self.path}/events", json=told, headers=headers)
            except TGTinkerError as error:
                if not is_of_the_line(error):
                    logger.error("what a run told could not be recorded by the server: %s", error)
                    if not told:
                        return None
                    told = []  # its place is taken all the same: what comes behind it does not wait
                    continue
            await asyncio.sleep(LONGEST_PAUSE)
        return None

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def sent(self, future_id: str, error: TGTinkerError | None) -> None:
        """Note that the server has taken a submission, or refused it."""
        if error is not None:
            self.fail(future_id, error)
        self.unsent.discard(future_id)
        self._notify()

    def take(self, item: Mapping[str, Any]) -> None:
        """Take an item of the stream: record its event, tell the subscribers, end the operation that it ends."""
        if "piece" in item:
            promise = self._waiting.get(item["future_id"])
            if promise is not None and item["number"] == len(promise.pieces):  # else it came before
                promise.add_piece(decode(item["piece"], SampledPiece))
            return
        event = decode(item["event"], Event)
        if event.seq < self.reached or (event.seq == self.reached and not isinstance(event, Progress)):
            return
        if "info" in item:
            self._info = decode(item["info"], TrainingClientInfo)
        match event:
            case OperationQueued(future_id=future_id):
                self._queued.add(future_id)
            case OperationFinished() | OperationFailed() | OperationCancelled():
                self._queued.discard(event.future_id)
                self._running.discard(event.future_id)
                self._note_work(busy=bool(self._queued))
            case OperationStarted(future_id=future_id):
                self._running.add(future_id)
                self._note_work(busy=True)
                if future_id in self._waiting:
                    self._waiting[future_id].start()
            case Progress(future_id=future_id, done=done, total=total) if future_id in self._waiting:
                self._waiting[future_id].progress = (done, total)
            case StatusChanged() | StateLoaded():
                self._note_status(self._info)
        self._recorder.record(event)
        self.reached = event.seq
        self._notify()
        if "outcome" in item:
            self._end(item["outcome"])
        elif "info" in item and getattr(event, "future_id", None) in self._waiting:
            self.fail(event.future_id, ServerConnectionError("The server does not keep the result any more."))

    @property
    def pieces(self) -> dict[str, str]:
        """How many pieces have come of what is being sampled, as it is asked for the rest."""
        known = {name: len(self._waiting[name].pieces) for name in self._streamed & self._waiting.keys()}
        told = ",".join(f"{name}:{count}" for name, count in known.items() if count)
        return {"pieces": told} if told else {}

    def note_line(self, state: LineState, reason: str | None = None, *, lasting: bool = False) -> None:
        """Tell whoever watches that the line broke off, or is there again: only this end knows.

        What breaks off is told once it has lasted for longer than a blip.
        """
        if state is LineState.RECONNECTING and self._line is LineState.OPEN and not lasting:
            if self._blip is None:
                self._blip = asyncio.get_running_loop().call_later(
                    BLIP, has_lasted, weakref.ref(self), reason
                )
            return
        if self._blip is not None:
            self._blip.cancel()
            self._blip = None
        if state is not self._line and not self.closed:
            self._line = state
            self._recorder.record(LineChanged(state=state, reason=reason, seq=self.reached, time=time.time()))

    def _note_work(self, *, busy: bool) -> None:
        """Follow what the operations' events tell: the server's own word on it may be a moment old."""
        status = self._info.status
        if status in (ClientStatus.READY, ClientStatus.BUSY):
            status = ClientStatus.BUSY if busy else ClientStatus.READY
        self._info = replace(self._info, status=str(status), queue_depth=len(self._queued))

    def _leave_if_done(self) -> None:
        """End the stream and the log, once nobody is left who holds the client or waits for an operation."""
        if self._left and not self.closed:
            busy = self._waiting or self._outbox or self._telling or self.unsent or not self._loaded.done
            (_leaving.add if busy else _leaving.discard)(self)
            if not busy:
                self.closed = True
                self._end_tasks()
                self._recorder.close()

    def _note_status(self, info: TrainingClientInfo) -> None:
        if info.status in (ClientStatus.READY, ClientStatus.BUSY):
            if self._loaded.done and self._loaded.state is FutureStatus.FAILED:  # the line was lost meanwhile
                self._loaded = Promise()
                self._loaded.owner = self._io.thread
            self._loaded.succeed(info)
            self._leave_if_done()
        elif info.status == ClientStatus.ERROR and not self._loaded.done:
            self._do(self._fail_loading())

    async def _fail_loading(self) -> None:
        """Fetch the error that the loading ended with: a status has its text only."""
        try:
            await self.requests.send("GET", f"{self.path}/ready")
        except TGTinkerError as error:
            self._loaded.fail(error)
            self._leave_if_done()

    def _end(self, outcome: Mapping[str, Any]) -> None:
        future_id = outcome["future_id"]
        promise = self._waiting.get(future_id)
        if promise is None:
            return
        if "fetch" in outcome:
            self._do(self._fetch(future_id, promise))
        elif "error" in outcome:
            self.fail(future_id, error_of_code(**outcome["error"]))
        elif "result" in outcome:
            self._succeed(future_id, promise, decode(outcome["result"]))
        else:
            self._done(future_id)
            promise.cancel()

    async def _fetch(self, future_id: str, promise: Promise[Any]) -> None:
        try:
            answer = await self.requests.send("GET", f"/futures/{future_id}/result")
            value = wire.unpack(answer.headers["content-type"], answer.content)
        except TGTinkerError as error:
            self.fail(future_id, error)
        else:
            self._succeed(future_id, promise, value)

    def _succeed(self, future_id: str, promise: Promise[Any], value: Any) -> None:
        if future_id in self._streamed:  # what a stream that broke off did not bring
            self._streamed.discard(future_id)
            for piece in missing_pieces(promise.pieces, value):
                promise.add_piece(piece)
        self._done(future_id)
        promise.succeed(value)

    def fail(self, future_id: str, error: TGTinkerError) -> None:
        """End an operation with an error; the failure that it names as its cause is known here."""
        with self._changing:
            promise = self._waiting.pop(future_id, None)
            self._streamed.discard(future_id)
            cause = self._failures.get(str(error.details.get("cause")))
            if promise is not None:
                self._failures[future_id] = promise
                self._untold.add(future_id)
            while len(self._failures) > KNOWN_FAILURES:
                self._untold.discard(self._failures.popitem(last=False)[0])
        if promise is not None:
            error.__cause__ = None if cause is None else cause.error
            promise.fail(error)
            self._leave_if_done()

    def _done(self, future_id: str) -> None:
        with self._changing:
            self._waiting.pop(future_id, None)
        self._leave_if_done()


_leaving: set[HttpChannel] = set()  # nobody holds the client any more, and what it had to send is under way


async def send(
    held: "weakref.ref[HttpChannel]", requests: Requests, outgoing: "asyncio.Queue[Submission]"
) -> None:
    """Submit what is queued, one after the other; several of these run at once."""
    while True:
        submission = await outgoing.get()
        channel = held()
        if channel is None:
            return
        path, submitter = f"{channel.path}/operations", channel.submitter
        del channel
        headers = {
            "content-type": submission.media_type,
            "x-submitter": submitter,
            "x-number": str(submission.number),
            "x-future-id": submission.future_id,
            "x-verb": submission.verb,
        }
        if submission.knows_of:
            headers["x-knows-of"] = submission.knows_of
        if submission.promise.cancel_requested:
            headers["x-cancelled"] = "1"
        error = await refusal_of(requests, path, submission, headers)
        channel = held()
        if channel is not None:
            channel.sent(submission.future_id, error)
        del channel
        if error is not None and is_of_the_line(error):
            await withdraw(held, requests, path, headers)


async def refusal_of(
    requests: Requests, path: str, submission: Submission, headers: Mapping[str, str]
) -> TGTinkerError | None:
    """Submit, and return the error it was refused with; None where it fails in its turn, as the stream will say."""

    def is_wanted() -> bool:
        return not submission.promise.done or submission.promise.cancel_requested

    if not is_wanted():  # it was given up while the line was lost
        return ServerConnectionError("It was given up before it was sent.")
    try:
        answer = await requests.send(
            "POST", path, content=submission.body, headers=dict(headers), is_wanted=is_wanted
        )
        if (
            answer.status_code == httpx.codes.INSUFFICIENT_STORAGE
        ):  # its turn comes when there is room: say why now
            logger.warning("the server cannot keep this %s: %s", submission.verb, error_in(answer))
    except TGTinkerError as error:
        return error
    return None


async def withdraw(
    held: "weakref.ref[HttpChannel]", requests: Requests, path: str, headers: Mapping[str, str]
) -> None:
    """Tell the server not to wait for a submission that could not be brought there; what comes after it goes on."""
    while True:
        channel = held()
        if channel is None or channel.closed:
            return
        del channel
        try:
            await requests.send("POST", path, headers={**headers, "x-withdrawn": "1"})
            return
        except TGTinkerError as error:
            if not is_of_the_line(error):
                return
        await asyncio.sleep(LONGEST_PAUSE)


def is_of_the_line(error: TGTinkerError) -> bool:
    """Whether an error says nothing of what was sent: it did not come through, or nobody was let in."""
    return isinstance(error, ServerConnectionError | AuthenticationError) or error.code == "draining"


async def listen(held: "weakref.ref[HttpChannel]", requests: Requests) -> None:
    """Read the stream, and begin again where it broke off, until the training client is closed or let go.

    While nothing comes, whatever waits fails after the patience; but this end goes on asking, and goes on with what is
    submitted once the server is there again.
    """
    pause, seen = FIRST_PAUSE, 0
    while (channel := held()) is not None and not channel.closed:
        reached, path, pieces = channel.reached, channel.path, channel.pieces
        del channel
        if reached > seen:
            pause, seen = FIRST_PAUSE, reached
        try:
            read = poll if requests.streams_held_back else follow
            if await read(held, requests, path, reached, pieces):
                return
            pause = FIRST_PAUSE
        except (httpx.RequestError, TimeoutError, json.JSONDecodeError) as error:
            broke_off(held, requests.unreachable(error))
        except ServerConnectionError as error:
            broke_off(held, error)
        except TGTinkerError as error:
            channel = held()
            if channel is not None:
                channel.refused(error)
            del channel
            if is_over(held):
                return
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


async def follow(
    held: "weakref.ref[HttpChannel]", requests: Requests, path: str, after: int, pieces: Mapping[str, str]
) -> bool:
    """Read one answer of the stream to its end; True if there is nothing more to come."""
    headers = {"last-event-id": str(after), "accept": "text/event-stream"}
    begun = False
    try:
        async with (
            asyncio.timeout(FIRST_SIGN) as first_sign,
            requests.stream(f"{path}/stream", headers, pieces, silence=SILENCE) as answer,
        ):
            if not (answer.is_success and is_servers(answer)):
                first_sign.reschedule(None)
                await answer.aread()
                return await has_to_wait(answer)
            async for line in lines_of(answer, SILENCE):
                if not begun:
                    begun = True
                    first_sign.reschedule(None)
                is_there(held)
                if line.startswith(b"data:"):
                    ended = deliver(held, json.loads(line[5:]))
                    if ended:
                        return True
    except TimeoutError:
        if not begun:
            logger.info("%s sends no stream, as if a proxy kept it: it is asked for in pieces", requests.url)
            requests.streams_held_back = True
        raise
    return is_over(held)


async def poll(
    held: "weakref.ref[HttpChannel]", requests: Requests, path: str, after: int, pieces: Mapping[str, str]
) -> bool:
    """Ask for the next items of the stream; True if there is nothing more to come."""
    asked = {"after": after, "wait": WAIT, **pieces}
    async with requests.stream(f"{path}/poll", {}, asked, silence=WAIT + FIRST_SIGN) as answer:
        await answer.aread()
    if not (answer.is_success and is_servers(answer)):
        return await has_to_wait(answer)
    items = answer.json()
    is_there(held)
    return any(deliver(held, item) for item in items) or (not items and is_over(held))


async def has_to_wait(answer: httpx.Response) -> bool:
    """Wait as long as a server asks to that has too much to do; refuse any other answer that holds no items.

    Raises:
        ServerConnectionError: It is worth asking again.
        TGTinkerError: What the server said.
    """
    wait = waiting_asked_for(answer)
    if wait is None or not is_servers(answer):
        check_answer(answer)
    await asyncio.sleep(wait or 0.0)
    return False


def is_registered_here(name: str) -> bool:
    """Whether this process has a loss of that name; one that has no torch has none."""
    losses = sys.modules.get("tensafe_nb.losses")
    return losses is not None and name in losses.get_registered_losses()


def deliver(held: "weakref.ref[HttpChannel]", item: Mapping[str, Any]) -> bool:
    """Hand an item to the channel; True if there is none any more."""
    channel = held()
    if channel is None or channel.closed:
        return True
    channel.take(item)
    return False


def is_there(held: "weakref.ref[HttpChannel]") -> None:
    """Note that the line is open."""
    channel = held()
    if channel is not None:
        channel.heard_at = time.monotonic()
        channel.note_line(LineState.OPEN)


def has_lasted(held: "weakref.ref[HttpChannel]", reason: str | None) -> None:
    """Tell that the line broke off: this was no blip."""
    channel = held()
    if channel is not None:
        channel.note_line(LineState.RECONNECTING, reason, lasting=True)


def broke_off(held: "weakref.ref[HttpChannel]", error: ServerConnectionError) -> None:
    """Note that the line broke off; once nothing was heard for the whole patience, what waits fails."""
    channel = held()
    if channel is not None:
        is_lost = time.monotonic() - channel.heard_at > channel.requests.patience
        channel.note_line(LineState.LOST if is_lost else LineState.RECONNECTING, str(error))
        if is_lost:
            channel.give_up(error)


def is_over(held: "weakref.ref[HttpChannel]") -> bool:
    """Whether the training client has ended."""
    channel = held()
    return channel is None or channel.closed or channel.info().status == ClientStatus.TERMINATED
