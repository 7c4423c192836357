"""The process of a server: who dawdles is hung up on, and before it stops it drains, while streams still tell."""

import asyncio
import contextlib
import ctypes
import os
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tensafe_nb.server.door.guard import MOST_HEAD_BYTES

HEAD_SECONDS = 15.0  # in which the headers of a request have to come
STALLED_SECONDS = 120.0  # that a reader may take nothing of what there is for it
M_ARENA_MAX = -8  # of glibc's mallopt(3)


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's, which by itself waits for ever: for the rest of a request's headers, and for a reader of an answer.

    It keeps however many headers come, too.
    """

    _in_head, _came = True, 0
    _waiting: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Take in what came."""
        if self._waiting is None and (self.cycle is None or self.cycle.response_complete):
            self._wait()
        super().data_received(data)
        if self._in_head:
            self._came += len(data)
            if self._came > MOST_HEAD_BYTES:
                self._end(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        """Begin to count."""
        super().on_message_begin()
        self._in_head, self._came = True, 0

    def on_headers_complete(self) -> None:
        """Stop waiting."""
        self._in_head = False
        self._stop_waiting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        self._reads_on()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Begin to wait for a reader that has stopped reading."""
        super().pause_writing()
        self._reads_on()
        self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop waiting."""
        self._reads_on()
        super().resume_writing()

    def _reads_on(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(HEAD_SECONDS, self._end, b"408 Request Timeout")

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _end(self, status: bytes) -> None:
        self._stop_waiting()
        if not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            )
            self.transport.close()


class Server(uvicorn.Server):
    """A uvicorn whose application is drained at SIGTERM, before its connections are closed."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then shut down."""
        await self.drain()
        await super().shutdown(sockets)

    async def drain(self) -> None:
        """Finish what runs, refuse what is new, end the streams, write out the logs."""
        await self.config.app.state.service.drain()  # type: ignore[union-attr]


def server_of(app: Any, *, seconds_to_stop: int = 30) -> Server:
    """Return what serves an application."""
    return Server(
        uvicorn.Config(
            app,
            http=PatientProtocol,
            ws="none",
            log_level="warning",
            timeout_graceful_shutdown=seconds_to_stop,
            server_header=False,
            proxy_headers=False,
        )
    )


def spare_the_system() -> None:
    """Let a process of many threads keep little memory that it has freed, and open as many connections as it may."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc: its allocator has no arenas
        ctypes.CDLL("libc.so.6").mallopt(M_ARENA_MAX, max(2, os.cpu_count() or 2))
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
