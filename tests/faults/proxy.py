"""A network that is bad, on loopback: a proxy that loses, delays, repeats, cuts off and reorders what goes through it.

What befalls a request is drawn from a seed and the request's place in the order in which they come. Every request of a
client has a line of its own to the server, so that two that were delayed overtake each other.
"""

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

FATES = {  # of a request, and how often
    "passes": 40,
    "is late": 20,  # the request, its answer, or both: others overtake it
    "never arrives": 5,  # the line is closed
    "is swallowed": 2,  # the line stays open, and nothing comes
    "arrives twice": 8,
    "loses its answer": 7,
    "has its answer cut off": 6,
    "is reset": 4,
    "is refused on the way": 4,  # 502, 503, 504 by the proxy; it never arrives
    "is refused on the way back": 3,  # as above, but it has arrived
    "ends elsewhere": 1,  # a page to log in, and 200
}
OF_STREAMS = {"passes": 5, "is late": 2, "has its answer cut off": 5, "is reset": 3, "falls silent": 2}
OF_STREAMS |= {"is refused on the way": 2, "ends elsewhere": 1}
LATEST = 0.04  # s
PAGE = b"<html>Welcome to the hotel. Please log in.</html>"


class BadNetwork:
    """A proxy between a client and a server on this machine, on a thread of its own.

    Args:
        url: Of the server; it may be killed and begun again meanwhile.
        seed: Decides what befalls which request.
        holds_streams: It keeps every stream to itself until it has ended.
        harm: Whether anything befalls anything by chance; can be changed at any time.
        script: Decides about requests, given their first lines: names what befalls one, or says what the proxy itself
            answers; None leaves it to chance.
    """

    def __init__(
        self,
        url: str,
        seed: int = 0,
        *,
        holds_streams: bool = False,
        harm: bool = True,
        script: Callable[[str], str | bytes | None] = lambda request: None,
    ) -> None:
        self._port = int(url.rsplit(":", 1)[1])
        self._seed, self.holds_streams, self.harm, self.script = seed, holds_streams, harm, script
        self._number = 0
        self.befell: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._lines: set[asyncio.Task[Any]] = set()
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, args=(listening,), name="bad network")
        self._thread.start()

    def _run(self, listening: socket.socket) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, sock=listening))
        self._loop.run_forever()
        server.close()
        for line in self._lines:
            line.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._lines, return_exceptions=True))
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    def cut(self) -> None:
        """Cut every line that there is."""

        def cut() -> None:
            for line in self._lines:
                line.cancel()

        self._loop.call_soon_threadsafe(cut)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def __enter__(self) -> "BadNetwork":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._lines.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                await self._meet(await read_request(reader), writer)
        except asyncio.CancelledError:  # the proxy ends
            pass
        finally:
            self._lines.discard(task)
            writer.close()

    async def _meet(self, request: bytes, near: asyncio.StreamWriter) -> None:
        self._number += 1
        chance = random.Random(f"{self._seed} {self._number}")
        first = request.split(b"\r\n", 1)[0].decode()
        fates = OF_STREAMS if "/stream " in first else FATES
        fate = self.script(first)
        if isinstance(fate, bytes):
            near.write(fate)
            return
        if fate is None:
            fate = chance.choices(list(fates), list(fates.values()))[0] if self.harm else "passes"
        self.befell[fate] += 1
        match fate:
            case "never arrives":
                pass
            case "is swallowed":
                await asyncio.sleep(3_600)
            case "is refused on the way":
                self._refuse(near, chance)
            case "ends elsewhere":
                head = f"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: {len(PAGE)}\r\n"
                near.write(head.encode() + b"connection: close\r\n\r\n" + PAGE)
            case "is late":
                await asyncio.sleep(chance.uniform(0, LATEST))
                await self._carry(request, near, late=chance.uniform(0, LATEST))
            case "arrives twice":
                await asyncio.gather(self._carry(request, near), self._carry(request, None))
            case "loses its answer":
                await self._carry(request, None)
            case "is refused on the way back":
                await self._carry(request, None)
                self._refuse(near, chance)
            case "passes":
                await self._carry(request, near)
            case _:
                if not await self._carry(request, near, chance.randrange(3_000)):
                    await self._cut_off(fate, near)

    async def _cut_off(self, fate: str, near: asyncio.StreamWriter) -> None:
        if fate == "is reset":  # RST, not FIN: what was on its way is lost
            line = near.get_extra_info("socket")
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif fate == "falls silent":
            await asyncio.sleep(3_600)

    def _refuse(self, near: asyncio.StreamWriter, chance: random.Random) -> None:
        status = chance.choice((b"502 Bad Gateway", b"503 Service Unavailable", b"504 Gateway Timeout"))
        near.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 8\r\nconnection: close\r\n\r\n<p>nginx")

    async def _carry(
        self, request: bytes, near: asyncio.StreamWriter | None, most: int | None = None, late: float = 0.0
    ) -> bool:
        """Bring a request to the server, and its answer, or so many bytes of it, back; False if it was cut off."""
        try:
            reader, far = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:  # the server has been killed
            if near is not None:
                self._refuse(near, random.Random(0))
            return True
        try:
            far.write(request)
            passed, holds = 0, None
            while data := await reader.read(1 << 16):
                if holds is None:
                    holds = self.holds_streams and b"text/event-stream" in data
                    await asyncio.sleep(late)
                if most is not None and passed + len(data) > most:
                    if near is not None:
                        near.write(data[: most - passed])
                        await near.drain()
                    return False
                passed += len(data)
                if near is not None and not holds:
                    near.write(data)
                    await near.drain()
            return True
        finally:
            far.close()


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """Read one request, and let it be the last of its line."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head[:-4].split(b"\r\n")
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
    body = b""
    if fields.get(b"transfer-encoding") == b"chunked":
        while not body.endswith(b"\r\n0\r\n\r\n") and body != b"0\r\n\r\n":
            body += await reader.readuntil(b"\r\n")
            size = int(body.rsplit(b"\r\n", 2)[-2], 16)
            body += await reader.readexactly(size + 2)
    else:
        body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
    kept = [line for line in lines if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([*kept, b"connection: close", b"", b""]) + body
