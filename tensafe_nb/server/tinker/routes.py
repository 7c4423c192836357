"""The routes of the protocol, beneath /tinker: `TINKER_BASE_URL` is the server's address with that behind it."""

import asyncio
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Annotated, Any
from weakref import WeakKeyDictionary

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import Response

from tensafe_nb.config import StepConfig
from tensafe_nb.errors import ArtifactNotFoundError, NotFoundError, TGTinkerError, ValidationError
from tensafe_nb.protocol.operations import LoadState, OptimStep, SampleFrom, SaveState
from tensafe_nb.protocol.results import OptimStepResult, SaveStateResult
from tensafe_nb.server.answers import ERRORS, Json
from tensafe_nb.server.clients import ended
from tensafe_nb.server.service import Service, Tenant
from tensafe_nb.server.tinker.batches import operation_of, output_of
from tensafe_nb.server.tinker.checkpoints import (
    KINDS,
    MARK,
    SNAPSHOT,
    find,
    listed,
    path_of,
    weights_info,
)
from tensafe_nb.server.tinker.messages import parsed
from tensafe_nb.server.tinker.requests import (
    AdamRequest,
    LoadRequest,
    ModelRequest,
    SampleRequest,
    SamplerRequest,
    SaveRequest,
    SessionRequest,
    StepRequest,
)
from tensafe_nb.server.tinker.runs import DP, SUBMITTER, Content, Model, Tinker, failed, future_of, run_told
from tensafe_nb.server.tinker.sampling import response_of, sample_of

PREFIX = "/tinker/api/v1"
JSON, PROTOBUF = "application/json", "application/x-protobuf"
LONGEST_WAIT = 38.0  # s that retrieve_future waits; the SDK hangs up after 45
MOST_LISTED = 1_000
WELCOME = "tensafe_nb: what you train stays on this server. What differs from the hosted service: docs/how-to/tinker.md"


def add_tinker(app: FastAPI) -> None:
    """Offer the protocol on a server."""
    app.include_router(tinker_routes(app.state.service))


def tinker_routes(service: Service) -> APIRouter:
    """Offer the protocol."""
    routes = APIRouter(prefix=PREFIX, responses=ERRORS, include_in_schema=False)
    known: WeakKeyDictionary[Tenant, Tinker] = WeakKeyDictionary()

    def tinker_of(request: Request) -> Tinker:
        tenant = service.tenant(request.state.tenant)
        if tenant not in known:
            known[tenant] = Tinker(service, tenant)
        return known[tenant]

    add_sessions(routes, service, tinker_of)
    add_training(routes, tinker_of)
    add_weights(routes, tinker_of)
    add_sampling(routes, tinker_of)
    add_checkpoints(routes, tinker_of)
    return routes


def plain(value: Mapping[str, Any]) -> Content:
    """Return the content of a future whose answer is JSON."""
    return Content(JSON, json.dumps(value, allow_nan=False).encode())


async def told(work: Callable[[], Awaitable[Content | dict[str, Any]]]) -> Content:
    """Return what a future tells: its result, or its error, which is an answer like any other."""
    try:
        found = await work()
    except TGTinkerError as error:
        return plain(failed(error))
    except Exception:  # an answer of 500 would be asked for again at once, for ever
        logger.exception("a request of the tinker protocol failed")
        return plain({"error": "The server failed at this request; its log says why.", "category": "server"})
    return found if isinstance(found, Content) else plain(found)


logger = logging.getLogger(__name__)
Ask = Callable[[Request], Tinker]


def add_sessions(routes: APIRouter, service: Service, tinker_of: Ask) -> None:
    """Add what is asked before anything is trained, and meanwhile."""

    @routes.post("/client/config")
    async def client_config() -> dict[str, Any]:
        """Say how the SDK should send: as it does by default."""
        return {"proto_compress_fwdbwd": False, "custom_loss_server_side": False}

    @routes.post("/create_session")
    async def create_session(request: Request) -> dict[str, Any]:
        """Begin a session."""
        return {
            "session_id": await tinker_of(request).new_session(),
            "type": "create_session",
            "info_message": WELCOME,
        }

    @routes.post("/session_heartbeat")
    async def session_heartbeat(request: Request) -> dict[str, Any]:
        """Count a sign of life."""
        tinker_of(request).check_session(SessionRequest.read(await request.json()).session_id)
        return {"type": "session_heartbeat"}

    @routes.post("/sessions/{session_id}/finish")
    async def finish(request: Request, session_id: str) -> dict[str, Any]:
        """End a session: its models are closed, its checkpoints stay."""
        tinker = tinker_of(request)
        tinker.check_session(session_id)
        await tinker.end_session(session_id)
        return {"type": "finish_session"}

    @routes.post("/telemetry")
    async def telemetry() -> dict[str, Any]:
        """Take what the SDK tells of itself, and keep none of it."""
        return {"status": "accepted"}

    @routes.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Say that the server answers."""
        return {"status": "ok"}

    @routes.get("/get_server_capabilities")
    async def capabilities() -> dict[str, Any]:
        """Say which models are offered."""
        return {"supported_models": [{"model_name": name} for name in service.offered_models()]}

    @routes.post("/retrieve_future")
    async def retrieve_future(request: Request) -> Response:
        """Return what a future ended with; 408 where it has not yet."""
        request_id = str((await request.json()).get("request_id"))
        try:
            found = await tinker_of(request).outcome(request_id, LONGEST_WAIT)
        except NotFoundError as error:
            return Json(failed(error))
        if found is None:
            return Json({"type": "try_again", "request_id": request_id, "queue_state": "active"}, 408)
        return Response(found.body, media_type=found.media_type)


def add_training(routes: APIRouter, tinker_of: Ask) -> None:
    """Add models and their steps."""

    @routes.post("/create_model")
    async def create_model(request: Request) -> dict[str, Any]:
        """Make a model."""
        tinker, asked = tinker_of(request), ModelRequest.read(await request.json())
        tinker.check_session(asked.session_id)
        model_id = f"{asked.session_id}:train:{asked.model_seq_id}"

        async def work() -> dict[str, Any]:
            model = await tinker.create(asked)
            return {"model_id": model.model_id, "type": "create_model"}

        return {"request_id": tinker.begin(future_of(model_id, -1), lambda: told(work)), "model_id": model_id}

    @routes.post("/get_info")
    async def get_info(request: Request) -> dict[str, Any]:
        """Say what a model is."""
        model = tinker_of(request).model(str((await request.json()).get("model_id")))
        config = model.client.channel.config
        return {
            "type": "get_info",
            "model_id": model.model_id,
            "model_name": config.model_ref,
            "model_data": {"arch": None, "model_name": config.model_ref},
            "is_lora": True,
            "lora_rank": config.lora_config.rank if config.lora_config else None,
            "optimizer_config": weights_info(config)["optimizer_config"],
        }

    @routes.post("/forward_backward")
    async def forward_backward(request: Request) -> dict[str, Any]:
        """Add the gradient of a loss, or with forward_only compute it alone."""
        tinker, asked = tinker_of(request), parsed("ForwardBackwardRequest", await request.body())
        model = tinker.model(asked.model_id)

        async def work() -> Content:
            rows: list[Any] = []

            def read() -> Any:
                operation, found = operation_of(asked)
                rows.append(found)
                return operation

            result = await tinker.result(model, asked.seq_id, "forward_backward", read)
            body = await asyncio.to_thread(output_of, result, rows[0] if rows else operation_of(asked)[1])
            return Content(PROTOBUF, body)

        return await queued(tinker, model, asked.seq_id, work)

    @routes.post("/optim_step")
    async def optim_step(request: Request) -> dict[str, Any]:
        """Take a step."""
        tinker, asked = tinker_of(request), StepRequest.read(await request.json())
        model = tinker.model(asked.model_id)

        async def work() -> dict[str, Any]:
            result = await tinker.result(model, asked.seq_id, "optim_step", lambda: step_of(asked, model))
            return {"metrics": metrics_of(result), "type": "optim_step"}

        return await queued(tinker, model, asked.seq_id, work)


async def queued(
    tinker: Tinker, model: Model, number: int, work: Callable[[], Awaitable[Content | dict[str, Any]]]
) -> dict[str, Any]:
    """Begin the work of a model's request, and return the answer to it, once the request is written down."""
    if model.client.may_refuse(SUBMITTER, number):
        tinker.tenant.check_queue()
    request_id = tinker.begin(future_of(model.model_id, number), lambda: told(work))
    await tinker.written_down(model, number)
    return {"request_id": request_id, "model_id": model.model_id}


def step_of(asked: StepRequest, model: Model) -> OptimStep:
    """Return the operation of an optim_step.

    Raises:
        ValidationError: Settings of an optimiser that the model does not have.
    """
    settings = asked.adam_params or AdamRequest()
    if asked.optimizer_params is not None:
        given = dict(asked.optimizer_params)
        kind = given.pop("type", None)
        dp = model.client.channel.config.dp_config
        if kind != DP or dp is None:
            raise ValidationError(f"optim_step: this model's optimizer is not {kind!r}.")
        for name in ("noise_multiplier", "max_grad_norm"):
            if name in given and given.pop(name) != getattr(dp, name):
                raise ValidationError(f"optim_step: {name} is {getattr(dp, name)}, as the model was created.")
        unknown = sorted(given.keys() - AdamRequest.model_fields.keys())
        if unknown:
            raise ValidationError(f"optim_step: {DP} has no setting {unknown[0]!r}.")
        settings = AdamRequest.read(given)
    return OptimStep(
        step=StepConfig(
            learning_rate=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            max_grad_norm=max(0.0, settings.grad_clip_norm),
        )
    )


def metrics_of(result: OptimStepResult) -> dict[str, float]:
    """Return what a step tells: of a private one, what was spent."""
    metrics = {"unclipped_grad_l2:mean": result.grad_norm, "step": float(result.step)}
    dp = result.dp_metrics
    if dp is not None:
        epsilon = dp.total_epsilon if dp.total_epsilon < float("inf") else -1.0
        metrics |= {"dp_epsilon": epsilon, "dp_delta": dp.delta, "dp_noise_applied": float(dp.noise_applied)}
    return metrics


def add_weights(routes: APIRouter, tinker_of: Ask) -> None:
    """Add saving and loading."""

    def operation(asked: SaveRequest, model: Model, kind: str, name: str | None) -> SaveState:
        expires = None if asked.ttl_seconds is None else asked.ttl_seconds
        known = {
            "kind": kind,
            "run_id": model.model_id,
            "user_metadata": None if asked.user_metadata is None else dict(asked.user_metadata),
            "run_metadata": None if model.user_metadata is None else dict(model.user_metadata),
            "expires_at": None if expires is None else model.used_at + expires,
        }
        return SaveState(kind == "training", {MARK: known}, name)

    async def save(tinker: Tinker, asked: SaveRequest, model: Model, segment: str) -> dict[str, Any]:
        path = path_of(model.model_id, segment, asked.path or f"{asked.seq_id:06d}")
        earlier = None
        with suppress(ArtifactNotFoundError):
            earlier = (await tinker.tenant.aside(find, tinker.tenant, path)).saved.artifact_id

        def read() -> SaveState:
            if earlier is not None and not asked.overwrite and segment == "weights":
                raise ValidationError(
                    f"There is a checkpoint {path} already: another name, or overwrite=True."
                )
            return operation(asked, model, KINDS[segment], path)

        saved: SaveStateResult = await tinker.result(model, asked.seq_id, "save_state", read)
        if earlier is not None and earlier != saved.artifact_id:
            await asyncio.to_thread(tinker.tenant.transport.delete_artifact, earlier)
        return {"path": path, "type": f"save_{'weights' if segment == 'weights' else 'weights_for_sampler'}"}

    @routes.post("/save_weights")
    async def save_weights(request: Request) -> dict[str, Any]:
        """Save weights and optimiser."""
        tinker, asked = tinker_of(request), SaveRequest.read(await request.json())
        model = tinker.model(asked.model_id)
        return await queued(tinker, model, asked.seq_id, lambda: save(tinker, asked, model, "weights"))

    @routes.post("/save_weights_for_sampler")
    async def save_weights_for_sampler(request: Request) -> dict[str, Any]:
        """Save weights to sample from: under a name, or for a sampling session alone."""
        tinker, asked = tinker_of(request), SaveRequest.read(await request.json())
        model = tinker.model(asked.model_id)

        async def snapshot() -> dict[str, Any]:
            session_id = model.model_id.partition(":")[0]
            sampler_id = f"{session_id}:sample:{asked.sampling_session_seq_id}"

            def read() -> SaveState:
                return operation(asked, model, SNAPSHOT, None)

            saved = await tinker.result(model, asked.seq_id, "save_state", read)
            await tinker.add_snapshot(model, sampler_id, saved.artifact_id)
            return {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"}

        def work() -> Awaitable[dict[str, Any]]:
            if asked.path is None and asked.sampling_session_seq_id is not None:
                return snapshot()
            return save(tinker, asked, model, "sampler_weights")

        return await queued(tinker, model, asked.seq_id, work)

    @routes.post("/load_weights")
    async def load_weights(request: Request) -> dict[str, Any]:
        """Load a checkpoint into a model, or make a model of one."""
        tinker, asked = tinker_of(request), LoadRequest.read(await request.json())
        if asked.model_id is None:
            tinker.check_session(str(asked.session_id))
            model_id = f"{asked.session_id}:train:{asked.model_seq_id}"

            async def make() -> dict[str, Any]:
                model = await tinker.create_by_load(asked)
                return {"model_id": model.model_id, "path": asked.path, "type": "load_weights"}

            return {
                "request_id": tinker.begin(future_of(model_id, -1), lambda: told(make)),
                "model_id": model_id,
            }
        model = tinker.model(asked.model_id)

        async def load() -> dict[str, Any]:
            found = missing = ""
            try:
                found = (await tinker.tenant.aside(find, tinker.tenant, asked.path)).saved.artifact_id
            except TGTinkerError as error:
                missing = error.message

            def read() -> LoadState:
                if missing:  # an error of its own: who presents it clears the frames it came through
                    raise ArtifactNotFoundError(missing)
                return LoadState(found, None, asked.optimizer)

            await tinker.result(model, int(asked.seq_id or 0), "load_state", read)
            return {"path": asked.path, "model_id": model.model_id, "type": "load_weights"}

        return await queued(tinker, model, int(asked.seq_id or 0), load)


def add_sampling(routes: APIRouter, tinker_of: Ask) -> None:
    """Add sampling sessions and samples."""

    @routes.post("/create_sampling_session")
    async def create_sampling_session(request: Request) -> dict[str, Any]:
        """Begin a sampling session."""
        tinker, asked = tinker_of(request), SamplerRequest.read(await request.json())
        tinker.check_session(asked.session_id)
        sampler_id = f"{asked.session_id}:sample:{asked.sampling_session_seq_id}"
        await tinker.add_sampler(sampler_id, path=asked.model_path, base_model=asked.base_model)
        return {"sampling_session_id": sampler_id, "type": "create_sampling_session"}

    @routes.get("/samplers/{sampler_id}")
    async def get_sampler(request: Request, sampler_id: str) -> dict[str, Any]:
        """Say what a sampling session samples from."""
        found = tinker_of(request).sampler(sampler_id)
        return {"sampler_id": sampler_id, "base_model": found.base_model, "model_path": found.model_path}

    @routes.post("/asample")
    async def asample(request: Request) -> dict[str, Any]:
        """Queue a sample."""
        tinker, asked = tinker_of(request), SampleRequest.read(await request.json())
        sampler = tinker.sampler(asked.sampling_session_id)
        place = (sampler.sampler_id, -1 if asked.seq_id is None else asked.seq_id)
        request_id = tinker.asked.get(place) if asked.seq_id is not None else None
        if request_id is None:
            tinker.tenant.check_queue()
            request_id = await begin_sample(tinker, sampler.sampler_id, asked)
            tinker.asked[place] = request_id
            while len(tinker.asked) > MOST_LISTED * 4:
                tinker.asked.popitem(last=False)
        ids = [f"{request_id}-{number}" for number in range(max(1, asked.num_samples))]
        return {"request_id": request_id, "sample_sequence_ids": ids}

    async def begin_sample(tinker: Tinker, sampler_id: str, asked: SampleRequest) -> str:
        sampler = tinker.sampler(sampler_id)
        try:
            sample = sample_of(asked, await context_of(tinker, sampler.weights))
            where = sampler.weights
            named = (
                {"artifact_id": where.artifact_id}
                if where.artifact_id
                else {"model_ref": where.config.model_ref}
            )
            handle = await tinker.service.sample(tinker.tenant, SampleFrom(sample, **named), where)
        except ValidationError as error:
            failure = plain(failed(error))
            return tinker.begin(f"fut-{uuid.uuid4().hex[:12]}", lambda: asyncio.sleep(0, failure))

        async def work() -> Content:
            await ended(handle)
            return Content(PROTOBUF, await asyncio.to_thread(response_of, handle.result(), asked))

        return tinker.begin(handle.future_id, lambda: told(work))

    async def context_of(tinker: Tinker, weights: Any) -> int | None:
        samplers = tinker.tenant.transport.samplers
        return (await asyncio.to_thread(samplers.introduction, weights))[1]


def add_checkpoints(routes: APIRouter, tinker_of: Ask) -> None:
    """Add what is known of runs and checkpoints, and deleting them."""

    @routes.post("/weights_info")
    async def info(request: Request) -> dict[str, Any]:
        """Say what a checkpoint is of."""
        tenant = tinker_of(request).tenant
        found = await tenant.aside(find, tenant, str((await request.json()).get("tinker_path")))
        return weights_info(await tenant.aside(tenant.transport.config_of, found.saved.artifact_id))

    async def runs_of(tinker: Tinker) -> list[dict[str, Any]]:
        """Return the runs there are, and those of which checkpoints are left; the one used last first."""
        tenant, found = tinker.tenant, await tinker.tenant.aside(listed, tinker.tenant)
        runs = {
            name: model.told([each for each in found if each.known["run_id"] == name])
            for name, model in tinker.models.items()
        }
        for each in found:
            run_id = each.known["run_id"]
            if run_id not in runs:
                config = await tenant.aside(tenant.transport.config_of, each.saved.artifact_id)
                own = [one for one in found if one.known["run_id"] == run_id]
                metadata = each.known["run_metadata"]
                runs[run_id] = run_told(run_id, config, metadata, each.saved.created_at, own)
        return sorted(runs.values(), key=lambda run: str(run["last_request_time"]), reverse=True)

    @routes.get("/training_runs")
    async def training_runs(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 20,
        offset: Annotated[int, Query(ge=0)] = 0,
    ) -> dict[str, Any]:
        """List the training runs."""
        found = await runs_of(tinker_of(request))
        cursor = {"offset": offset, "limit": limit, "total_count": len(found)}
        return {"training_runs": found[offset : offset + limit], "cursor": cursor}

    @routes.get("/training_runs/{run_id}")
    async def training_run(request: Request, run_id: str) -> dict[str, Any]:
        """Return one."""
        for found in await runs_of(tinker_of(request)):
            if found["training_run_id"] == run_id:
                return found
        raise NotFoundError(f"There is no training run {run_id!r}.")

    @routes.get("/training_runs/{run_id}/checkpoints")
    async def checkpoints(request: Request, run_id: str) -> dict[str, Any]:
        """List the checkpoints of a run."""
        tenant = tinker_of(request).tenant
        return {"checkpoints": [each.told() for each in await tenant.aside(listed, tenant, run_id)]}

    @routes.get("/checkpoints")
    async def all_checkpoints(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 100,
        offset: Annotated[int, Query(ge=0)] = 0,
    ) -> dict[str, Any]:
        """List the checkpoints of all runs."""
        tenant = tinker_of(request).tenant
        found = await tenant.aside(listed, tenant)
        cursor = {"offset": offset, "limit": limit, "total_count": len(found)}
        return {"checkpoints": [each.told() for each in found[offset : offset + limit]], "cursor": cursor}

    @routes.delete("/training_runs/{run_id}/checkpoints/{kind}/{name}", status_code=204)
    async def delete(request: Request, run_id: str, kind: str, name: str) -> None:
        """Delete a checkpoint for good."""
        tenant = tinker_of(request).tenant
        found = await tenant.aside(find, tenant, path_of(run_id, kind, name))
        await tenant.aside(tenant.transport.delete_artifact, found.saved.artifact_id)
        tenant.stored.forget()
