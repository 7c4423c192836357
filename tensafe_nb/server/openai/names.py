"""What the name of a model means: a training client with its latest weights, or a checkpoint."""

from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any, Literal

from pydantic import BaseModel

from tensafe_nb.core.samplers import StoredWeights
from tensafe_nb.display import as_given
from tensafe_nb.errors import ArtifactNotFoundError, NotFoundError, TGTinkerError, ValidationError
from tensafe_nb.futures import FutureHandle
from tensafe_nb.protocol.operations import Sample, SampleFrom
from tensafe_nb.protocol.results import SampleResult
from tensafe_nb.server.clients import Place, ServedClient, ended
from tensafe_nb.server.service import Service, Tenant


class ModelEntry(BaseModel):
    """A model that can be sampled from; the last two as vLLM tells them."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str | None
    max_model_len: int | None


class ModelList(BaseModel):
    """Those that there are."""

    object: Literal["list"]
    data: list[ModelEntry]


class NamedModel(ABC):
    """What can be sampled from under a name."""

    @property
    @abstractmethod
    def entry(self) -> dict[str, Any]:
        """What there is to tell of it."""

    @property
    @abstractmethod
    def context(self) -> int | None:
        """How many tokens it reads; known once its tokenizer is."""

    @abstractmethod
    async def tokenizer(self) -> Any:
        """Return its tokenizer; waits until the model is loaded."""

    @abstractmethod
    async def submit(self, sample: Sample) -> FutureHandle[SampleResult]:
        """Queue what is asked for."""

    @abstractmethod
    def fingerprint(self, result: SampleResult) -> str:
        """Return what names the weights: where it is equal, equal seeds draw the same."""

    @abstractmethod
    def refuse_if_over(self) -> None:
        """Wait for nothing that will not come any more.

        Raises:
            TGTinkerError: The server is about to stop.
        """


class LiveModel(NamedModel):
    """A training client: the weights that it has when a sample's turn comes."""

    def __init__(self, tenant: Tenant, client: ServedClient) -> None:
        self._tenant, self._client = tenant, client

    @property
    def entry(self) -> dict[str, Any]:
        """What there is to tell of it."""
        info = self._client.channel.info()
        return entry_of(info.training_client_id, info.created_at, info.model_ref, info.context)

    @property
    def context(self) -> int | None:
        """How many tokens it reads."""
        return self._client.channel.info().context

    async def tokenizer(self) -> Any:
        """Return its tokenizer."""
        loading = self._client.channel.ready()
        await ended(loading)
        loading.result()
        return await self._tenant.aside(self._client.channel.tokenizer)

    async def submit(self, sample: Sample) -> FutureHandle[SampleResult]:
        """Queue what is asked for, behind what the training client was told to do before."""
        return await self._client.submit(sample, Place(Sample.verb), passes_on=False)

    def fingerprint(self, result: SampleResult) -> str:
        """Return client and version."""
        return f"{self._client.channel.training_client_id}@{result.policy_version}"

    def refuse_if_over(self) -> None:
        """Refuse once the client was put down for the process to come."""
        if self._client.hung_up:
            raise TGTinkerError("This server is about to stop and takes nothing new.", code="draining")


class StoredModel(NamedModel):
    """A checkpoint, or a model as it is: no training client is needed."""

    def __init__(
        self, service: Service, tenant: Tenant, name: str, weights: StoredWeights, created: float
    ) -> None:
        self._service, self._tenant, self._name = service, tenant, name
        self._weights, self._created = weights, created
        self._context: int | None = None

    @property
    def entry(self) -> dict[str, Any]:
        """What there is to tell of it."""
        return entry_of(self._name, self._created, self._weights.config.model_ref, None)

    @property
    def context(self) -> int | None:
        """How many tokens it reads."""
        return self._context

    async def tokenizer(self) -> Any:
        """Return its tokenizer."""
        introduction = self._tenant.transport.samplers.introduction
        tokenizer, self._context = await self._tenant.aside(introduction, self._weights)
        return tokenizer

    async def submit(self, sample: Sample) -> FutureHandle[SampleResult]:
        """Queue what is asked for."""
        artifact_id = self._weights.artifact_id
        model_ref = self._weights.config.model_ref if artifact_id is None else None
        return await self._service.sample(self._tenant, SampleFrom(sample, artifact_id, model_ref))

    def fingerprint(self, result: SampleResult) -> str:
        """Return artifact and version."""
        return f"{self._weights.artifact_id or self._name}@{result.policy_version}"

    def refuse_if_over(self) -> None:
        """Refuse once the server is about to stop: what waits for such weights ends with it."""
        self._service.refuse_if_draining()


def entry_of(name: str, created: float, root: str | None, context: int | None) -> dict[str, Any]:
    """Describe a model."""
    return {
        "id": name,
        "object": "model",
        "created": int(created),
        "owned_by": "tensafe_nb",
        "root": root,
        "max_model_len": context,
    }


async def listed(tenant: Tenant) -> list[dict[str, Any]]:
    """Describe training clients, and of each name the newest checkpoint; oldest first."""
    clients = [LiveModel(tenant, client).entry for client in tenant.live]
    saved = await tenant.aside(tenant.transport.list_artifacts, None)
    newest = {one.name: one for one in reversed(saved) if one.name is not None}
    stored = [entry_of(str(name), one.created_at, one.model_ref, None) for name, one in newest.items()]
    return sorted([*clients, *stored], key=lambda entry: entry["created"])


async def named(service: Service, tenant: Tenant, name: str) -> NamedModel:
    """Return what a name stands for.

    Raises:
        NotFoundError: Nothing of this tenant's.
    """
    for client in tenant.live:
        if client.channel.training_client_id == name:
            return LiveModel(tenant, client)
    with suppress(ArtifactNotFoundError):
        saved = await tenant.aside(tenant.transport.get_artifact, name)
        weights = await service.stored_weights(tenant, saved.artifact_id, None)
        return StoredModel(service, tenant, name, weights, saved.created_at)
    with suppress(ValidationError):  # it is not offered, which is told as if it were not there
        return StoredModel(service, tenant, name, await service.stored_weights(tenant, None, name), 0)
    raise NotFoundError(
        f"There is no model {as_given(name)}. GET /v1/models lists those that there are.",
        code="model_not_found",
        details={"param": "model"},
    )
