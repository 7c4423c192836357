"""The routes of a server's training clients: making them, their operations, their stream, and what else is asked."""

import asyncio
import contextlib
import json
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Request
from fastapi import Path as InPath
from fastapi.responses import Response, StreamingResponse

from tensafe_nb.config import TrainingConfig
from tensafe_nb.errors import (
    FutureCancelledError,
    FutureFailedError,
    TGTinkerError,
    TrainingClientNotFoundError,
    ValidationError,
)
from tensafe_nb.events import Event
from tensafe_nb.protocol import wire
from tensafe_nb.protocol.batch import BatchData
from tensafe_nb.protocol.codec import decode, encode
from tensafe_nb.protocol.operations import VERBS, Operation, SampleFrom
from tensafe_nb.protocol.results import StateSource
from tensafe_nb.server.answers import ERRORS, PREFIX, STATUS, VERSION, Json, error_of, of_type, packed, told
from tensafe_nb.server.clients import Answer, Place, ServedClient, ended, outcome_of, taken
from tensafe_nb.server.door.guard import MOST_BODY_BYTES, BodyTooLargeError
from tensafe_nb.server.service import Service, Tenant

LONGEST_WAIT = 60.0  # s a request may wait for a result
MOST_ITEMS = 1_000  # of one answer to a poll
OPERATOR = (
    "whoever operates the server: it computes on the batches in the clear, "
    "and takes draws to be what the client says"
)
TELLABLE = 0.1  # of a tenant's limit of bytes, for what its runs tell beyond it: how they end, above all
TOGETHER = 0.01  # s within which what follows comes along in the same answer
MOST_KEY = 64  # characters
CLIENTS = "/training_clients"
ONE = CLIENTS + "/{training_client_id}"
RECORD = {  # the body of an operation: its record, with the arrays beside it or in it
    "requestBody": {
        "required": True,
        "content": {
            wire.TENSORS: {"schema": {"type": "string", "format": "binary"}},
            wire.JSON: {
                "schema": {
                    "type": "object",
                    "required": ["$"],
                    "properties": {"$": {"type": "string", "enum": sorted(VERBS)}},
                }
            },
        },
    }
}

RECORD_OF_SAMPLE = {
    "requestBody": {
        "required": True,
        "content": {
            wire.JSON: {
                "schema": {
                    "type": "object",
                    "required": ["$", "sample"],
                    "properties": {"$": {"const": "sample_from"}, "sample": {"type": "object"}},
                }
            }
        },
    }
}

Id = Annotated[str, InPath(max_length=64)]
SubmitterHeader = Annotated[str | None, Header(max_length=64)]
NumberHeader = Annotated[int | None, Header(ge=1)]
KnownPieces = Annotated[str, Query(max_length=4096, pattern=r"^(fut-[A-Za-z0-9-]{1,64}:\d{1,9}(,|$))*$")]


async def body_of(request: Request) -> bytes | TGTinkerError:
    """Read a body whole, before its turn comes; one that is too large is refused in its turn."""
    try:
        return await request.body()
    except BodyTooLargeError:
        return TGTinkerError(f"A body has at most {MOST_BODY_BYTES} bytes.", code="too_large")


async def queue(
    service: Service,
    tenant: Tenant,
    client: ServedClient,
    read: Callable[[], Operation[Any]],
    place: Place,
    form: tuple[str, bytes] | None = None,
) -> Answer:
    """Queue an operation, or let it fail in its turn."""
    known = client.handle(place.future_id) if place.is_repeated and place.future_id else None
    if known is not None:  # by an earlier process
        return Answer(
            202, taken(known.future_id, known.operation, time.time(), known.state, known.queue_position)
        )
    try:
        operation = read()
        service.check_operation(tenant, operation)
        handle = await client.submit(operation, place, form)
    except TGTinkerError as error:
        error.request_id = error.request_id or place.future_id
        in_turn = place.number is not None and client.refuse(place, error)
        return Answer(STATUS.get(error.code, 500), {"error": error_of(error)}, in_turn)
    return Answer(
        202, taken(handle.future_id, handle.operation, time.time(), handle.state, handle.queue_position)
    )


def once_only(request: Request, place: Place) -> Place:
    """Return the place of an operation whose request bears a name: its future is called after it, in every try."""
    asked = request.state.asked
    if asked is None:
        return place
    return replace(
        place, future_id=place.future_id or f"fut-{asked.name[:24]}", is_repeated=asked.noted is not None
    )


def answered(request: Request, answer: Answer) -> Json:
    """Answer a submission; an error names its operation, or else the request."""
    content = answer.content
    if "error" in content and content["error"]["request_id"] is None:
        content = {"error": content["error"] | {"request_id": request.state.request_id}}
    return Json(content, answer.status, {"x-in-turn": "1"} if answer.in_turn else {})


def operation_of_fields(verb: str, body: bytes) -> Operation[Any]:
    """Read an operation from its fields, a batch as lists of lists: as anybody writes them.

    Raises:
        ValidationError: What does not fit.
    """
    given = wire.json_of(body or b"{}")
    if not isinstance(given, dict):
        raise ValidationError(f"{verb} takes a JSON object of its fields.")
    if isinstance(given.get("batch"), dict):
        given["batch"] = encode(BatchData.of(given["batch"]))
    operation: Operation[Any] = decode({"$": verb} | given, Operation)
    return operation


def client_routes(service: Service) -> APIRouter:
    """Offer training clients."""
    routes = APIRouter(prefix=PREFIX, responses=ERRORS)
    add_clients(routes, service)
    add_operations(routes, service)
    add_stream(routes, service)
    add_futures(routes, service)
    add_questions(routes, service)
    return routes


def add_clients(routes: APIRouter, service: Service) -> None:
    """Add making, listing and ending."""

    def described(client: ServedClient) -> dict[str, Any]:
        return {"info": told(client.channel.info()), "config": encode(client.channel.config)}

    @routes.post(CLIENTS, status_code=201)
    async def create(request: Request, body: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
        """Make a training client: `{"config": …, "source": …, "key": …}`; returns before its model is loaded.

        A key of the caller's own makes it safe to ask again: it names one training client.
        """
        given = body.get("config", {})
        if not isinstance(given, dict):
            raise ValidationError("The config is a JSON object of the fields of TrainingConfig.")
        config = decode({"$": "training_config"} | given, TrainingConfig)
        source = None if body.get("source") is None else decode(body["source"], StateSource)
        key = body.get("key")
        if key is None and request.state.asked is not None:
            key = request.state.asked.name
        if not isinstance(key, str | None) or len(key or "") > MOST_KEY:
            raise ValidationError(f"The key is a text of at most {MOST_KEY} characters.")
        return described(await service.create(tenant_of(service, request), config, source, key))

    @routes.get(CLIENTS)
    async def list_clients(request: Request) -> list[Any]:
        """List the training clients that are not closed, oldest first."""
        found = [client.channel.info() for client in tenant_of(service, request).live]
        return [told(info) for info in sorted(found, key=lambda info: info.created_at)]

    @routes.get(ONE)
    async def one(request: Request, training_client_id: Id) -> dict[str, Any]:
        """Return one."""
        return described(client_of(service, request, training_client_id))

    @routes.delete(ONE)
    async def terminate(request: Request, training_client_id: Id) -> dict[str, Any]:
        """Terminate one: cancel what waits, free its model."""
        tenant, asked = tenant_of(service, request), request.state.asked
        client = tenant.clients.get(training_client_id)
        if client is None and asked is not None and asked.noted:  # an earlier try has terminated it
            return {**asked.noted, "info": asked.noted["info"] | tenant.end_of(training_client_id)}
        client = client_of(service, request, training_client_id)
        if asked is not None:
            asked.note(described(client))
        await tenant.close(client)
        return described(client)

    @routes.get(ONE + "/ready")
    async def ready(request: Request, training_client_id: Id) -> Response:
        """Wait until the model is loaded; the error it could not be loaded for is the answer's."""
        handle = client_of(service, request, training_client_id).channel.ready()
        await ended(handle)
        return packed(handle.result())


def tenant_of(service: Service, request: Request) -> Tenant:
    """Return whose token a request bears."""
    return service.tenant(request.state.tenant)


def client_of(service: Service, request: Request, training_client_id: str) -> ServedClient:
    """Return a training client of whoever asks."""
    try:
        return tenant_of(service, request).client(training_client_id)
    except TrainingClientNotFoundError:
        service.refuse_if_draining()  # it has been put down already, for the process to come
        raise


def add_operations(routes: APIRouter, service: Service) -> None:
    """Add queueing."""

    @routes.post(ONE + "/operations", status_code=202, openapi_extra=RECORD)
    async def operations(
        request: Request,
        training_client_id: Id,
        x_submitter: SubmitterHeader = None,
        x_number: NumberHeader = None,
        x_future_id: Annotated[str | None, Header(max_length=64, pattern=r"^fut-[A-Za-z0-9-]+$")] = None,
        x_verb: Annotated[str, Header(max_length=64)] = "",
        x_knows_of: Annotated[str, Header(max_length=2048)] = "",
        x_cancelled: Annotated[bool, Header()] = False,
        x_withdrawn: Annotated[bool, Header()] = False,
    ) -> Response:
        """Queue an operation, given as a tagged record: JSON, or safetensors with the JSON in the metadata."""
        client, tenant = client_of(service, request, training_client_id), tenant_of(service, request)
        knows_of = tuple(filter(None, x_knows_of.split(",")))
        place = Place(x_verb, x_submitter, x_number, x_future_id, knows_of, x_cancelled)
        if x_number is None:
            place = once_only(request, place)
        body, media_type = await body_of(request), request.headers.get("content-type", wire.JSON)

        def read() -> Operation[Any]:
            if isinstance(body, TGTinkerError):
                raise body
            if x_withdrawn:
                raise FutureFailedError("Its kernel could not bring this operation here, and gave it up.")
            operation: Operation[Any] = wire.unpack(media_type, body, Operation)
            return operation

        form = None if isinstance(body, TGTinkerError) else (media_type, body)
        if not x_withdrawn and (
            x_submitter is None or x_number is None or client.may_refuse(x_submitter, x_number)
        ):
            tenant.check_queue()
        if x_submitter is None or x_number is None:
            answer = await queue(service, tenant, client, read, place, form)
        else:
            service.refuse_if_draining()
            answer = await client.in_turn(
                x_submitter,
                x_number,
                lambda: queue(service, tenant, client, read, place, form),
                service.refuse_if_draining,
            )
        return answered(request, answer)

    def add_twin(verb: str) -> None:
        names = [field.name for field in fields(VERBS[verb])]  # type: ignore[arg-type]
        schema = {"type": "object", "properties": {name: {} for name in names}, "additionalProperties": False}
        given = {"requestBody": {"required": bool(names), "content": {wire.JSON: {"schema": schema}}}}

        async def twin(request: Request, training_client_id: Id) -> Response:
            client, tenant = client_of(service, request, training_client_id), tenant_of(service, request)
            body = await request.body()
            tenant.check_queue()
            answer = await queue(
                service,
                tenant,
                client,
                lambda: operation_of_fields(verb, body),
                once_only(request, Place(verb)),
            )
            return answered(request, answer)

        twin.__doc__ = f"{VERBS[verb].__doc__}\n\nQueues it, given by its fields as plain JSON."
        routes.post(f"{ONE}/{verb}", status_code=202, name=verb, openapi_extra=given)(twin)

    for verb in VERBS:
        add_twin(verb)

    @routes.post(ONE + "/cancel")
    async def cancel(
        request: Request, training_client_id: Id, future_ids: Annotated[list[str], Body(embed=True)]
    ) -> dict[str, int]:
        """Cancel operations, in the order given; says how many were cancelled before they completed."""
        return {"cancelled": await client_of(service, request, training_client_id).cancel(future_ids)}


def add_stream(routes: APIRouter, service: Service) -> None:
    """Add what comes of operations, and what runs tell."""

    @routes.get(ONE + "/stream", response_class=Response, responses=of_type("text/event-stream"))
    async def stream(
        request: Request,
        training_client_id: Id,
        last_event_id: Annotated[int, Header(ge=0)] = 0,
        after: Annotated[int | None, Query(ge=0)] = None,
        pieces: KnownPieces = "",
    ) -> StreamingResponse:
        """Stream events, numbered, and what becomes of operations, as server-sent events.

        Of samples with `stream`, pieces come along, each with its number; `pieces` says how many are known.
        """
        client = client_of(service, request, training_client_id)

        async def messages() -> AsyncIterator[str]:
            yield "retry: 500\n\n"
            async for item in client.stream(last_event_id if after is None else after, counts_in(pieces)):
                yield message(item)

        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(messages(), media_type="text/event-stream", headers=headers)

    @routes.get(ONE + "/poll")
    async def poll(
        request: Request,
        training_client_id: Id,
        after: Annotated[int, Query(ge=0)] = 0,
        wait: Annotated[float, Query(ge=0, le=LONGEST_WAIT)] = 20.0,
        pieces: KnownPieces = "",
    ) -> list[Any]:
        """Return the next items of the stream at once, or the first that comes: for proxies that hold streams back."""
        client, items = client_of(service, request, training_client_id), []
        async with contextlib.aclosing(client.stream(after, counts_in(pieces))) as stream:
            with contextlib.suppress(TimeoutError, StopAsyncIteration):
                async with asyncio.timeout(wait):
                    items.append(await anext(stream))
                while len(items) < MOST_ITEMS:
                    async with asyncio.timeout(TOGETHER):
                        items.append(await anext(stream))
        return [item for item in items if item]

    @routes.post(ONE + "/events")
    async def events(
        request: Request,
        training_client_id: Id,
        body: Annotated[list[dict[str, Any]], Body()],
        x_submitter: SubmitterHeader = None,
        x_number: NumberHeader = None,
    ) -> Response:
        """Take in what runs tell; the answer says which number the last of it was given.

        It has its turn among its submitter's operations: what comes behind it in their one order is queued after it.
        """
        client = client_of(service, request, training_client_id)
        in_order = x_submitter is not None and x_number is not None
        once = None if request.state.asked is None else request.state.asked.name

        def all_of_them() -> int:
            turn = (x_submitter, x_number) if in_order else (None, None)
            tenant_of(service, request).room(beyond=TELLABLE)
            return client.publish([decode(event, Event) for event in body], *turn, once=once)

        async def publish() -> Answer:
            try:
                return Answer(200, {"seq": await asyncio.to_thread(all_of_them)})
            except TGTinkerError as error:
                return Answer(STATUS.get(error.code, 500), {"error": error_of(error)}, in_turn=True)

        if x_submitter is None or x_number is None:
            answer = await publish()
        else:
            answer = await client.in_turn(x_submitter, x_number, publish)
        return answered(request, answer)


def add_futures(routes: APIRouter, service: Service) -> None:
    """Add sampling without a training client, and asking for an operation by its id alone."""

    @routes.post("/samples", status_code=202, openapi_extra=RECORD_OF_SAMPLE)
    async def sample(request: Request) -> dict[str, Any]:
        """Draw completions from a checkpoint's weights, or from a model as it is: a record `sample_from`."""
        body, media_type = await request.body(), request.headers.get("content-type", wire.JSON)
        asked = wire.unpack(media_type, body, SampleFrom)
        handle = await service.sample(tenant_of(service, request), asked)
        return {"future_id": handle.future_id, "weights": handle.training_client_id}

    @routes.get("/futures/{future_id}")
    async def future(request: Request, future_id: Id) -> dict[str, Any]:
        """Say how far an operation is."""
        handle = tenant_of(service, request).handle(future_id)
        return {
            "future_id": future_id,
            "status": str(handle.state),
            "operation": handle.operation,
            "queue_position": handle.queue_position,
            "progress": handle.progress,
        }

    @routes.get(
        "/futures/{future_id}/result",
        response_class=Response,
        responses={**of_type(wire.JSON, wire.TENSORS), **of_type(wire.JSON, status=202)},
    )
    async def result(
        request: Request, future_id: Id, wait: Annotated[float, Query(ge=0, le=LONGEST_WAIT)] = 20.0
    ) -> Response:
        """Return an operation's result; 202 where it is not there after `wait` seconds."""
        handle = tenant_of(service, request).handle(future_id)
        await service.or_drained(ended(handle, wait))
        if not handle.done():
            return Json({"future_id": future_id, "status": str(handle.state)}, 202)
        outcome = outcome_of(handle)
        if "error" in outcome:
            return answered(
                request, Answer(STATUS.get(outcome["error"]["code"], 500), {"error": outcome["error"]})
            )
        if outcome["state"] == "CANCELLED":
            raise FutureCancelledError("The operation was cancelled.", request_id=future_id)
        if handle.operation == "read_adapter":  # it may have been read before weights were to stay
            service.refuse_if_kept()
        return packed(handle.result())

    @routes.post("/futures/{future_id}/cancel")
    async def cancel(request: Request, future_id: Id) -> dict[str, bool]:
        """Cancel an operation; says whether it was cancelled before it completed."""
        handle = tenant_of(service, request).handle(future_id)
        return {"cancelled": await asyncio.to_thread(handle.cancel)}


def add_questions(routes: APIRouter, service: Service) -> None:
    """Add what is asked beside the queue."""

    @routes.post(ONE + "/draws")
    async def enter_draw(
        request: Request,
        training_client_id: Id,
        unit: Annotated[str, Body()],
        key: Annotated[str | None, Body(max_length=MOST_KEY)] = None,
    ) -> dict[str, Any]:
        """Number a Poisson draw that is about to be made: from now on it is owed.

        A key of the caller's own makes it safe to ask again: it names one draw.
        """
        client = client_of(service, request, training_client_id)
        if key is None and request.state.asked is not None:
            key = request.state.asked.name
        number, secret = await asyncio.to_thread(client.enter_draw, unit, key)
        return {"number": number, "key": secret.hex()}

    @routes.post(ONE + "/estimate")
    async def estimate(
        request: Request,
        training_client_id: Id,
        batch_size: Annotated[int | None, Body(embed=True)] = None,
        length: Annotated[int | None, Body(embed=True)] = None,
    ) -> Response:
        """Return what a step will take."""
        channel = client_of(service, request, training_client_id).channel
        await ended(channel.ready())
        return packed(await tenant_of(service, request).aside(channel.estimate, batch_size, length))

    @routes.get(ONE + "/privacy_statement")
    async def privacy_statement(request: Request, training_client_id: Id) -> Response:
        """Return what may be said about the privacy of what is trained."""
        channel = client_of(service, request, training_client_id).channel
        statement = await tenant_of(service, request).aside(channel.privacy_statement)
        return packed(replace(statement, outside=(*statement.outside, OPERATOR)))

    @routes.post(ONE + "/privacy_audit")
    async def privacy_audit(
        request: Request,
        training_client_id: Id,
        canaries: Annotated[int, Body(embed=True)],
        steps: Annotated[int, Body(embed=True)],
    ) -> Response:
        """Train on canaries, and measure what they leave behind."""
        channel = client_of(service, request, training_client_id).channel
        return packed(await tenant_of(service, request).aside(channel.privacy_audit, canaries, steps))

    @routes.get(ONE + "/tokenizer", response_class=Response, responses=of_type("application/x-tar"))
    async def tokenizer(request: Request, training_client_id: Id) -> Response:
        """Return the files of the model's tokenizer, as a tar archive; waits until the model is loaded."""
        channel = client_of(service, request, training_client_id).channel
        await ended(channel.ready())
        archive = await tenant_of(service, request).aside(tokenizer_files, channel.tokenizer())
        return Response(archive, media_type="application/x-tar")

    @routes.get("/capabilities")
    async def capabilities() -> dict[str, Any]:
        """Say what this server can do, and how much at a time."""
        return {"version": VERSION, "verbs": sorted(VERBS), "limits": service.limits()}

    @routes.get("/losses")
    async def losses() -> list[Any]:
        """Say what every registered loss takes, so that a client can refuse a wrong name without torch."""
        from tensafe_nb.losses.base import declared_losses

        return [
            encode(declared)
            for declared in await asyncio.to_thread(declared_losses, sorted(service.dotted_losses))
        ]


def tokenizer_files(tokenizer: Any) -> bytes:
    """Write a tokenizer as its own library does, and pack the files: the same bytes for the same tokenizer."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as archive:
        tokenizer.save_pretrained(folder)
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for path in sorted(Path(folder).iterdir()):
                tar.add(path, path.name, filter=anonymous)
        archive.seek(0)
        return archive.read()


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out of an archive whose its files are, and when they were written."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def counts_in(text: str) -> dict[str, int]:
    """Read how many pieces of what is being sampled are known: "fut-1:3,fut-2:5"."""
    return {name: int(count) for name, _, count in (one.partition(":") for one in text.split(",") if one)}


def message(item: dict[str, Any]) -> str:
    """Write an item of a stream as a server-sent event; of what is not numbered, a reader's place stays as it was."""
    if not item:
        return ": here\n\n"
    place = f"id: {item['event']['seq']}\n" if "event" in item else ""
    return f"{place}data: {json.dumps(item)}\n\n"
