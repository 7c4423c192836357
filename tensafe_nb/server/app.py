"""The routes of a server, over the embedded core: what `ServiceClient(base_url)` speaks, and curl can."""

import asyncio
import contextlib
import importlib.metadata
import json
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Body, FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from tensafe_nb.config import TrainingConfig
from tensafe_nb.errors import (
    FutureCancelledError,
    NotFoundError,
    QueueFullError,
    TGTinkerError,
    TrainingClientNotFoundError,
    ValidationError,
)
from tensafe_nb.events import Event
from tensafe_nb.protocol import wire
from tensafe_nb.protocol.codec import decode, encode
from tensafe_nb.protocol.operations import VERBS, Operation
from tensafe_nb.protocol.results import StateSource
from tensafe_nb.server.clients import Answer, ServedClient, Submitter, ended, error_of, outcome_of
from tensafe_nb.server.guard import MOST_BODY_BYTES, BodyTooLargeError, Guard
from tensafe_nb.server.tokens import Tokens
from tensafe_nb.store.home import Home
from tensafe_nb.transports.embedded import EmbeddedTransport

T = TypeVar("T")

PREFIX = "/api/v1"
VERSION = importlib.metadata.version("tensafe_nb")
STATUS = {  # of an error's code; 500 for the rest
    "validation_error": 422, "privacy_unit": 422, "model_load_error": 422, "decryption_error": 422,
    "client_closed": 409, "dp_budget_exceeded": 409, "future_cancelled": 409, "future_failed": 409,
    "queue_full": 429, "too_many": 429, "not_found": 404, "training_client_not_found": 404, "run_not_found": 404,
    "artifact_not_found": 404, "forbidden": 403, "key_unavailable": 503, "draining": 503, "storage_error": 507,
}  # fmt: skip
MOST_TOKENS = 1 << 16  # B × T of a batch
MOST_RANK = 256
LONGEST_WAIT = 60.0  # s a request may wait for a result


class Limits:
    """What one tenant may have at a time.

    Args:
        clients: Training clients.
        stored_bytes: Of its artifacts; None has no limit.
    """

    def __init__(self, clients: int = 32, stored_bytes: int | None = None) -> None:
        self.clients, self.stored_bytes = clients, stored_bytes


class Tenant:
    """One tenant: its training clients and its artifacts.

    Args:
        home: Its share of the server's home folder.
    """

    def __init__(self, home: Home) -> None:
        self.name = home.tenant
        self.transport = EmbeddedTransport(home, "file")
        self.clients: dict[str, ServedClient] = {}

    def client(self, training_client_id: str) -> ServedClient:
        """Return one of its clients.

        Raises:
            TrainingClientNotFoundError: It has none of that id, whatever others have.
        """
        if training_client_id not in self.clients:
            raise TrainingClientNotFoundError(
                f"There is no training client {training_client_id!r} on this server. Known: {sorted(self.clients)}."
            )
        return self.clients[training_client_id]


class Service:
    """What the routes work on.

    Args:
        home: The server's home folder.
        models: The folder under which a `model_ref` names a model; None has the built-in ones only.
        hub_models: Hub ids that may be loaded.
        limits: Of each tenant.
    """

    def __init__(self, home: Home, models: Path | None, hub_models: Sequence[str], limits: Limits) -> None:
        self._home, self._models, self._hub_models = home, models, frozenset(hub_models)
        self._limits = limits
        self._tenants: dict[str, Tenant] = {}
        self.draining = False

    def tenant(self, name: str) -> Tenant:
        """Return a tenant, known or new."""
        if name not in self._tenants:
            self._tenants[name] = Tenant(Home(self._home.root, name))
        return self._tenants[name]

    def all_clients(self) -> list[ServedClient]:
        """Return every client of every tenant."""
        return [client for tenant in self._tenants.values() for client in tenant.clients.values()]

    def create(self, tenant: Tenant, config: TrainingConfig, source: StateSource | None) -> ServedClient:
        """Make a training client.

        Raises:
            ValidationError: A model that is not offered here, a rank above the limit, too many clients.
        """
        self._refuse_if_draining()
        live = [client for client in tenant.clients.values() if client.channel.info().status != "TERMINATED"]
        if len(live) >= self._limits.clients:
            raise QueueFullError(
                f"This tenant has {len(live)} training clients, as many as it may. Close one: tc.close().",
                code="too_many",
            )
        if config.lora_config is not None and config.lora_config.rank > MOST_RANK:
            raise ValidationError(f"LoRAConfig.rank is at most {MOST_RANK} on this server.")
        if ":" in config.loss.type:
            raise ValidationError(
                "Losses from a dotted path run in the user's own process only.", code="forbidden"
            )
        self._check_model(config.model_ref)
        channel = tenant.transport.create(config, source)
        client = tenant.clients[channel.training_client_id] = ServedClient(channel)
        return client

    def _check_model(self, ref: str) -> None:
        if ref.startswith("builtin:") or ref in self._hub_models:
            return
        if self._models is not None:
            root, found = self._models.resolve(), (self._models / ref).resolve()
            inside = not Path(ref).is_absolute() and found.is_relative_to(root) and found != root
            if inside and found.exists():
                return
        raise ValidationError(
            f"The model {ref!r} is not offered by this server. Ask whoever runs it (serve --models, --hub-model), or "
            f"take a built-in one."
        )

    def check_operation(self, operation: Operation[Any]) -> None:
        """Refuse what one request may not ask for."""
        self._refuse_if_draining()
        batch = getattr(operation, "batch", None)
        if batch is not None and batch.input_ids.size > MOST_TOKENS:
            rows, tokens = batch.shape
            raise ValidationError(
                f"The batch has {rows} × {tokens} tokens; this server takes {MOST_TOKENS} in one. Send several with "
                f"forward_backward: their gradients add up."
            )
        loss = getattr(operation, "loss_fn", None)
        if isinstance(loss, str) and ":" in loss:
            raise ValidationError(
                "Losses from a dotted path run in the user's own process only.", code="forbidden"
            )

    def _refuse_if_draining(self) -> None:
        if self.draining:
            raise TGTinkerError("This server is about to stop and takes nothing new.", code="draining")

    async def drain(self) -> None:
        """Finish what runs, cancel what waits, end all streams, write out the logs."""
        self.draining = True
        for tenant in self._tenants.values():
            await asyncio.to_thread(tenant.transport.close)


def create_app(
    home: Home,
    tokens: Tokens,
    *,
    models: Path | None = None,
    hub_models: Sequence[str] = (),
    hosts: Sequence[str] = (),
    limits: Limits | None = None,
    root_path: str = "",
) -> FastAPI:
    """Return the server as an ASGI application.

    Args:
        home: Where everything is kept.
        tokens: Who may enter.
        models: The folder whose models are offered, by their names beneath it; the process works in that folder.
        hub_models: Ids of hub models that may be loaded.
        hosts: Names by which it is called, besides loopback ones.
        limits: Of each tenant.
        root_path: The path under which a proxy offers it.
    """
    service = Service(home, models, hub_models, limits or Limits())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.drain()

    app = FastAPI(title="tensafe_nb", version=VERSION, lifespan=lifespan, root_path=root_path)
    app.state.service = service
    app.add_middleware(Guard, tokens=tokens, hosts=hosts)
    add_error_handlers(app)
    add_probes(app, service)
    add_client_routes(app, service)
    add_artifact_routes(app, service)
    return app


def add_error_handlers(app: FastAPI) -> None:
    """Give every error one form, the framework's own too."""

    def answer(request: Request, status: int, error: dict[str, Any]) -> JSONResponse:
        error["request_id"] = error.get("request_id") or request.state.request_id
        return JSONResponse({"error": error}, status)

    @app.exception_handler(TGTinkerError)
    async def ours(request: Request, error: TGTinkerError) -> JSONResponse:
        return answer(request, STATUS.get(error.code, 500), error_of(error))

    @app.exception_handler(HTTPException)
    async def of_framework(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "error")
        return answer(request, error.status_code, {"code": code, "message": str(error.detail), "details": {}})

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return answer(
            request, 422, {"code": "validation_error", "message": f"{where}: {first['msg']}", "details": {}}
        )

    @app.exception_handler(BodyTooLargeError)
    async def too_large(request: Request, _: BodyTooLargeError) -> JSONResponse:
        message = f"A body has at most {MOST_BODY_BYTES} bytes."
        return answer(request, 413, {"code": "too_large", "message": message, "details": {}})

    @app.exception_handler(Exception)
    async def foreign(request: Request, _: Exception) -> JSONResponse:
        message = "The server failed at this request; its log says why, under this request's id."
        return answer(request, 500, {"code": "server_error", "message": message, "details": {}})


def add_probes(app: FastAPI, service: Service) -> None:
    """Say how the server does; no secrets, and nothing of single tenants."""
    started = time.time()

    @app.get("/health")
    @app.get("/live")
    async def live() -> dict[str, Any]:
        return {"status": "ok", "seconds": round(time.time() - started)}

    @app.get("/ready")
    async def ready() -> Response:
        return JSONResponse({"ready": not service.draining}, 503 if service.draining else 200)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"name": "tensafe_nb", "version": VERSION, "api": PREFIX}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        infos = [client.channel.info() for client in service.all_clients()]
        live = [info for info in infos if info.status != "TERMINATED"]
        lines = [
            "# HELP tensafe_nb_training_clients Training clients that are not closed.",
            "# TYPE tensafe_nb_training_clients gauge",
            f"tensafe_nb_training_clients {len(live)}",
            "# HELP tensafe_nb_queue_depth Operations that wait or run.",
            "# TYPE tensafe_nb_queue_depth gauge",
            f"tensafe_nb_queue_depth {sum(info.queue_depth for info in live)}",
        ]
        return PlainTextResponse("\n".join(lines) + "\n")


async def body_of(request: Request, *kinds: type) -> Any:
    """Read a request's record."""
    body = await request.body()
    return wire.unpack(request.headers.get("content-type", wire.JSON), body, *kinds)


def packed(value: Any, status: int = 200) -> Response:
    """Answer with a record."""
    media_type, body = wire.pack(value)
    return Response(body, status, media_type=media_type)


def add_client_routes(app: FastAPI, service: Service) -> None:
    """Offer training clients: making them, their operations, their stream, and what else their line carries."""
    clients = f"{PREFIX}/training_clients"

    def tenant_of(request: Request) -> Tenant:
        return service.tenant(request.state.tenant)

    def client_of(request: Request, training_client_id: str) -> ServedClient:
        return tenant_of(request).client(training_client_id)

    def described(client: ServedClient) -> dict[str, Any]:
        channel = client.channel
        return {"info": encode(channel.info()), "config": encode(channel.config)}

    @app.post(clients, status_code=201)
    async def create(request: Request, body: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
        """Make a training client: `{"config": …, "source": …}`; returns before its model is loaded."""
        config = decode({"$": "training_config"} | body.get("config", {}), TrainingConfig)
        source = None if body.get("source") is None else decode(body["source"], StateSource)
        made = await asyncio.to_thread(service.create, tenant_of(request), config, source)
        return described(made)

    @app.get(clients)
    async def list_clients(request: Request) -> list[Any]:
        """List the training clients that are not closed, oldest first."""
        return [encode(info) for info in tenant_of(request).transport.list_training_clients()]

    @app.get(clients + "/{training_client_id}")
    async def one(request: Request, training_client_id: str) -> dict[str, Any]:
        """Return one."""
        return described(client_of(request, training_client_id))

    @app.delete(clients + "/{training_client_id}")
    async def terminate(request: Request, training_client_id: str) -> dict[str, Any]:
        """Terminate one: cancel what waits, free its model."""
        client = client_of(request, training_client_id)
        await asyncio.to_thread(client.channel.close)
        await asyncio.to_thread(client.channel.hang_up)
        return described(client)

    @app.get(clients + "/{training_client_id}/ready")
    async def ready(request: Request, training_client_id: str) -> Response:
        """Wait until the model is loaded; the error it could not be loaded for is the answer's."""
        handle = client_of(request, training_client_id).channel.ready()
        await ended(handle)
        return packed(handle.result())

    async def queue(
        request: Request,
        training_client_id: str,
        operation_of: Callable[[], Any],
        submitter: str | None,
        number: int | None,
        future_id: str | None,
        verb: str,
        knows_of: str | None,
    ) -> Response:
        client = client_of(request, training_client_id)

        async def submit() -> Answer:
            try:
                operation = await operation_of()
                service.check_operation(operation)
                handle = await asyncio.to_thread(client.submit, operation, future_id, knows_of)
            except TGTinkerError as error:
                if number is not None and verb in VERBS and future_id is not None:
                    await asyncio.to_thread(client.refuse, VERBS[verb], future_id, error)
                error.request_id = error.request_id or future_id
                return Answer(STATUS.get(error.code, 500), {"error": error_of(error)})
            return Answer(
                202,
                {
                    "future_id": handle.future_id,
                    "status": str(handle.state),
                    "operation": handle.operation,
                    "created_at": time.time(),
                    "queue_position": handle.queue_position,
                },
            )

        if submitter is None or number is None:
            answer = await submit()
        else:
            answer = await client.submitters.setdefault(submitter, Submitter()).in_turn(number, submit)
        if "error" in answer.content:
            answer.content["error"]["request_id"] = (
                answer.content["error"]["request_id"] or request.state.request_id
            )
        return JSONResponse(answer.content, answer.status)

    @app.post(clients + "/{training_client_id}/operations", status_code=202)
    async def operations(
        request: Request,
        training_client_id: str,
        x_submitter: Annotated[str | None, Header(max_length=64)] = None,
        x_number: Annotated[int | None, Header(ge=1)] = None,
        x_future_id: Annotated[str | None, Header(max_length=64, pattern=r"^fut-[A-Za-z0-9-]+$")] = None,
        x_verb: Annotated[str, Header(max_length=64)] = "",
        x_knows_of: Annotated[str | None, Header(max_length=64)] = None,
    ) -> Response:
        """Queue an operation, given as a tagged record: JSON, or safetensors with the JSON in the metadata."""
        make = partial(body_of, request, Operation)
        return await queue(
            request, training_client_id, make, x_submitter, x_number, x_future_id, x_verb, x_knows_of
        )

    def add_twin(verb: str) -> None:
        @app.post(clients + "/{training_client_id}/" + verb, status_code=202, name=verb)
        async def twin(request: Request, training_client_id: str) -> Response:
            async def operation() -> Any:
                fields = wire.json_of(await request.body() or b"{}")
                if not isinstance(fields, dict):
                    raise ValidationError(f"{verb} takes a JSON object of its fields.")
                if isinstance(fields.get("batch"), dict):  # lists of lists, as anybody writes them
                    from tensafe_nb.protocol.batch import BatchData

                    fields["batch"] = encode(BatchData.of(fields["batch"]))
                return decode({"$": verb} | fields, Operation)

            return await queue(request, training_client_id, operation, None, None, None, verb, None)

        twin.__doc__ = f"Queue {verb}, given by its fields as plain JSON."

    for verb in VERBS:
        add_twin(verb)

    @app.get(clients + "/{training_client_id}/stream")
    async def stream(
        request: Request,
        training_client_id: str,
        last_event_id: Annotated[int, Header(ge=0)] = 0,
        after: Annotated[int | None, Query(ge=0)] = None,
    ) -> StreamingResponse:
        """Stream events, numbered, and what becomes of operations, as server-sent events."""
        client = client_of(request, training_client_id)

        async def messages() -> AsyncIterator[str]:
            yield "retry: 500\n\n"
            async for item in client.stream(last_event_id if after is None else after):
                yield f"id: {item['event']['seq']}\ndata: {json.dumps(item)}\n\n" if item else ": here\n\n"

        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(messages(), media_type="text/event-stream", headers=headers)

    @app.get(clients + "/{training_client_id}/poll")
    async def poll(
        request: Request,
        training_client_id: str,
        after: Annotated[int, Query(ge=0)] = 0,
        wait: Annotated[float, Query(ge=0, le=LONGEST_WAIT)] = 20.0,
    ) -> list[Any]:
        """Return the next items of the stream at once, or the first that comes: for proxies that hold streams back."""
        client, items = client_of(request, training_client_id), []
        stream = client.stream(after)
        with contextlib.suppress(TimeoutError, StopAsyncIteration):
            async with asyncio.timeout(wait):
                items.append(await anext(stream))
            while len(items) < 1_000:
                async with asyncio.timeout(0.01):
                    items.append(await anext(stream))
        await stream.aclose()  # type: ignore[attr-defined]
        return [item for item in items if item]

    @app.post(clients + "/{training_client_id}/events")
    async def events(
        request: Request,
        training_client_id: str,
        body: Annotated[list[dict[str, Any]], Body()],
        x_submitter: Annotated[str | None, Header(max_length=64)] = None,
        x_number: Annotated[int | None, Header(ge=1)] = None,
    ) -> Response:
        """Take in what runs tell; the answer says which number the last of it was given."""
        client = client_of(request, training_client_id)
        told = [decode(event, Event) for event in body]

        async def publish() -> Answer:
            def all_of_them() -> int:
                return max((client.channel.publish(event).seq for event in told), default=0)

            try:
                return Answer(200, {"seq": await asyncio.to_thread(all_of_them)})
            except TGTinkerError as error:
                return Answer(STATUS.get(error.code, 500), {"error": error_of(error)})

        if x_submitter is None or x_number is None:
            answer = await publish()
        else:
            told_by = client.submitters.setdefault(f"events of {x_submitter}", Submitter())
            answer = await told_by.in_turn(x_number, publish)
        return JSONResponse(answer.content, answer.status)

    def handle_of(request: Request, future_id: str) -> Any:
        for client in tenant_of(request).clients.values():
            handle = client.handle(future_id)
            if handle is not None:
                return handle
        raise NotFoundError(f"There is no operation {future_id!r} here, or its result is not kept any more.")

    @app.get(PREFIX + "/futures/{future_id}")
    async def future(request: Request, future_id: str) -> dict[str, Any]:
        """Say how far an operation is."""
        handle = handle_of(request, future_id)
        return {
            "future_id": future_id,
            "status": str(handle.state),
            "operation": handle.operation,
            "queue_position": handle.queue_position,
            "progress": handle.progress,
        }

    @app.get(PREFIX + "/futures/{future_id}/result")
    async def result(
        request: Request, future_id: str, wait: Annotated[float, Query(ge=0, le=LONGEST_WAIT)] = 20.0
    ) -> Response:
        """Return an operation's result; 202 where it is not there after `wait` seconds."""
        handle = handle_of(request, future_id)
        if not await ended(handle, wait):
            return JSONResponse({"future_id": future_id, "status": str(handle.state)}, 202)
        outcome = outcome_of(handle)
        if "error" in outcome:
            return JSONResponse({"error": outcome["error"]}, STATUS.get(outcome["error"]["code"], 500))
        if outcome["state"] == "CANCELLED":
            raise FutureCancelledError("The operation was cancelled.", request_id=future_id)
        return packed(await asyncio.to_thread(handle.result))

    @app.post(PREFIX + "/futures/{future_id}/cancel")
    async def cancel(request: Request, future_id: str) -> dict[str, bool]:
        """Cancel an operation; says whether it was cancelled before it completed."""
        handle = handle_of(request, future_id)
        return {"cancelled": await asyncio.to_thread(handle.cancel)}

    @app.post(clients + "/{training_client_id}/draws")
    async def enter_draw(
        request: Request, training_client_id: str, unit: Annotated[str, Body(embed=True)]
    ) -> dict[str, Any]:
        """Number a Poisson draw that is about to be made: from now on it is owed."""
        channel = client_of(request, training_client_id).channel
        number, key = await asyncio.to_thread(channel.enter_draw, unit)
        return {"number": number, "key": key.hex()}

    @app.post(clients + "/{training_client_id}/estimate")
    async def estimate(
        request: Request, training_client_id: str, body: Annotated[dict[str, int | None], Body()]
    ) -> Response:
        """Return what a step will take."""
        channel = client_of(request, training_client_id).channel
        found = await asyncio.to_thread(channel.estimate, body.get("batch_size"), body.get("length"))
        return packed(found)

    @app.get(clients + "/{training_client_id}/privacy_statement")
    async def privacy_statement(request: Request, training_client_id: str) -> Response:
        """Return what may be said about the privacy of what is trained."""
        return packed(
            await asyncio.to_thread(client_of(request, training_client_id).channel.privacy_statement)
        )

    @app.post(clients + "/{training_client_id}/privacy_audit")
    async def privacy_audit(
        request: Request, training_client_id: str, body: Annotated[dict[str, int], Body()]
    ) -> Response:
        """Train on canaries, and measure what they leave behind."""
        channel = client_of(request, training_client_id).channel
        return packed(await asyncio.to_thread(channel.privacy_audit, body["canaries"], body["steps"]))

    @app.get(clients + "/{training_client_id}/tokenizer")
    async def tokenizer(request: Request, training_client_id: str) -> Response:
        """Return the files of the model's tokenizer, as a tar archive; waits until the model is loaded."""
        channel = client_of(request, training_client_id).channel
        return Response(
            await asyncio.to_thread(tokenizer_files, channel.tokenizer), media_type="application/x-tar"
        )

    @app.get(PREFIX + "/capabilities")
    async def capabilities() -> dict[str, Any]:
        """Say what this server can do, and how much at a time."""
        return {
            "version": VERSION,
            "verbs": sorted(VERBS),
            "limits": {"tokens_of_a_batch": MOST_TOKENS, "rank": MOST_RANK, "body_bytes": MOST_BODY_BYTES},
        }

    @app.get(PREFIX + "/losses")
    async def losses() -> list[Any]:
        """Say what every registered loss takes, so that a client can refuse a wrong name without torch."""
        from tensafe_nb.losses.base import declared_losses

        return [encode(declared) for declared in await asyncio.to_thread(declared_losses)]


def tokenizer_files(tokenizer_of: Callable[[], Any]) -> bytes:
    """Write a tokenizer as its own library does, and pack the files."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as archive:
        tokenizer_of().save_pretrained(folder)
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for path in sorted(Path(folder).iterdir()):
                tar.add(path, path.name)
        archive.seek(0)
        return archive.read()


def add_artifact_routes(app: FastAPI, service: Service) -> None:
    """Offer artifacts, sealed as they are, and the audit log."""
    artifacts = f"{PREFIX}/artifacts"

    def transport_of(request: Request) -> EmbeddedTransport:
        return service.tenant(request.state.tenant).transport

    @app.get(artifacts)
    async def list_artifacts(request: Request, training_client_id: str | None = None) -> list[Any]:
        """List the stored artifacts, newest first."""
        found = await asyncio.to_thread(transport_of(request).list_artifacts, training_client_id)
        return [encode(artifact) for artifact in found]

    @app.put(artifacts, status_code=201)
    async def push(request: Request) -> Response:
        """Take in a sealed file."""
        with tempfile.NamedTemporaryFile(suffix=".tsnb") as file:
            async for chunk in request.stream():
                await asyncio.to_thread(file.write, chunk)
            file.flush()
            return packed(await asyncio.to_thread(transport_of(request).push_artifact, Path(file.name)), 201)

    @app.get(artifacts + "/{artifact_id}")
    async def get_artifact(request: Request, artifact_id: str) -> Response:
        """Return what is known of one, by id or name."""
        return packed(await asyncio.to_thread(transport_of(request).get_artifact, artifact_id))

    @app.delete(artifacts + "/{artifact_id}", status_code=204)
    async def delete_artifact(request: Request, artifact_id: str) -> None:
        """Delete one for good."""
        await asyncio.to_thread(transport_of(request).delete_artifact, artifact_id)

    @app.get(artifacts + "/{artifact_id}/config")
    async def config_of(request: Request, artifact_id: str) -> Response:
        """Return the configuration of the client that saved it."""
        return packed(await asyncio.to_thread(transport_of(request).config_of, artifact_id))

    @app.get(artifacts + "/{artifact_id}/content")
    async def content(request: Request, artifact_id: str) -> FileResponse:
        """Return the sealed file, in ranges if asked for."""
        with tempfile.NamedTemporaryFile(suffix=".tsnb", delete=False) as file:
            copy = Path(file.name)
        await asyncio.to_thread(transport_of(request).pull_artifact, artifact_id, copy)
        return FileResponse(
            copy, media_type="application/octet-stream", background=BackgroundTask(copy.unlink)
        )

    @app.get(artifacts + "/{artifact_id}/export")
    async def export(request: Request, artifact_id: str, merged: bool = False) -> FileResponse:
        """Return one in the clear, as a tar archive of a folder that PEFT and transformers read."""
        made = await asyncio.to_thread(exported, transport_of(request), artifact_id, merged)
        return FileResponse(made, media_type="application/x-tar", background=BackgroundTask(made.unlink))

    @app.post(PREFIX + "/keys/rotate")
    async def rotate(request: Request) -> dict[str, int]:
        """Make a new key, and rewrap this tenant's artifacts with it."""
        return {"rewrapped": await asyncio.to_thread(transport_of(request).rotate_keys)}

    @app.get(PREFIX + "/audit_logs")
    async def audit_logs(
        request: Request,
        training_client_id: str | None = None,
        operation: str | None = None,
        limit: Annotated[int, Query(ge=0, le=10_000)] = 100,
        offset: Annotated[int, Query(ge=0)] = 0,
    ) -> list[Any]:
        """Return records of the audit log, newest first."""
        logs = transport_of(request).audit_logs
        return [
            encode(entry)
            for entry in await asyncio.to_thread(logs, training_client_id, operation, limit, offset)
        ]

    @app.get(PREFIX + "/audit_logs/verify")
    async def verify(request: Request, anchor: Annotated[list[str] | None, Query()] = None) -> Response:
        """Check the audit log from its first record to its last."""
        return packed(await asyncio.to_thread(transport_of(request).verify_audit_log, tuple(anchor or ())))


def exported(transport: EmbeddedTransport, artifact_id: str, merged: bool) -> Path:
    """Export an artifact into an archive that whoever sends it removes."""
    with tempfile.TemporaryDirectory() as folder:
        written = transport.export_adapter(artifact_id, Path(folder) / "exported", merged)
        with tempfile.NamedTemporaryFile(suffix=".tar", delete=False) as archive:
            with tarfile.open(fileobj=archive, mode="w") as tar:
                for path in sorted(written.iterdir()):
                    tar.add(path, path.name)
            return Path(archive.name)
