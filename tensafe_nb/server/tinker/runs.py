"""Sessions, models and samplers of one tenant, as the protocol knows them: a model is a training client of ours.

A request of the protocol is answered at once with the id of a future, whose work is a task of the server's loop. The
protocol's numbers of a model's requests are those of a submitter of ours: reordering, gaps and repetitions are
`ServedClient.in_turn`'s business.
"""

import asyncio
import hashlib
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tensafe_nb.config import DPConfig, LoRAConfig, OptimizerConfig, TrainingConfig
from tensafe_nb.core.samplers import StoredWeights
from tensafe_nb.display import as_given
from tensafe_nb.engine.models.load import is_cpu
from tensafe_nb.errors import NotFoundError, QueueFullError, TGTinkerError, ValidationError
from tensafe_nb.futures import promise_of
from tensafe_nb.protocol.operations import LoadState, Operation
from tensafe_nb.server.answers import STATUS, error_of
from tensafe_nb.server.clients import Answer, Place, ServedClient, ended, outcome_of
from tensafe_nb.server.operations import queue
from tensafe_nb.server.service import Service, Tenant
from tensafe_nb.server.tinker.checkpoints import (
    Checkpoint,
    find,
    modules_of,
    moment,
    sweep,
)
from tensafe_nb.server.tinker.requests import LoadRequest, ModelRequest

SUBMITTER = "tinker"
KEPT_FUTURES = 4_000
KEPT_SNAPSHOTS = 16  # of a model: those of earlier sampling sessions are deleted
SILENT = 3600.0  # s without a sign of life after which a session counts as ended
SILENT_WHEN_FULL = 120.0  # the same, where there is no room for another model
DP = "dp_adamw"
DP_FIELDS = set(DPConfig.model_fields) - {"enabled", "sampling"}


@dataclass(frozen=True, slots=True)
class Content:
    """What a future ended with: the body of its answer."""

    media_type: str
    body: bytes


@dataclass(slots=True)
class Model:
    """A model in training.

    Attributes:
        model_id: The id of its run, too.
        client: The training client it is.
        user_metadata: Of whoever made it.
        used_at: When it was last asked for something, in Unix seconds.
        snapshots: Artifacts of its sampling sessions, the oldest first.
    """

    model_id: str
    client: ServedClient
    user_metadata: Mapping[str, Any] | None = None
    used_at: float = field(default_factory=time.time)
    snapshots: list[str] = field(default_factory=list)

    @property
    def is_private(self) -> bool:
        dp = self.client.channel.config.dp_config
        return dp is not None and dp.enabled

    def told(self, checkpoints: list[Checkpoint]) -> dict[str, Any]:
        """Return it as the protocol's training run."""
        return run_told(
            self.model_id, self.client.channel.config, self.user_metadata, self.used_at, checkpoints
        )


def run_told(
    run_id: str,
    config: TrainingConfig,
    user_metadata: Mapping[str, Any] | None,
    used_at: float,
    checkpoints: list[Checkpoint],
) -> dict[str, Any]:
    """Return a training run, with its newest checkpoints."""
    newest: dict[str, Any] = {}
    for each in checkpoints:
        newest.setdefault(each.known["kind"], each.told())
    return {
        "training_run_id": run_id,
        "base_model": config.model_ref,
        "model_owner": "local",
        "is_lora": config.lora_config is not None,
        "lora_rank": None if config.lora_config is None else config.lora_config.rank,
        "corrupted": False,
        "last_request_time": moment(used_at),
        "last_checkpoint": newest.get("training"),
        "last_sampler_checkpoint": newest.get("sampler"),
        "user_metadata": user_metadata,
    }


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampling session.

    Attributes:
        sampler_id: Its id.
        base_model: Of its weights.
        weights: What it samples from.
        model_path: The checkpoint, where it has a path.
    """

    sampler_id: str
    base_model: str
    weights: StoredWeights
    model_path: str | None = None


class Tinker:
    """What one tenant has over this protocol.

    Args:
        service: The server.
        tenant: Whose it is.
    """

    def __init__(self, service: Service, tenant: Tenant) -> None:
        self.service, self.tenant = service, tenant
        self.sessions: dict[str, float] = {}  # when each last gave a sign of life
        self.models: dict[str, Model] = {}
        self.samplers: dict[str, Sampler] = {}
        self.asked: OrderedDict[tuple[str, int], str] = OrderedDict()  # samples, by session and number
        self._futures: OrderedDict[str, asyncio.Task[Content]] = OrderedDict()

    # futures

    def begin(self, request_id: str, work: Callable[[], Coroutine[Any, Any, Content]]) -> str:
        """Let a future's work begin, unless it has begun already: then the request was sent again."""
        if request_id not in self._futures:
            self._futures[request_id] = asyncio.create_task(work())
        while len(self._futures) > KEPT_FUTURES and next(iter(self._futures.values())).done():
            self._futures.popitem(last=False)
        return request_id

    async def outcome(self, request_id: str, seconds: float) -> Content | None:
        """Return what a future ended with; None where it has not after so many seconds.

        Raises:
            NotFoundError: There is none of that id.
        """
        task = self._futures.get(request_id)
        if task is None:
            raise NotFoundError(
                f"There is no request {as_given(request_id)} here, or its result is not kept any more: the server was "
                f"restarted. Go on from the last checkpoint."
            )
        await self.service.or_drained(asyncio.wait({task}, timeout=seconds))
        return task.result() if task.done() else None

    # sessions

    async def new_session(self) -> str:
        """Begin a session; what others have left behind goes."""
        await self.clear(SILENT)
        session_id = uuid.uuid4().hex[:16]
        self.sessions[session_id] = time.time()
        return session_id

    def check_session(self, session_id: str) -> None:
        """Count a sign of life.

        Raises:
            NotFoundError: There is no such session, or it has ended.
        """
        if session_id not in self.sessions:
            raise NotFoundError(
                f"There is no session {as_given(session_id)}: it has ended, or the server restarted."
            )
        self.sessions[session_id] = time.time()

    async def end_session(self, session_id: str) -> None:
        """Close a session's models and samplers; checkpoints stay."""
        self.sessions.pop(session_id, None)
        for model in [each for each in self.models.values() if each.model_id.startswith(f"{session_id}:")]:
            del self.models[model.model_id]
            await self.tenant.close(model.client)
            for snapshot in model.snapshots:
                with suppress(TGTinkerError):
                    await asyncio.to_thread(self.tenant.transport.delete_artifact, snapshot)
        for name in [name for name in self.samplers if name.startswith(f"{session_id}:")]:
            del self.samplers[name]

    async def clear(self, silent: float) -> None:
        """End sessions that have been silent for so long, and delete what has expired."""
        for session_id, heard in list(self.sessions.items()):
            if heard < time.time() - silent:
                await self.end_session(session_id)
        kept = frozenset(name for model in self.models.values() for name in model.snapshots)
        await self.tenant.aside(sweep, self.tenant, kept)

    # models

    def model(self, model_id: str) -> Model:
        """Return a model, also one that an earlier process of the server has left.

        Raises:
            NotFoundError: The tenant has none of that id.
        """
        if model_id not in self.models:
            for client in self.tenant.live:
                if client.journal.begun["key"] == model_id:
                    self.models[model_id] = Model(model_id, client)
                    self.sessions.setdefault(model_id.partition(":")[0], time.time())
        if model_id not in self.models:
            raise NotFoundError(f"There is no model {as_given(model_id)}.")
        found = self.models[model_id]
        found.used_at = time.time()
        return found

    async def create(self, request: ModelRequest) -> Model:
        """Make a model, and wait until it is loaded."""
        config = config_of(request)
        model_id = f"{request.session_id}:train:{request.model_seq_id}"
        return await self._ready(await self._made(model_id, config, request.user_metadata))

    async def create_by_load(self, request: LoadRequest) -> Model:
        """Make a model of a checkpoint, and wait until its state is loaded."""
        found = await self.tenant.aside(find, self.tenant, request.path)
        config = await self.tenant.aside(self.tenant.transport.config_of, found.saved.artifact_id)
        if request.base_model is not None and request.base_model != config.model_ref:
            raise ValidationError(
                f"The checkpoint {request.path} is of {config.model_ref!r}, not of {as_given(request.base_model)}."
            )
        if request.optimizer_config is not None and not request.optimizer:
            config = config.replace(dp_config=dp_of(request.optimizer_config))
        model_id = f"{request.session_id}:train:{request.model_seq_id}"
        model = await self._made(model_id, config, request.user_metadata)
        await self._ready(model)
        await self.result(
            model, 0, "load_state", lambda: LoadState(found.saved.artifact_id, None, request.optimizer)
        )
        return model

    async def _made(
        self, model_id: str, config: TrainingConfig, user_metadata: Mapping[str, Any] | None
    ) -> Model:
        try:
            client = await self.service.create(self.tenant, config, None, model_id)
        except QueueFullError:
            await self.clear(SILENT_WHEN_FULL)  # those whose kernels are gone make way
            client = await self.service.create(self.tenant, config, None, model_id)
        return self.models.setdefault(model_id, Model(model_id, client, user_metadata))

    async def _ready(self, model: Model) -> Model:
        handle = model.client.channel.ready()
        await ended(handle)
        handle.result()  # raises why it could not be loaded
        return model

    async def result(self, model: Model, number: int, verb: str, read: Callable[[], Operation[Any]]) -> Any:
        """Carry out an operation in its turn, and return its result.

        Args:
            model: Whose it is.
            number: Its place among the model's requests; 0 takes its place as it comes.
            verb: Of the operation.
            read: Returns the operation; what it raises breaks the open window, as an operation does that fails.
        """
        future_id = future_of(model.model_id, number)
        place = Place(verb, SUBMITTER, number or None, future_id, is_repeated=True)
        client = model.client

        async def submit() -> Answer:
            return await queue(self.service, self.tenant, client, read, place)

        answer = await (client.in_turn(SUBMITTER, number, submit) if number else submit())
        handle = client.handle(future_id)
        if handle is None:
            told = answer.content["error"]
            raise TGTinkerError(told["message"], code=told["code"])
        await ended(handle)
        promise_of(handle).told = True  # whoever goes on after a failure begins a new window
        if "error" in (outcome := outcome_of(handle)):
            raise TGTinkerError(outcome["error"]["message"], code=outcome["error"]["code"])
        return handle.result()

    async def written_down(self, model: Model, number: int) -> None:
        """Return when a request of a model is in the journal, or has ended; at once where others have to come first.

        Who was answered may take it that a server that is killed then counts this request among those it had.
        """
        if not model.client.is_turn_of(SUBMITTER, number):
            return
        future_id = future_of(model.model_id, number)
        arriving = asyncio.ensure_future(model.client.arrived(future_id))
        await asyncio.wait({arriving, self._futures[future_id]}, return_when=asyncio.FIRST_COMPLETED)
        with suppress(NotFoundError, asyncio.CancelledError):
            arriving.cancel()
            await arriving

    # samplers

    def sampler(self, sampler_id: str) -> Sampler:
        """Return a sampling session.

        Raises:
            NotFoundError: The tenant has none of that id.
        """
        if sampler_id not in self.samplers:
            raise NotFoundError(f"There is no sampling session {as_given(sampler_id)}.")
        return self.samplers[sampler_id]

    async def add_sampler(
        self, sampler_id: str, *, path: str | None = None, base_model: str | None = None
    ) -> Sampler:
        """Begin a sampling session on a checkpoint, or on a model as it is."""
        artifact_id = None
        if path is not None:
            artifact_id = (await self.tenant.aside(find, self.tenant, path)).saved.artifact_id
        elif base_model is None:
            raise ValidationError("create_sampling_session needs a model_path or a base_model.")
        weights = await self.service.stored_weights(
            self.tenant, artifact_id, base_model if path is None else None
        )
        if artifact_id is None:
            weights = replace(weights, config=weights.config.replace(dtype=dtype_here()))
        self.samplers[sampler_id] = Sampler(sampler_id, weights.config.model_ref, weights, path)
        return self.samplers[sampler_id]

    async def add_snapshot(self, model: Model, sampler_id: str, artifact_id: str) -> None:
        """Begin a sampling session on weights that were saved for it alone; the oldest of a model go."""
        weights = await self.service.stored_weights(self.tenant, artifact_id, None)
        self.samplers[sampler_id] = Sampler(sampler_id, weights.config.model_ref, weights)
        model.snapshots.append(artifact_id)
        while len(model.snapshots) > KEPT_SNAPSHOTS:
            with suppress(TGTinkerError):
                await asyncio.to_thread(self.tenant.transport.delete_artifact, model.snapshots.pop(0))


def future_of(model_id: str, number: int) -> str:
    """Return the id of a model's request: the same for the same, however often it is sent."""
    return f"fut-{hashlib.sha256(model_id.encode()).hexdigest()[:24]}-{number}"


def failed(error: BaseException) -> dict[str, Any]:
    """Return an error as the protocol tells it."""
    found = error_of(error)
    category = "user" if STATUS.get(found["code"], 500) < 500 else "server"
    return {"error": found["message"], "category": category}


def config_of(request: ModelRequest) -> TrainingConfig:
    """Return the configuration of the training client that a model is."""
    lora = request.lora_config
    if lora is None:
        raise ValidationError("create_model needs a lora_config: this protocol trains adapters.")
    return TrainingConfig(
        model_ref=request.base_model,
        lora_config=LoRAConfig(
            rank=lora.rank,
            target_modules=modules_of(attention=lora.train_attn, mlp=lora.train_mlp, head=lora.train_unembed),
        ),
        optimizer=OptimizerConfig(betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0),
        dtype=dtype_here(),
        seed=0 if lora.seed is None else lora.seed,
        dp_config=dp_of(request.optimizer_config),
    )


def dtype_here() -> Literal["auto", "float32"]:
    """Return what to compute in: on a CPU float32, as for rewards, since what samples has to be what trains."""
    return "float32" if is_cpu("auto") else "auto"


def dp_of(optimizer: Mapping[str, Any]) -> DPConfig | None:
    """Return the differential privacy that an optimizer_config asks for.

    Raises:
        ValidationError: There is no such optimiser, or it has no such setting.
    """
    settings = {name: value for name, value in optimizer.items() if name != "type"}
    match optimizer.get("type"):
        case "adamw":
            if settings:
                raise ValidationError(
                    f"The optimizer 'adamw' has no setting {as_given(sorted(settings)[0])}."
                )
            return None
        case "dp_adamw":
            unknown = sorted(settings.keys() - DP_FIELDS)
            if unknown:
                raise ValidationError(
                    f"The optimizer 'dp_adamw' has no setting {as_given(unknown[0])}; it has {sorted(DP_FIELDS)}."
                )
            # the SDK sends nothing for None: without a target, no step is refused
            return DPConfig(**{"sampling": "worst_case", "target_epsilon": None} | settings)
    raise ValidationError(
        f"There is no optimizer {as_given(optimizer.get('type'))} on this server: 'adamw', or 'dp_adamw' with "
        f"noise_multiplier, max_grad_norm, target_epsilon, target_delta."
    )
