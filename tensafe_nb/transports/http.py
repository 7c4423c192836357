"""The line to a server: operations go out in order, events and outcomes come back on one stream per training client.

All of it runs on one thread of its own, so that a notebook's cells neither block nor are needed for it. Nothing here
needs torch. The routes are in `server/app.py`.
"""

import asyncio
import hashlib
import io
import json
import logging
import tarfile
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
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
    ValidationError,
    error_of_code,
)
from tensafe_nb.events import (
    Event,
    OperationStarted,
    Progress,
    StateLoaded,
    StatusChanged,
    check_reported,
)
from tensafe_nb.futures import HEARTBEAT, FutureHandle, Promise, handle_of
from tensafe_nb.history.log import RunHistory
from tensafe_nb.history.recorder import Recorder
from tensafe_nb.history.stream import Subscriber
from tensafe_nb.privacy.audit_canary import PrivacyAudit
from tensafe_nb.privacy.ledger.statement import PrivacyStatement
from tensafe_nb.protocol import wire
from tensafe_nb.protocol.codec import decode, encode
from tensafe_nb.protocol.losses import LossDeclaration, check_loss
from tensafe_nb.protocol.operations import Operation
from tensafe_nb.protocol.results import (
    AuditLogEntry,
    AuditVerification,
    ClientStatus,
    FutureStatus,
    SaveStateResult,
    StateSource,
    StepEstimate,
    TrainingClientInfo,
)
from tensafe_nb.store.home import Home
from tensafe_nb.transports.base import Channel

logger = logging.getLogger(__name__)

R = TypeVar("R")

PREFIX = "/api/v1"
PATIENCE = 60.0  # s without an answer until what waits fails; a restart takes 5 to 21
CONNECTIONS = 8
SENDERS = 4  # submissions on their way at a time; the server puts them in order
MAX_PENDING = 1_000
DRAINING = 5.0  # s that the history waits for what runs have told


class LoopThread:
    """An event loop on a thread of its own."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    def call(self, work: Coroutine[Any, Any, R]) -> R:
        """Run a coroutine there and wait for it, in slices, so that an interrupt is seen."""
        if threading.current_thread() is self.thread:
            work.close()
            raise ValidationError(
                "This runs on the thread that talks to the server (a callback or a subscriber): asking the server here "
                "would wait for ever. Ask elsewhere."
            )
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            while True:
                with suppress(TimeoutError):
                    return future.result(HEARTBEAT)
                if future.done():
                    return future.result()
        except BaseException:
            future.cancel()
            raise

    def soon(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function there, soon; nothing happens once the loop is closed."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *arguments)

    def close(self) -> None:
        """End the thread; idempotent."""
        self.soon(self.loop.stop)
        if threading.current_thread() is not self.thread:
            self.thread.join()


class HttpTransport:
    """Training clients and artifacts of a server.

    Args:
        base_url: Of the server, such as "http://127.0.0.1:8000".
        api_key: The bearer token; it is sent to this server only.
        home: Where the mirrors of its training clients' event logs are kept.

    Raises:
        ServerConnectionError: Nothing answers there.
        AuthenticationError: It takes no such token.
    """

    def __init__(self, base_url: str, api_key: str | None, home: Home) -> None:
        self._url, self._home = base_url.rstrip("/"), home
        self._channels: weakref.WeakValueDictionary[str, HttpChannel] = weakref.WeakValueDictionary()
        self._closed = False
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self.http = httpx.AsyncClient(
            base_url=self._url,
            headers=headers,
            timeout=httpx.Timeout(30.0, connect=5.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=CONNECTIONS),
        )
        self._io = LoopThread(f"tsnb-http-{uuid.uuid4().hex[:6]}")
        weakref.finalize(self, self._io.close)
        try:
            self.capabilities: dict[str, Any] = self.get("/capabilities", patience=0.0)
            found = self.get("/losses")
        except BaseException:
            self._io.close()
            raise
        self.losses = {loss.name: loss for loss in (decode(entry, LossDeclaration) for entry in found)}

    # requests

    async def request(
        self, method: str, path: str, *, patience: float = PATIENCE, **options: Any
    ) -> httpx.Response:
        """Send a request until it is answered, and return the answer.

        Raises:
            ServerConnectionError: No answer within the patience.
            TGTinkerError: What the server said.
        """
        began, pause = time.monotonic(), 0.1
        while True:
            try:
                answer = await self.http.request(method, PREFIX + path, **options)
            except httpx.TransportError as error:
                if time.monotonic() - began + pause > patience:
                    raise self.unreachable(error) from error
                await asyncio.sleep(pause)
                pause = min(2 * pause, 2.0)
                continue
            if answer.is_success:
                return answer
            raise error_in(answer)

    def unreachable(self, error: Exception) -> ServerConnectionError:
        """Say that the server does not answer."""
        why = str(error) or type(error).__name__
        return ServerConnectionError(
            f"The server {self._url} does not answer ({why}). Is it running (tensafe-nb serve), is the "
            f"address right?"
        )

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request from any thread but the transport's own, and wait for the answer."""
        if self._closed:
            raise ClientClosedError("This ServiceClient is closed. Create a new one.")
        return self._io.call(self.request(method, path, **options))

    def get(self, path: str, **options: Any) -> Any:
        """Return the JSON of an address."""
        return self.call("GET", path, **options).json()

    def record(self, method: str, path: str, kind: type[R], **options: Any) -> R:
        """Return the record that a request is answered with."""
        answer = self.call(method, path, **options)
        found: R = wire.unpack(answer.headers["content-type"], answer.content, kind)
        return found

    # training clients

    def create(self, config: TrainingConfig, source: StateSource | None = None) -> Channel:
        body = {"config": encode(config), "source": encode(source)}
        made = self.call("POST", "/training_clients", json=body).json()
        return self._channel(made)

    def attach(self, training_client_id: str) -> Channel:
        known = self._channels.get(training_client_id)
        if known is not None and not known.closed:
            known.attach()
            return known
        return self._channel(self.get(f"/training_clients/{training_client_id}"))

    def _channel(self, made: Mapping[str, Any]) -> "HttpChannel":
        info, config = decode(made["info"], TrainingClientInfo), decode(made["config"], TrainingConfig)
        channel = HttpChannel(self, self._io, info, config, self._home)
        self._channels[channel.training_client_id] = channel
        return channel

    def list_training_clients(self) -> list[TrainingClientInfo]:
        return [decode(info, TrainingClientInfo) for info in self.get("/training_clients")]

    # artifacts

    def list_artifacts(self, training_client_id: str | None) -> list[SaveStateResult]:
        options = {} if training_client_id is None else {"training_client_id": training_client_id}
        return [decode(artifact, SaveStateResult) for artifact in self.get("/artifacts", params=options)]

    def get_artifact(self, artifact_id: str) -> SaveStateResult:
        return self.record("GET", f"/artifacts/{quoted(artifact_id)}", SaveStateResult)

    def config_of(self, artifact_id: str) -> TrainingConfig:
        return self.record("GET", f"/artifacts/{quoted(artifact_id)}/config", TrainingConfig)

    def pull_artifact(self, artifact_id: str, to: Path | None) -> bytes | Path:
        path = f"/artifacts/{quoted(artifact_id)}/content"
        if to is None:
            return self.call("GET", path).content
        self._io.call(self._download(path, to))
        return to

    async def _download(self, path: str, to: Path) -> None:
        """Write an artifact to a file; what is cut off goes on where it ended."""
        part = to.with_name(f"{to.name}.part")
        part.unlink(missing_ok=True)
        began = time.monotonic()
        while True:
            have = part.stat().st_size if part.exists() else 0
            headers = {"range": f"bytes={have}-"} if have else {}
            try:
                async with self.http.stream("GET", PREFIX + path, headers=headers) as answer:
                    if not answer.is_success:
                        await answer.aread()
                        raise error_in(answer)
                    with part.open(
                        "ab" if answer.status_code == httpx.codes.PARTIAL_CONTENT else "wb"
                    ) as file:
                        async for chunk in answer.aiter_bytes(1 << 20):
                            file.write(chunk)
                break
            except httpx.TransportError as error:
                if time.monotonic() - began > PATIENCE:
                    raise self.unreachable(error) from error
                await asyncio.sleep(0.5)
        part.replace(to)

    def push_artifact(self, path: Path) -> SaveStateResult:
        content = path.read_bytes()
        return self.record("PUT", "/artifacts", SaveStateResult, content=content)

    def delete_artifact(self, artifact_id: str) -> None:
        self.call("DELETE", f"/artifacts/{quoted(artifact_id)}")

    def export_adapter(self, artifact_id: str, path: Path, merged: bool) -> Path:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValidationError(
                f"{path} is there already. Give a folder that does not exist yet, or is empty."
            )
        answer = self.call(
            "GET", f"/artifacts/{quoted(artifact_id)}/export", params={"merged": merged}, timeout=600.0
        )
        extract(answer.content, path)
        return path

    def rotate_keys(self) -> int:
        return int(self.call("POST", "/keys/rotate").json()["rewrapped"])

    def audit_logs(
        self, training_client_id: str | None, operation: str | None, limit: int, offset: int
    ) -> Sequence[AuditLogEntry]:
        options = {
            "training_client_id": training_client_id,
            "operation": operation,
            "limit": limit,
            "offset": offset,
        }
        params = {name: value for name, value in options.items() if value is not None}
        return [decode(entry, AuditLogEntry) for entry in self.get("/audit_logs", params=params)]

    def verify_audit_log(self, anchors: Sequence[str]) -> AuditVerification:
        return self.record("GET", "/audit_logs/verify", AuditVerification, params={"anchor": list(anchors)})

    def close(self) -> None:
        """Leave: training clients that were not closed live on, on the server."""
        if self._closed:
            return
        self._closed = True
        for channel in list(self._channels.values()):
            channel.hang_up()
        with suppress(RuntimeError):
            self._io.call(self.http.aclose())
        self._io.close()


@dataclass(slots=True, eq=False)
class Submission:
    """An operation on its way."""

    number: int
    future_id: str
    verb: str
    media_type: str
    body: bytes
    knows_of: str | None


class HttpChannel:
    """The line to one training client of a server.

    Its state is what the stream tells. The server's events are written to a log in this home folder, which is the
    training client's history here: panels, list_runs(), load_run() and replay() read it, also without the server.

    Args:
        transport: Sends requests.
        io: The thread on which all of this runs.
        info: How the training client stands.
        config: What it is made of.
        home: Where the log is kept.
    """

    def __init__(
        self,
        transport: HttpTransport,
        io: LoopThread,
        info: TrainingClientInfo,
        config: TrainingConfig,
        home: Home,
    ) -> None:
        self.training_client_id, self.config = info.training_client_id, config
        self.closed = self._left = False
        self._transport, self._io, self._info = transport, io, info
        self._path = f"/training_clients/{info.training_client_id}"
        self._recorder = Recorder(home.event_log(info.training_client_id))
        self._submitter = uuid.uuid4().hex
        self._numbers = 0
        self._told_number = 0
        self._changing = threading.RLock()
        self._waiting: dict[str, tuple[Promise[Any], str]] = {}  # of each future, in order; and its verb
        self._failed: list[tuple[Promise[Any], str]] = []  # failures, newest last: is the user told of one?
        self._loaded: Promise[TrainingClientInfo] = Promise()
        self._loaded.owner = io.thread
        self._tokenizer: Any = None
        self._reached = 0  # number of the latest event
        self._owed = 0  # number that the latest event published here was given
        self._caught_up = threading.Condition()
        self._clients = 1
        self._outgoing: asyncio.Queue[Submission] = asyncio.Queue()
        self._outbox: deque[Event] = deque()
        self._telling = False
        self._home = home
        io.soon(self._begin)

    def attach(self) -> None:
        """Count one more client at this end."""
        self._clients += 1

    # on the thread of whoever asks

    @property
    def history(self) -> RunHistory:
        """The log in this home folder; waits, not for long, until what was told here is in it."""
        if threading.current_thread() is not self._io.thread:
            with self._caught_up:
                self._caught_up.wait_for(lambda: self.closed or self._is_caught_up, DRAINING)
        return self._recorder.history

    @property
    def _is_caught_up(self) -> bool:
        return not self._outbox and not self._telling and self._reached >= self._owed

    def submit(self, operation: Operation[R], future_id: str | None = None) -> FutureHandle[R]:
        """Queue an operation; see `Worker.submit`.

        Raises:
            ValidationError: A Python function as loss, or a loss that the server does not know.
            ClientClosedError: The client is closed.
            QueueFullError: Too many wait already.
        """
        check_loss(operation, self.config.loss, self._transport.losses)
        media_type, body = wire.pack(operation)
        future_id = future_id or f"fut-{uuid.uuid4().hex[:12]}"
        promise: Promise[R] = Promise()
        promise.owner = self._io.thread
        with self._changing:
            if self.closed:
                raise ClientClosedError(
                    f"{operation.verb}: the training client {self.training_client_id} is closed. Create a new one."
                )
            if len(self._waiting) >= MAX_PENDING:
                raise QueueFullError(
                    f"{MAX_PENDING} operations of this training client are waiting already. Wait for some results "
                    f"before you submit more."
                )
            self._numbers += 1
            submission = Submission(
                self._numbers, future_id, operation.verb, media_type, body, self._told_failure()
            )
            self._waiting[future_id] = (promise, operation.verb)
            self._io.soon(self._outgoing.put_nowait, submission)
        return FutureHandle(
            promise,
            operation=operation.verb,
            future_id=future_id,
            training_client_id=self.training_client_id,
            result_type=operation.result,
            cancel=lambda: self._cancel(future_id, promise),
            position=lambda: self._position(future_id),
        )

    def _told_failure(self) -> str | None:
        """Return the newest failure if its outcome has been given to somebody: who goes on then knows of it."""
        if self._failed and self._failed[-1][0].told:
            return self._failed[-1][1]
        return None

    def _cancel(self, future_id: str, promise: Promise[Any]) -> bool:
        if not promise.done:
            promise.cancel_requested = True
            with suppress(TGTinkerError):
                self._transport.call("POST", f"/futures/{future_id}/cancel")
            promise.wait()
        return promise.state is FutureStatus.CANCELLED

    def _position(self, future_id: str) -> int | None:
        with self._changing:
            waiting = list(self._waiting)
        return waiting.index(future_id) if future_id in waiting else None

    def ready(self) -> FutureHandle[TrainingClientInfo]:
        return handle_of(
            self._loaded, "ready", self.training_client_id, TrainingClientInfo, cancel=lambda: False
        )

    def info(self) -> TrainingClientInfo:
        return self._info

    def refresh(self) -> TrainingClientInfo:
        """Ask the server how the training client stands."""
        self._info = decode(self._transport.get(self._path)["info"], TrainingClientInfo)
        return self._info

    def tokenizer(self) -> Any:
        self._loaded.wait()
        self._loaded.outcome()
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            archive = self._transport.call("GET", f"{self._path}/tokenizer").content
            folder = self._home.root / "tokenizers" / hashlib.sha256(archive).hexdigest()[:32]
            if not folder.exists():
                extract(archive, folder)
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
        return self._tokenizer

    def subscribe(self, subscriber: Subscriber, after: int | None = None) -> Callable[[], None]:
        return self._recorder.subscribe(subscriber, after)

    def publish(self, event: Event) -> Event:
        """Tell the server; the event comes back numbered on the stream, as all do."""
        check_reported(event)
        self._outbox.append(event)
        self._io.soon(self._tell_soon)
        return event

    def sync(self) -> None:
        _ = self.history
        self._recorder.sync()

    def enter_draw(self, unit: str) -> tuple[int, bytes]:
        drawn = self._transport.call("POST", f"{self._path}/draws", json={"unit": unit}).json()
        return int(drawn["number"]), bytes.fromhex(drawn["key"])

    def estimate(self, batch_size: int | None, length: int | None) -> StepEstimate:
        asked = {"batch_size": batch_size, "length": length}
        return self._transport.record(
            "POST", f"{self._path}/estimate", StepEstimate, json=asked, timeout=600.0
        )

    def privacy_statement(self) -> PrivacyStatement:
        return self._transport.record("GET", f"{self._path}/privacy_statement", PrivacyStatement)

    def privacy_audit(self, canaries: int, steps: int) -> PrivacyAudit:
        asked = {"canaries": canaries, "steps": steps}
        return self._transport.record(
            "POST", f"{self._path}/privacy_audit", PrivacyAudit, json=asked, timeout=600.0
        )

    def close(self) -> None:
        """Terminate the training client on the server."""
        if self._info.status != ClientStatus.TERMINATED and not self.closed:
            with suppress(ServerConnectionError):
                self._transport.call("DELETE", self._path, patience=5.0)
            with self._caught_up:
                self._caught_up.wait_for(lambda: self._info.status == ClientStatus.TERMINATED, DRAINING)
        self._give_up(FutureCancelledError("The training client was closed."), cancel=True)

    def leave(self) -> None:
        """Leave the training client to the server."""

    def hang_up(self) -> None:
        """End the stream and the log; nothing is recorded after this."""
        _ = self.history
        with self._changing:
            self.closed = True
        self._give_up(ClientClosedError("This ServiceClient was closed while the operation was under way."))
        self._recorder.close()
        with self._caught_up:
            self._caught_up.notify_all()

    def detach(self) -> None:
        """Leave the training client to the server; never waits."""
        self._clients -= 1
        if self._clients <= 0:
            self._left = True
            self._io.soon(self._leave_if_done)

    def _give_up(self, error: TGTinkerError, *, cancel: bool = False) -> None:
        """End whatever still waits."""
        with self._changing:
            waiting, self._waiting = self._waiting, {}
        for promise, _ in waiting.values():
            if cancel:
                promise.cancel()
            else:
                promise.fail(error)
        if not self._loaded.done:
            self._loaded.fail(error)

    # on the transport's thread

    def _begin(self) -> None:
        """Start the tasks; each holds the channel weakly between two waits, so that it can be let go."""
        self._reached = self._recorder.history.last_seq
        held = weakref.ref(self)
        self._tasks = [asyncio.ensure_future(listen(held, self._transport))]
        self._tasks += [
            asyncio.ensure_future(send(held, self._transport, self._outgoing)) for _ in range(SENDERS)
        ]
        if self._info.status != ClientStatus.INITIALIZING:
            self._note_status(self._info)

    def _tell_soon(self) -> None:
        if not self._telling and self._outbox:
            self._telling = True
            self._tasks.append(asyncio.ensure_future(self._tell()))

    async def _tell(self) -> None:
        """Send what is in the outbox, in order."""
        try:
            while self._outbox:
                events = [self._outbox[index] for index in range(min(len(self._outbox), 256))]
                self._told_number += 1
                headers = {"x-submitter": self._submitter, "x-number": str(self._told_number)}
                try:
                    answer = await self._transport.request(
                        "POST",
                        f"{self._path}/events",
                        json=[encode(event) for event in events],
                        headers=headers,
                    )
                    self._owed = max(self._owed, int(answer.json()["seq"]))
                except TGTinkerError as error:
                    logger.error("what a run told could not be recorded by the server: %s", error)
                for _ in events:
                    self._outbox.popleft()
        finally:
            self._telling = False
            self._notify()

    def _notify(self) -> None:
        with self._caught_up:
            self._caught_up.notify_all()

    def take(self, item: Mapping[str, Any]) -> None:
        """Take an item of the stream: record its event, tell the subscribers, end the operation that it ends."""
        event = decode(item["event"], Event)
        if event.seq <= self._reached:
            return
        if "info" in item:
            self._info = decode(item["info"], TrainingClientInfo)
        match event:
            case OperationStarted(future_id=future_id) if future_id in self._waiting:
                self._waiting[future_id][0].start()
            case Progress(future_id=future_id, done=done, total=total) if future_id in self._waiting:
                self._waiting[future_id][0].progress = (done, total)
            case StatusChanged() | StateLoaded():
                self._note_status(self._info)
        self._recorder.record(event)
        self._reached = event.seq
        self._notify()
        if "outcome" in item:
            self._end(item["outcome"])
        elif getattr(event, "future_id", None) in self._waiting and "info" in item:
            self.fail(event.future_id, ServerConnectionError("The server does not keep the result any more."))

    def _leave_if_done(self) -> None:
        """End the stream and the log, once nobody is left who holds the client or waits for an operation."""
        if self._left and not self._waiting and not self._outbox:
            self.closed = True
            for task in self._tasks:
                task.cancel()
            self._recorder.close()

    def _note_status(self, info: TrainingClientInfo) -> None:
        if info.status in (ClientStatus.READY, ClientStatus.BUSY):
            self._loaded.succeed(info)
        elif info.status == ClientStatus.ERROR and not self._loaded.done:
            self._tasks.append(asyncio.ensure_future(self._fail_loading()))

    async def _fail_loading(self) -> None:
        """Fetch the error that the loading ended with: a status has its text only."""
        try:
            await self._transport.request("GET", f"{self._path}/ready")
        except TGTinkerError as error:
            self._loaded.fail(error)

    def _end(self, outcome: Mapping[str, Any]) -> None:
        future_id = outcome["future_id"]
        if future_id not in self._waiting:
            return
        promise, _ = self._waiting[future_id]
        if "fetch" in outcome:
            self._tasks.append(asyncio.ensure_future(self._fetch(future_id, promise)))
        elif "error" in outcome:
            self.fail(future_id, error_of_code(**outcome["error"]))
        elif "result" in outcome:
            self._done(future_id)
            promise.succeed(decode(outcome["result"]))
        else:
            self._done(future_id)
            promise.cancel()

    async def _fetch(self, future_id: str, promise: Promise[Any]) -> None:
        try:
            answer = await self._transport.request("GET", f"/futures/{future_id}/result")
            value = wire.unpack(answer.headers["content-type"], answer.content)
        except TGTinkerError as error:
            self.fail(future_id, error)
        else:
            self._done(future_id)
            promise.succeed(value)

    def fail(self, future_id: str, error: TGTinkerError) -> None:
        """End an operation with an error."""
        with self._changing:
            promise, _ = self._waiting.pop(future_id, (None, ""))
        if promise is not None:
            self._failed = [(promise, future_id)]
            promise.fail(error)

    def _done(self, future_id: str) -> None:
        with self._changing:
            self._waiting.pop(future_id, None)
        self._tasks = [task for task in self._tasks if not task.done()]
        self._leave_if_done()


async def send(
    held: "weakref.ref[HttpChannel]", transport: HttpTransport, outgoing: "asyncio.Queue[Submission]"
) -> None:
    """Submit what is queued, one after the other; several of these run at once."""
    while True:
        submission = await outgoing.get()
        channel = held()
        if channel is None:
            return
        path, submitter = channel._path, channel._submitter
        del channel
        headers = {
            "content-type": submission.media_type,
            "x-submitter": submitter,
            "x-number": str(submission.number),
            "x-future-id": submission.future_id,
            "x-verb": submission.verb,
        }
        if submission.knows_of is not None:
            headers["x-knows-of"] = submission.knows_of
        try:
            await transport.request("POST", f"{path}/operations", content=submission.body, headers=headers)
        except TGTinkerError as error:
            channel = held()
            if channel is not None:
                channel.fail(submission.future_id, error)


async def listen(held: "weakref.ref[HttpChannel]", transport: HttpTransport) -> None:
    """Read the stream, and begin again where it broke off, until the training client is closed or let go."""
    lost: float | None = None
    while (channel := held()) is not None and not channel.closed:
        path, headers = channel._path, {"last-event-id": str(channel._reached), "accept": "text/event-stream"}
        terminated = channel._info.status == ClientStatus.TERMINATED
        del channel
        if terminated:
            return
        try:
            timeout = httpx.Timeout(30.0, connect=5.0)
            async with transport.http.stream(
                "GET", f"{PREFIX}{path}/stream", headers=headers, timeout=timeout
            ) as answer:
                if not answer.is_success:
                    await answer.aread()
                    raise error_in(answer)
                async for line in answer.aiter_lines():
                    lost = None
                    if line.startswith("data:"):
                        channel = held()
                        if channel is None or channel.closed:
                            return
                        channel.take(json.loads(line[5:]))
                        del channel
        except httpx.TransportError as error:
            lost = lost or time.monotonic()
            channel = held()
            if channel is not None and time.monotonic() - lost > PATIENCE:
                channel._give_up(transport.unreachable(error))
            del channel
        except TGTinkerError as error:
            channel = held()
            if channel is not None:
                channel._give_up(error)
            return
        await asyncio.sleep(0.2)


def error_in(answer: httpx.Response) -> TGTinkerError:
    """Return the error that an answer holds."""
    try:
        found = answer.json()["error"]
        return error_of_code(
            found["code"], found["message"], found.get("details") or {}, found.get("request_id")
        )
    except (ValueError, KeyError, TypeError):
        if answer.status_code in (401, 403):
            return AuthenticationError(f"{answer.url} refused the request ({answer.status_code}).")
        return ServerConnectionError(
            f"{answer.url} answered {answer.status_code} {answer.reason_phrase}, which no tensafe-nb server "
            f"says. Is the address right?"
        )


def quoted(name: str) -> str:
    """Return a name as one part of a path."""
    from urllib.parse import quote

    return quote(name, safe="")


def extract(archive: bytes, folder: Path) -> None:
    """Unpack a tar archive of plain files into a new folder, whole or not at all."""
    draft = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    draft.mkdir(parents=True, mode=0o700)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(draft, filter="data")
    if folder.exists():
        folder.rmdir()
    draft.replace(folder)
