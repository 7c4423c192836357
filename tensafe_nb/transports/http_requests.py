"""A server as one process sees it: its address, what it offers, and a thread of its own on which all requests run."""

import asyncio
import functools
import os
import ssl
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import httpx

from tensafe_nb.errors import (
    AuthenticationError,
    ClientClosedError,
    FutureCancelledError,
    ServerConnectionError,
    TGTinkerError,
    ValidationError,
    error_of_code,
)
from tensafe_nb.futures import HEARTBEAT, FutureHandle, Promise, handle_of
from tensafe_nb.protocol import wire
from tensafe_nb.protocol.codec import decode
from tensafe_nb.protocol.losses import LossDeclaration
from tensafe_nb.protocol.results import FutureStatus

R = TypeVar("R")

PREFIX = "/api/v1"
PATIENCE = 60.0  # s without an answer until what waits fails; a restart takes 5 to 21
FIRST_CONTACT = (
    5.0  # s that the first answer is waited for, where something is there and does not answer well
)
ANSWER = 30.0  # s without an answer until a request is sent again
WAIT = 20.0  # s that the server waits for a result before it says that there is none yet
CONNECT = 5.0  # s until a connection stands
CONNECTIONS = 8  # that are kept open: of a training client, those of its senders and its stream
PASSING = {
    429,
    502,
    503,
    504,
}  # what a proxy says while its server restarts, and a server that is asked too often


@functools.cache
def certificates() -> ssl.SSLContext:
    """Return whom to trust; reading that takes a tenth of a second."""
    return httpx.create_ssl_context()


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
        """Run a coroutine there and wait for it, in slices, so that an interrupt is seen.

        Raises:
            ValidationError: Called on that very thread.
            ClientClosedError: The thread has ended.
        """
        if threading.current_thread() is self.thread:
            work.close()
            raise ValidationError(
                "This runs on the thread that talks to the server (a callback or a subscriber): asking the server here "
                "would wait for ever. Ask elsewhere."
            )
        try:
            future = asyncio.run_coroutine_threadsafe(work, self.loop)
        except RuntimeError:
            work.close()
            raise ClientClosedError("This ServiceClient is closed. Create a new one.") from None
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


class Requests:
    """Sends requests to one server, and reads its answers.

    Args:
        base_url: Of the server, such as "http://127.0.0.1:8000"; a query, such as a proxy's "?token=…", goes with every
            request and is shown nowhere.
        api_key: The bearer token; it is sent to this server only.
        patience: Seconds without an answer until what waits fails.

    Raises:
        ServerConnectionError: Nothing answers there.
        AuthenticationError: It takes no such token.
    """

    def __init__(self, base_url: str, api_key: str | None, patience: float = PATIENCE) -> None:
        address, self.patience = httpx.URL(base_url), patience
        self.url = str(address.copy_with(query=None)).rstrip("/")
        self.closed, self._pid = False, os.getpid()
        self.streams_held_back = False  # by a proxy on the way: then the stream is asked for in pieces
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "params": address.params,
            "headers": {} if api_key is None else {"authorization": f"Bearer {api_key}"},
            "timeout": httpx.Timeout(ANSWER, connect=CONNECT),
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=CONNECTIONS),
            "verify": certificates(),
        }
        self._http = httpx.AsyncClient(**self._options)
        self._lines: dict[str, httpx.AsyncClient] = {}  # by the paths of training clients
        self._ending: set[asyncio.Task[None]] = set()
        self.io = LoopThread(f"tsnb-http-{uuid.uuid4().hex[:6]}")
        try:
            self.capabilities: dict[str, Any] = self.get("/capabilities", is_first=True)
            self.losses: dict[str, LossDeclaration] = {}
            self.ask_for_losses()
        except BaseException:
            self.close()
            raise

    def ask_for_losses(self) -> None:
        """Read which losses are registered there, and what each takes."""
        declared = (decode(entry, LossDeclaration) for entry in self.get("/losses"))
        self.losses = {loss.name: loss for loss in declared}

    def limit(self, name: str, otherwise: int) -> int:
        """Return how much of something one request may hold, as the server says."""
        return int(self.capabilities.get("limits", {}).get(name, otherwise))

    # on the thread

    def open_line(self, path: str) -> httpx.AsyncClient:
        """Give a training client connections of its own: what is beneath its path goes over those.

        httpx looks through all connections of a pool at every request, and beyond a few keeps none of them open.
        """
        line = self._lines[path] = httpx.AsyncClient(event_hooks=self._http.event_hooks, **self._options)
        return line

    def end_line(self, path: str, line: httpx.AsyncClient) -> None:
        """Close a training client's connections, soon."""
        if self._lines.get(path) is line:
            del self._lines[path]
        ending = asyncio.ensure_future(line.aclose())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    def _line_of(self, path: str) -> httpx.AsyncClient:
        return self._lines.get("/".join(path.split("/", 3)[:3]), self._http)

    async def _close_lines(self) -> None:
        for line in (self._http, *self._lines.values()):
            await line.aclose()
        await asyncio.gather(*self._ending, return_exceptions=True)

    async def send(
        self,
        method: str,
        path: str,
        *,
        patience: float | None = None,
        is_first: bool = False,
        is_wanted: Callable[[], bool] = lambda: True,
        **options: Any,
    ) -> httpx.Response:
        """Send a request until it is answered, and return the answer; `content` may be a function that makes it anew.

        However often it has to be sent, the server does once what it asks for: every try bears one name.

        Args:
            method: GET, POST, PUT or DELETE.
            path: Behind the server's prefix.
            patience: For so many seconds it is sent again.
            is_first: Nothing was heard of the server yet: what is no server at all is not waited for.
            is_wanted: Once this is False, it is not sent again.
            options: Of httpx.

        Raises:
            ServerConnectionError: No answer within the patience.
            TGTinkerError: What the server said.
        """
        patience = self.patience if patience is None else patience
        began, pause, made = time.monotonic(), 0.1, options.pop("content", None)
        if is_first:
            patience = FIRST_CONTACT
        if method != "GET":
            options["headers"] = {"x-once": uuid.uuid4().hex} | options.get("headers", {})
        while True:
            content = made() if callable(made) else made
            try:
                answer = await self._line_of(path).request(method, PREFIX + path, content=content, **options)
            except httpx.RequestError as error:
                found: TGTinkerError = self.unreachable(error)
                hopeless = is_first and isinstance(error, httpx.ConnectError)
            else:
                if is_servers(answer) and (answer.is_success or "x-in-turn" in answer.headers):
                    return answer  # what was refused in its turn is on the way to fail
                found, wait = error_in(answer), waiting_asked_for(answer)
                if wait is not None and patience > 0 and found.code not in LASTING and is_wanted():
                    began = time.monotonic()  # it answers: nothing is lost by waiting
                    await asyncio.sleep(wait)
                    continue
                hopeless = not passes(answer, found) or (is_first and answer.status_code not in PASSING)
            if hopeless or patience - (time.monotonic() - began) < pause or not is_wanted():
                raise found
            await asyncio.sleep(pause)
            pause = min(2 * pause, 2.0)

    def stream(
        self,
        path: str,
        headers: Mapping[str, str],
        params: Mapping[str, Any] | None = None,
        *,
        silence: float = ANSWER,
    ) -> Any:
        """Return the context of an answer that is read as it comes; nothing for some seconds, and it is over."""
        timeout = httpx.Timeout(silence, connect=CONNECT)
        return self._line_of(path).stream(
            "GET", PREFIX + path, headers=dict(headers), params=params or None, timeout=timeout
        )

    def unreachable(self, error: Exception) -> ServerConnectionError:
        """Say that the server does not answer."""
        why = str(error) or type(error).__name__
        return ServerConnectionError(
            f"The server {self.url} does not answer ({why}). Is it running (tensafe-nb serve), is the "
            f"address right?"
        )

    # elsewhere

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request from any thread but the transport's own, and wait for the answer."""
        self.refuse_if_gone()
        return self.io.call(self.send(method, path, **options))

    @property
    def is_forked(self) -> bool:
        """Whether this is a child of the process that all of it belongs to."""
        return os.getpid() != self._pid

    @property
    def is_over(self) -> bool:
        """Whether nothing more can come of it."""
        return self.closed or self.is_forked

    def refuse_if_gone(self) -> None:
        """Refuse to go on where no thread does.

        Raises:
            ClientClosedError: This was closed, or belongs to the process that this one was forked from.
        """
        if self.is_forked:
            raise ClientClosedError(
                "This ServiceClient belongs to the process this one was forked from. Create one here."
            )
        if self.closed:
            raise ClientClosedError("This ServiceClient is closed. Create a new one.")

    def get(self, path: str, **options: Any) -> Any:
        """Return the JSON of an address."""
        return self.call("GET", path, **options).json()

    def record(self, method: str, path: str, kind: type[R], **options: Any) -> R:
        """Return the record that a request is answered with."""
        answer = self.call(method, path, **options)
        found: R = wire.unpack(answer.headers["content-type"], answer.content, kind)
        return found

    def follow(self, future_id: str, operation: str, of: str, kind: type[R]) -> FutureHandle[R]:
        """Return a handle of something that the server does beside its training clients.

        Args:
            future_id: Names it there.
            operation: What it is.
            of: Whose; stands for the training client.
            kind: Of its result.
        """
        promise: Promise[R] = Promise()
        promise.start()
        promise.owner = self.io.thread
        path = f"/futures/{quoted(future_id)}"

        async def fetch() -> None:
            try:
                while True:
                    answer = await self.send("GET", f"{path}/result", params={"wait": WAIT})
                    if answer.status_code != httpx.codes.ACCEPTED:
                        break
                promise.succeed(wire.unpack(answer.headers["content-type"], answer.content, kind))
            except FutureCancelledError:
                promise.cancel()
            except TGTinkerError as error:
                promise.fail(error)
            except asyncio.CancelledError:  # this ServiceClient is closed
                promise.cancel()
                raise

        def cancel() -> bool:
            if not promise.done:
                self.call("POST", f"{path}/cancel")
                promise.wait()
            return promise.state is FutureStatus.CANCELLED

        asyncio.run_coroutine_threadsafe(fetch(), self.io.loop)
        return handle_of(promise, operation, of, kind, cancel)

    def close(self) -> None:
        """End the thread; idempotent."""
        if not self.is_over:
            self.closed = True
            with suppress(TGTinkerError):
                self.io.call(self._close_lines())
            self.io.close()


LASTING = {"queue_full", "too_many", "key_unavailable"}  # waiting a second does not help


def is_servers(answer: httpx.Response) -> bool:
    """Whether a server of ours has answered, and not something on the way to it: a proxy, a page to log in."""
    return "x-tensafe-request" in answer.headers


def passes(answer: httpx.Response, error: TGTinkerError) -> bool:
    """Whether asking again is worth it: a proxy says so while its server restarts, a server that is about to stop."""
    if is_servers(answer):
        return answer.status_code in PASSING and error.code not in LASTING
    return answer.status_code not in (401, 403, 413)


def check_answer(answer: httpx.Response) -> None:
    """Refuse an answer that does not hold what was asked for; it has been read.

    Raises:
        ServerConnectionError: Something on the way has answered, or the server does not take it now: ask again.
        TGTinkerError: What the server said.
    """
    if is_servers(answer) and answer.is_success:
        return
    error = error_in(answer)
    if passes(answer, error) and not isinstance(error, ServerConnectionError):
        raise ServerConnectionError(error.message) from error
    raise error


def waiting_asked_for(answer: httpx.Response) -> float | None:
    """Return how many seconds a server that has too much to do asks to wait, if it does."""
    asked = answer.headers.get("retry-after", "") if answer.status_code == 429 else ""
    return min(float(asked), PATIENCE) if asked.isdecimal() else None


async def lines_of(answer: httpx.Response, silence: float) -> AsyncIterator[bytes]:
    """Yield the lines of an answer as they come.

    Raises:
        TimeoutError: Nothing came for so many seconds.
    """
    rest, chunks = b"", answer.aiter_bytes()
    while True:
        try:
            async with asyncio.timeout(silence):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line


def error_in(answer: httpx.Response) -> TGTinkerError:
    """Return the error that an answer holds."""
    try:
        found = answer.json()["error"]
        error = error_of_code(
            found["code"], found["message"], found.get("details") or {}, found.get("request_id")
        )
    except (ValueError, KeyError, TypeError):
        asked = answer.url.copy_with(query=None)  # a proxy's token may be behind it
        if answer.status_code in (401, 403):
            return AuthenticationError(
                f"{asked} refused the request ({answer.status_code}), and it was not the server that did: something "
                f"on the way wants to know who you are. A token of its own goes into the address: "
                f"https://…/?token=…"
            )
        if answer.status_code == 413:
            size = answer.request.headers.get("content-length", "so many")
            return ServerConnectionError(
                f"Something on the way to {asked} takes no request of {size} bytes. Send smaller batches, or let "
                f"whoever runs that proxy take more (nginx: client_max_body_size)."
            )
        return ServerConnectionError(
            f"{asked} answered {answer.status_code} {answer.reason_phrase}, which no tensafe-nb server says. Is the "
            f"address right?"
        )
    return error


def quoted(name: str) -> str:
    """Return a name as one part of a path."""
    from urllib.parse import quote

    return quote(name, safe="")
