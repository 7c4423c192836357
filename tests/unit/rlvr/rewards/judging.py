"""An OpenAI-compatible endpoint on loopback that answers as a test tells it to."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

Reply = tuple[int, dict[str, str], Any]  # status, headers, body


def said(text: Any, **more: Any) -> Reply:
    """Return a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
    return 200, {}, {"object": "chat.completion", "choices": [choice], "usage": {"total_tokens": 7}}


class Endpoint:
    """Answers each request with what `reply` says to it; keeps what it was asked."""

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any]], Reply] = lambda asked: said("Score: 10")
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.at_once = self.most_at_once = 0
        self.gate: threading.Event | None = None

    def shown(self) -> list[dict[str, Any]]:
        """Return what the judge was shown with each request."""
        return [json.loads(asked["messages"][1]["content"]) for asked in self.asked]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        asked = json.loads(body)
        self.asked.append(asked)
        self.paths.append(scope["path"])
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        status, headers, answer = self.reply(asked)
        text = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        given = {"content-type": "application/json", **headers}.items()
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(n.encode(), v.encode()) for n, v in given],
            }
        )
        await send({"type": "http.response.body", "body": text})


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """Serve an app on loopback; give its address."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="judge")
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
