"""The guard of a server: checks the host a request names, the form and the pace of it, and whose token it bears."""

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from starlette.exceptions import HTTPException

from tensafe_nb.errors import TGTinkerError
from tensafe_nb.server.answers import SIGNATURES, form_of, without_paths
from tensafe_nb.server.door.limits import Quotas
from tensafe_nb.server.door.once import Answers, App, Message, Once, Receive, Send, is_lasting

OPEN = ("/health", "/ready", "/live", "/version")  # probes; they tell no secret
MOST_BODY_BYTES = 64 << 20
UNBOUNDED = (
    "PUT",
    "/api/v1/artifacts",
)  # its body goes to the disk as it comes, within what the tenant may store
LOOPBACK = ("127.0.0.1", "localhost", "::1", "testserver")
MOST_HEADERS, MOST_HEAD_BYTES = 100, 1 << 16
ONCE = ("host", "authorization", "x-api-key", "origin", "content-length", "content-type", "transfer-encoding")
BODY_SECONDS = (
    30.0  # in which a body has to come, and as much again for each BODY_RATE × BODY_SECONDS bytes of it
)
BODY_RATE = 16 << 10  # bytes a second: who is slower is hung up on


API_KEY_PREFIX = "tml-"  # before a token of ours in the header X-API-Key: the Tinker SDK sends no other key
SCHEMES = ("bearer", "token")  # the second is how Jupyter's own clients say it


class WhoIs(Protocol):
    """Says who it is that a token belongs to."""

    async def whose(self, secret: str) -> str | None:
        """Return the tenant; None where it is nobody's.

        Raises:
            TGTinkerError: Whoever could say it does not answer.
        """


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request goes no further."""

    status: int
    code: str
    message: str
    headers: dict[str, str] = field(default_factory=dict)


class Guard:
    """Pure ASGI, so that a stream passes through it unbuffered.

    Args:
        app: What it guards.
        identity: Who may enter; the tenant goes into the request's state.
        quotas: How often.
        hosts: Names by which the server may be called, besides loopback ones: a page that has its own name point
            here (DNS rebinding) is turned away. "*" takes any, behind a proxy that checks.
        root_path: The path under which a proxy offers it, whether the proxy takes it away or not.
        answers_of: Returns what is kept of a tenant's answers; see `Once`.
        api_keys: A token may also come as X-API-Key, behind "tml-".
    """

    def __init__(
        self,
        app: App,
        identity: WhoIs,
        quotas: Quotas,
        hosts: Sequence[str] = (),
        root_path: str = "",
        answers_of: Callable[[str], Answers] | None = None,
        *,
        api_keys: bool = False,
    ) -> None:
        self._api_keys = api_keys
        self._app, self._identity, self._quotas, self._root_path = (
            app,
            identity,
            quotas,
            root_path.rstrip("/"),
        )
        self._hosts = {*LOOPBACK, *(host.lower() for host in hosts)}
        self._once = Once(app, answers_of)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req-{secrets.token_hex(6)}"
        scope.setdefault("state", {}).update(request_id=request_id, asked=None)
        send = signed(send, request_id)
        if self._root_path:
            scope["root_path"] = self._root_path
        headers = headers_of(scope)
        refusal = self._of_form(scope, headers) or await self._of_right(scope, headers)
        if refusal is not None:
            self._quotas.note(refusal.code)
            await refuse(send, refusal, request_id, path_of(scope))
            return
        most = None if is_unbounded(scope) else MOST_BODY_BYTES
        once = headers.get("x-once", "")
        if once and scope["method"] != "GET":
            lasting = is_lasting(path_of(scope), headers)
            tenant = scope["state"].get("tenant", "")
            await self._once.answer(tenant, once, scope, paced(receive, most), send, lasting=lasting)
        else:
            await self._app(scope, paced(receive, most), send)

    def _of_form(self, scope: Message, headers: dict[str, str]) -> Refusal | None:
        """Say what is wrong with a request, whoever sends it."""
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        size += len(scope.get("raw_path", b"")) + len(scope["query_string"])
        if len(scope["headers"]) > MOST_HEADERS or size > MOST_HEAD_BYTES:
            most = f"{MOST_HEADERS} headers, and {MOST_HEAD_BYTES:,} bytes before its body"
            return Refusal(431, "too_large", f"A request has at most {most}.")
        if len(headers) < len(
            scope["headers"]
        ):  # two readers of such a request may take it for two different ones
            names = [name.decode("latin-1").lower() for name, _ in scope["headers"]]
            twice = [name for name in ONCE if names.count(name) > 1]
            if twice:
                return Refusal(400, "bad_request", f"The header {twice[0]} is there more than once.")
        if "*" not in self._hosts and name_of(headers.get("host", "")) not in self._hosts:
            return Refusal(
                421, "wrong_host", "This server is not called by that name; see `serve --host-name`."
            )
        origin = headers.get("origin")
        if origin is not None and origin.split("//")[-1] != headers.get("host"):
            return Refusal(403, "foreign_origin", "Pages of other sites may not call this server.")
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or (int(declared) > MOST_BODY_BYTES and not is_unbounded(scope)):
            return Refusal(413, "too_large", f"A body has at most {MOST_BODY_BYTES} bytes.")
        if headers.get("content-encoding", "identity").lower() != "identity":
            return Refusal(
                415, "unsupported_encoding", "Bodies are sent as they are: this server unpacks nothing."
            )
        return None

    async def _of_right(self, scope: Message, headers: dict[str, str]) -> Refusal | None:
        """Say whether whoever sends a request may."""
        if path_of(scope) in OPEN:
            return None
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        key = headers.get("x-api-key", "") if self._api_keys else ""
        if not scheme and key.startswith(API_KEY_PREFIX):
            scheme, secret = "token", key.removeprefix(API_KEY_PREFIX)
        try:
            tenant = await self._identity.whose(secret.strip()) if scheme.lower() in SCHEMES else None
        except TGTinkerError as error:  # who could say it does not answer
            return Refusal(503, error.code, error.message, {"retry-after": "2"})
        if tenant is None:
            message = "A valid token is needed: ServiceClient(base_url, api_key=…). `tensafe-nb tokens new` makes one."
            return Refusal(401, "unauthorized", message, {"www-authenticate": "Bearer"})
        scope["state"]["tenant"] = tenant
        wait = self._quotas.seconds_to_wait(tenant)
        if wait:
            most = self._quotas.of(tenant).requests
            message = f"More than {most:,} requests within a minute; wait {wait} s."
            return Refusal(429, "too_many_requests", message, {"retry-after": str(wait)})
        return None


def signed(send: Send, request_id: str) -> Send:
    """Let answers say that this server gave them, and no proxy on the way."""

    async def sign(message: Message) -> None:
        if message["type"] == "http.response.start":
            signatures = [(name.encode(), request_id.encode()) for name in SIGNATURES]
            message["headers"] = [*message["headers"], *signatures]
        await send(message)

    return sign


def headers_of(scope: Message) -> dict[str, str]:
    """Return the headers of a request by their names in lower case."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def name_of(host: str) -> str:
    """Return the name in a Host header: what stands before the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def path_of(scope: Message) -> str:
    """Return the path of a request beneath that under which a proxy offers the server."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def is_unbounded(scope: Message) -> bool:
    """Whether the route itself bounds the body."""
    return (scope["method"], path_of(scope)) == UNBOUNDED


class BodyTooLargeError(HTTPException):
    """A body without a declared length grew beyond what is taken."""

    def __init__(self) -> None:
        super().__init__(413, f"A body has at most {MOST_BODY_BYTES} bytes.")


class BodyTooSlowError(HTTPException):
    """A body comes so slowly that whoever sends it only wants to hold the line."""

    def __init__(self) -> None:
        super().__init__(408, f"The body came too slowly: at least {BODY_RATE} bytes a second are expected.")


def paced(receive: Receive, most: int | None) -> Receive:
    """Count a body as it comes, whatever length it was declared to have, and look at the clock meanwhile."""
    seen, more, began = 0, True, time.monotonic()

    async def counted() -> Message:
        nonlocal seen, more
        if not more:  # what is waited for now is that the other side leaves
            return await receive()
        left = began + BODY_SECONDS + seen / BODY_RATE - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left)):
                message = await receive()
        except TimeoutError:
            raise BodyTooSlowError from None
        seen += len(message.get("body", b""))
        more = bool(message.get("more_body", False))
        if most is not None and seen > most:
            raise BodyTooLargeError
        return message

    return counted


async def refuse(send: Send, refusal: Refusal, request_id: str, path: str) -> None:
    """Answer with an error, in the form that all errors have at a path."""
    message = without_paths(refusal.message)
    error = {"code": refusal.code, "message": message, "details": {}, "request_id": request_id}
    status, content = form_of(path, refusal.status, error)
    body = json.dumps(content).encode()
    sent = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    sent += [(name.encode(), value.encode()) for name, value in refusal.headers.items()]
    if refusal.status in (413, 431):
        sent.append((b"connection", b"close"))  # what comes behind it is not read
    await send({"type": "http.response.start", "status": status, "headers": sent})
    await send({"type": "http.response.body", "body": body})
