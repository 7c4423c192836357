"""The guard of a server: checks the host a request names, the size of its body, and whose token it bears."""

import json
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, TypeAlias

from tensafe_nb.server.tokens import Tokens

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = ("/health", "/ready", "/live", "/version")  # probes; they tell no secret
MOST_BODY_BYTES = 64 << 20
UNBOUNDED = (
    "PUT",
    "/api/v1/artifacts",
)  # its body goes to the disk as it comes, within what the tenant may store
LOOPBACK = ("127.0.0.1", "localhost", "::1", "testserver")


class Guard:
    """Pure ASGI, so that a stream passes through it unbuffered.

    Args:
        app: What it guards.
        tokens: Who may enter; the tenant goes into the request's state.
        hosts: Names by which the server may be called, besides loopback ones: a page that has its own name point
            here (DNS rebinding) is turned away. "*" takes any, behind a proxy that checks.
        requests_per_minute: Of one tenant.
    """

    def __init__(
        self, app: App, tokens: Tokens, hosts: Sequence[str] = (), requests_per_minute: int = 60_000
    ) -> None:
        self._app, self._tokens, self._hosts = app, tokens, {*LOOPBACK, *hosts}
        self._most = requests_per_minute
        self._recent: dict[str, deque[float]] = {}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req-{secrets.token_hex(6)}"
        scope.setdefault("state", {})["request_id"] = request_id
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            status, code, message, more = refusal
            await refuse(send, status, code, message, request_id, more)
            return
        await self._app(scope, receive if is_unbounded(scope) else bounded(receive, request_id), send)

    def _refusal(
        self, scope: Message, headers: dict[str, str]
    ) -> tuple[int, str, str, dict[str, str]] | None:
        host = headers.get("host", "").rsplit(":", 1)[0].strip("[]")
        if "*" not in self._hosts and host not in self._hosts:
            return 421, "wrong_host", "This server is not called by that name; see `serve --host-name`.", {}
        origin = headers.get("origin")
        if origin is not None and origin.split("//")[-1] != headers.get("host"):
            return 403, "foreign_origin", "Pages of other sites may not call this server.", {}
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or (int(declared) > MOST_BODY_BYTES and not is_unbounded(scope)):
            return 413, "too_large", f"A body has at most {MOST_BODY_BYTES} bytes.", {}
        if path_of(scope) in OPEN:
            return None
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        tenant = self._tokens.tenant_of(secret.strip()) if scheme.lower() == "bearer" else None
        if tenant is None:
            message = "A valid token is needed: ServiceClient(base_url, api_key=…). `tensafe-nb tokens new` makes one."
            return 401, "unauthorized", message, {"www-authenticate": "Bearer"}
        scope["state"]["tenant"] = tenant
        return self._too_many(tenant)

    def _too_many(self, tenant: str) -> tuple[int, str, str, dict[str, str]] | None:
        now, recent = time.monotonic(), self._recent.setdefault(tenant, deque())
        while recent and recent[0] < now - 60:
            recent.popleft()
        if len(recent) >= self._most:
            wait = max(1, round(60 - (now - recent[0])))
            message = f"More than {self._most} requests within a minute; wait {wait} s."
            return 429, "too_many_requests", message, {"retry-after": str(wait)}
        recent.append(now)
        return None


def path_of(scope: Message) -> str:
    """Return the path of a request beneath that under which a proxy offers the server."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def is_unbounded(scope: Message) -> bool:
    """Whether the route itself bounds the body."""
    return (scope["method"], path_of(scope)) == UNBOUNDED


class BodyTooLargeError(Exception):
    """A body without a declared length grew beyond what is taken."""


def bounded(receive: Receive, request_id: str) -> Receive:
    """Count a body as it comes, whatever length it was declared to have."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MOST_BODY_BYTES:
            raise BodyTooLargeError(request_id)
        return message

    return counted


async def refuse(
    send: Send, status: int, code: str, message: str, request_id: str, headers: dict[str, str]
) -> None:
    """Answer with an error, in the form that all errors have."""
    error = {"code": code, "message": message, "details": {}, "request_id": request_id}
    body = json.dumps({"error": error}).encode()
    sent = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    sent += [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": sent})
    await send({"type": "http.response.body", "body": body})
