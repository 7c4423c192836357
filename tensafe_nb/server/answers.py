"""What a server answers with: records, and errors of one form, whoever raised them."""

import importlib.metadata
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tensafe_nb.errors import FutureFailedError, StorageError, TGTinkerError
from tensafe_nb.events import Event, OperationFailed, StatusChanged
from tensafe_nb.protocol import wire
from tensafe_nb.protocol.codec import encode
from tensafe_nb.protocol.results import TrainingClientInfo
from tensafe_nb.store.disk import ADVICE

logger = logging.getLogger(__name__)

PREFIX = "/api/v1"
SIGNATURES = ("x-tensafe-request", "x-request-id")  # OpenAI's clients look at the second
OPENAI = "/v1"  # beneath it, answers have the form that OpenAI's clients read
VERSION = importlib.metadata.version("tensafe_nb")
STATUS = {  # of an error's code; 500 for the rest
    "validation_error": 422, "privacy_unit": 422, "model_load_error": 422, "decryption_error": 422,
    "encryption_context": 422,
    "client_closed": 409, "dp_budget_exceeded": 409, "future_cancelled": 409, "future_failed": 409,
    "queue_full": 429, "too_many": 429, "too_many_waiting": 429,
    "not_found": 404, "training_client_not_found": 404, "run_not_found": 404,
    "artifact_not_found": 404, "forbidden": 403, "key_unavailable": 503, "draining": 503, "storage_error": 507,
    "too_large": 413, "model_not_found": 404, "context_length_exceeded": 422,
}  # fmt: skip


class Json(JSONResponse):
    """JSON in ASCII: an error's text may hold half a character, which UTF-8 cannot."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class Failure(BaseModel):
    """What went wrong: a stable code, words that say what to do next, plain data, and the request it belongs to."""

    code: str
    message: str
    details: dict[str, Any]
    request_id: str | None


class ErrorAnswer(BaseModel):
    """The form of every error."""

    error: Failure


MEANINGS = {
    400: "This is no request that can be read.",
    401: "No valid token.",
    403: "Not for this token, or not from this page.",
    404: "There is nothing of that id, for this tenant.",
    408: "The body came too slowly.",
    409: "The client is closed, or the operation failed or was cancelled.",
    413: "The body is too large.",
    415: "The body is packed; bodies are sent as they are.",
    421: "The server is not called by that name.",
    422: "Something that was sent does not fit; the message says what.",
    429: "Too many requests, operations or clients.",
    431: "Too many headers.",
    500: "The server failed; its log says why.",
    503: "The server is about to stop, or a key is not there.",
    507: "The disk, or the tenant's share of it, is full.",
}
CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 408: "too_slow", 413: "too_large"}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": words} for status, words in MEANINGS.items()
}


class OpenAIFailure(BaseModel):
    """What went wrong: words, the kind of it, the field it is about, and a stable code."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIErrorAnswer(BaseModel):
    """The form of every error beneath /v1."""

    error: OpenAIFailure


OPENAI_STATUS = {422: 400, 409: 400}  # their clients take 409 for a moment's conflict, and ask again
OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
OPENAI_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": OpenAIErrorAnswer, "description": words}
    for status, words in MEANINGS.items()
    if status not in OPENAI_STATUS
}


def form_of(path: str, status: int, error: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return status and content of an error, in the form that belongs to a path."""
    if not path.startswith(f"{OPENAI}/"):
        return status, {"error": dict(error)}
    kind = OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    told = {
        "message": error["message"],
        "type": kind,
        "param": error["details"].get("param"),
        "code": error["code"],
    }
    return OPENAI_STATUS.get(status, status), {"error": told}


def of_type(*media_types: str, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """Describe an answer that is a file, or one of several types."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    content = {name: {} if name == wire.JSON else binary for name in media_types}
    return {status: {"description": MEANINGS.get(status, "As asked."), "content": content}}


def packed(value: Any, status: int = 200) -> Response:
    """Answer with a record."""
    media_type, body = wire.pack(value)
    return Response(body, status, media_type=media_type)


def again_after(error: Mapping[str, Any]) -> dict[str, str]:
    """Return the header that says when to ask again, where an error says so."""
    seconds = error["details"].get("retry_after")
    return {} if seconds is None else {"retry-after": f"{math.ceil(seconds)}"}


def add_error_handlers(app: FastAPI) -> None:
    """Give every error one form, the framework's own too."""

    def answer(request: Request, status: int, error: dict[str, Any]) -> Json:
        error["request_id"] = error.get("request_id") or request.state.request_id
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))
        status, content = form_of(path, status, error)
        return Json(content, status, again_after(error))

    def said(request: Request, status: int, code: str, message: str, **details: Any) -> Json:
        return answer(request, status, {"code": code, "message": message, "details": details})

    @app.exception_handler(TGTinkerError)
    async def ours(request: Request, error: TGTinkerError) -> Json:
        return answer(request, STATUS.get(error.code, 500), error_of(error))

    @app.exception_handler(HTTPException)
    async def of_framework(request: Request, error: HTTPException) -> Json:
        return said(request, error.status_code, CODES.get(error.status_code, "error"), str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: Request, error: RequestValidationError) -> Json:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        words = "there is no such field" if first["type"] == "extra_forbidden" else first["msg"]
        field = {"param": str(first["loc"][1])} if len(first["loc"]) > 1 else {}
        return said(
            request, 422, "validation_error", f"{where}: {words.removeprefix('Value error, ')}", **field
        )

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, _: ClientDisconnect) -> Json:
        return said(request, 400, "bad_request", "The other side left before its request was whole.")

    @app.exception_handler(Exception)
    async def foreign(request: Request, _: Exception) -> Json:
        message = "The server failed at this request; its log says why, under this request's id."
        failed = said(request, 500, "server_error", message)
        for name in SIGNATURES:  # this answer passes the guard by
            failed.headers[name] = request.state.request_id
        return failed


def error_of(error: BaseException | None) -> dict[str, Any]:
    """Return an error as it is sent: never a traceback, no path of this machine; of a foreign exception name and text.

    What is left out is in the server's log. What the caller gave, and `details["given"]` says so, stays as it was.
    """
    if not isinstance(error, TGTinkerError):
        error = FutureFailedError(f"The operation failed: {type(error).__name__}: {error}")
    message, given = error.message, error.details.get("given", "")
    advice = ADVICE.get(error.details.get("errno", 0)) if isinstance(error, StorageError) else None
    if advice and advice in message:
        message = message.replace(advice, OF_DISK)
    message = without_paths(message, given)
    if message != error.message:
        logger.warning(
            "an error was told without what is only for this log: %s: %s", error.code, error.message
        )
    details = {name: plain(value, given) for name, value in error.details.items() if is_plain(value)}
    return {"code": error.code, "message": message, "details": details, "request_id": error.request_id}


OF_DISK = (
    " The disk is the server's: delete what you need no more (service.delete_artifact(…), tc.close()), or tell whoever "
    "runs it."
)
SOME_PATH = "[a path of the server]"
_PATH = re.compile(
    r"""(?:file://|(?<![\w/.:~…\]*]))~?(?:/[^\s/'"`,;:=()<>|\[\]{}]+){2,}/?|(?<!\w)[A-Za-z]:\\[^\s'"`,;()<>|]+"""
)
_QUOTED = re.compile(r"""(['"])~?/[^'"\n]+/[^'"\n]*\1""")
_places: set[str] = (
    set()
)  # those that the expression above does not find: names of one part, or with spaces in them


def hide(*folders: Path | str | None) -> None:
    """Let no error that leaves this process name these folders, or what lies in them."""
    for folder in folders:
        for path in () if folder is None else (Path(folder).absolute(), Path(folder).resolve()):
            if path != Path(path.anchor):
                _places.add(str(path))


def without_paths(text: str, given: object = "") -> str:
    """Return a text without the paths that stand in it, but for what its reader has given.

    Whether there is such a path here makes no difference, so that nobody can ask by what is left out.
    """
    kept = str(given) if given else None
    parts = [_QUOTED.sub(rf"\1{SOME_PATH}\1", part) for part in (text.split(kept) if kept else [text])]
    for place in sorted(_places, key=len, reverse=True):
        beneath = re.compile(rf"(?<![\w/]){re.escape(place)}(?:/[^\s'\"`,;:=()<>|\[\]{{}}]*)?(?![\w-])")
        parts = [beneath.sub(SOME_PATH, part) for part in parts]
    return (kept or "").join(_PATH.sub(SOME_PATH, part) for part in parts)


def plain(value: Any, given: object = "") -> Any:
    """Return plain data without the paths in its texts."""
    match value:
        case str():
            return value if value == given else without_paths(value, given)
        case list() | tuple():
            return [plain(item, given) for item in value]
        case dict():
            return {key: plain(item, given) for key, item in value.items()}
    return value


def told(value: OperationFailed | StatusChanged | TrainingClientInfo | Event) -> Any:
    """Return what the core tells of a training client as it is sent: its words are those of an error, too."""
    if isinstance(value, OperationFailed):
        value = replace(value, message=without_paths(value.message))
    elif isinstance(value, StatusChanged | TrainingClientInfo) and value.reason is not None:
        value = replace(value, reason=without_paths(value.reason))
    return encode(value)


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
