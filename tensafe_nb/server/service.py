"""Tenants of a server: each with its training clients and its artifacts, and what it may have of them."""

import asyncio
import logging
import shutil
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from tensafe_nb.config import TrainingConfig
from tensafe_nb.core import queue
from tensafe_nb.core.engines import MakesEngines
from tensafe_nb.core.samplers import StoredWeights
from tensafe_nb.errors import (
    NotFoundError,
    StorageError,
    TGTinkerError,
    TrainingClientNotFoundError,
    ValidationError,
    nearest,
)
from tensafe_nb.futures import FutureHandle
from tensafe_nb.history.log import RunHistory
from tensafe_nb.protocol.codec import encode
from tensafe_nb.protocol.operations import Operation, ReadAdapter, Sample, SampleFrom, SaveState
from tensafe_nb.protocol.results import ClientStatus, SampleResult, StateSource
from tensafe_nb.server.clients import KEPT_HANDLES, ServedClient
from tensafe_nb.server.door.guard import MOST_BODY_BYTES
from tensafe_nb.server.door.limits import (
    Limits,
    Quotas,
    too_many_clients,
    too_many_connections,
    too_many_waiting,
    too_much_stored,
)
from tensafe_nb.server.door.once import Answers
from tensafe_nb.server.door.stored import KINDS, Stored
from tensafe_nb.server.figures import Figures
from tensafe_nb.server.journal import Journal
from tensafe_nb.server.resuming import journals_of, resume
from tensafe_nb.store.home import TENANT, Home
from tensafe_nb.transports.embedded import EmbeddedTransport

logger = logging.getLogger(__name__)

R = TypeVar("R")

MOST_TOKENS = 1 << 16  # B × T of a batch
MOST_RANK = 256
MOST_SAMPLED = 1 << 21  # tokens that one sample() may draw, in all sequences together
SYNC_SECONDS = 1.0
ENCRYPTED_IDLE = 900.0  # s after which a connection that nobody uses is dropped; its client opens another
LAST_WORDS = 30.0  # s for which a closed client still takes what its runs tell of their end


class Tenant:
    """One tenant: its training clients and its artifacts.

    Args:
        home: Its share of the server's home folder.
        quotas: What each tenant may have.
        engines: Makes the engines of its training clients.
    """

    def __init__(self, home: Home, quotas: Quotas, engines: MakesEngines | None = None) -> None:
        self.home, self._quotas = home, quotas
        self.transport = EmbeddedTransport(home, "file", served=True, engines=engines)
        self.stored = Stored(home)
        self.answers = Answers(home.answers(), self.transport.vault.keys)
        self.clients: dict[str, ServedClient] = {}
        self.making = 0  # clients that are on their way
        self.opening = 0  # encrypted connections that are
        self.made: dict[str, asyncio.Future[ServedClient]] = {}  # by the key of whoever asked
        self.samples: OrderedDict[str, FutureHandle[SampleResult]] = (
            OrderedDict()
        )  # without a training client

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

    @property
    def limits(self) -> Limits:
        """What it may have."""
        return self._quotas.of(self.home.tenant)

    @property
    def live(self) -> list[ServedClient]:
        """Those of its clients that are not closed."""
        return [
            client for client in self.clients.values() if client.channel.status is not ClientStatus.TERMINATED
        ]

    def handle(self, future_id: str) -> FutureHandle[Any]:
        """Return the handle of an operation of one of its clients, or of what it samples without one.

        Raises:
            NotFoundError: It has none of that id.
        """
        if future_id in self.samples:
            return self.samples[future_id]
        for client in self.clients.values():
            handle = client.handle(future_id)
            if handle is not None:
                return handle
        raise NotFoundError(f"There is no operation {future_id!r} here, or its result is not kept any more.")

    def room(self, *, beyond: float = 0.0) -> int | None:
        """Return how many bytes it may still store; None where there is no limit.

        Args:
            beyond: A share of the limit that may come on top of it.

        Raises:
            StorageError: None at all.
        """
        limit = self.limits.stored_bytes
        if limit is None:
            return None
        left = int(limit * (1 + beyond)) - self.stored.total()
        if left <= 0:
            raise too_much_stored(self.stored.bytes, limit)
        return left

    def create(self, config: TrainingConfig, source: StateSource | None, key: str | None) -> ServedClient:
        """Make a training client; see `Service.create`."""
        made: list[Journal] = []

        def journal_of(training_client_id: str, config: TrainingConfig) -> Journal:
            begun = {
                "training_client_id": training_client_id,
                "config": encode(config),
                "source": encode(source),
                "created_at": time.time(),
                "key": key,
                "failure": None,
            }
            folder, keys = self.home.journal(training_client_id), self.transport.vault.keys
            try:
                made.append(Journal(folder, keys, self.home.tenant, begun))
            except StorageError:
                shutil.rmtree(folder, ignore_errors=True)  # half a journal is none
                raise
            return made[0]

        return ServedClient(self.transport.create(config, source, journal_of), made[0])

    def resume(self) -> None:
        """Bring back the training clients that an earlier process has left, those first that others may come from."""
        journals = journals_of(self.home, self.transport)
        for journal in sorted(journals, key=lambda journal: float(journal.begun["created_at"])):
            client = resume(journal, self.home, self.transport)
            if client is not None:
                self.clients[client.channel.training_client_id] = client

    def check_queue(self) -> None:
        """Refuse a submission, before it is anywhere, where no more of this tenant may wait.

        Raises:
            QueueFullError: Says after how many seconds to ask again.
        """
        most, sampling = self.limits.queued, sum(not handle.done() for handle in self.samples.values())
        if sampling + sum(client.channel.waiting for client in self.live) >= most:
            error = too_many_waiting(most)
            self._quotas.note(error.code)
            raise error

    def keep(self, handle: FutureHandle[SampleResult]) -> None:
        """Keep the handle of what is sampled without a training client for whoever asks for the result."""
        self.samples[handle.future_id] = handle
        while len(self.samples) > KEPT_HANDLES and next(iter(self.samples.values())).done():
            self.samples.popitem(last=False)

    @asynccontextmanager
    async def opening_encrypted(self) -> AsyncIterator[None]:
        """Open an encrypted connection, if there may be one more.

        Raises:
            QueueFullError: There are as many as may be.
        """
        there = self.opening + sum(len(client.channel.connections.open) for client in self.live)
        if there >= self.limits.encrypted:
            error = too_many_connections(there)
            self._quotas.note(error.code)
            raise error
        self.opening += 1
        try:
            yield
        finally:
            self.opening -= 1

    async def aside(self, work: Callable[..., R], *arguments: Any) -> R:
        """Do on a thread what may take long; see `Quotas.aside`."""
        return await self._quotas.aside(self.home.tenant, work, *arguments)

    async def close(self, client: ServedClient) -> None:
        """Terminate a client; for a while it takes what its runs tell, then it is forgotten."""
        await asyncio.to_thread(client.channel.close)
        self.stored.forget()
        asyncio.get_running_loop().call_later(LAST_WORDS, self.forget, client)

    def end_of(self, training_client_id: str) -> dict[str, Any]:
        """Return how a client of its stood that was terminated in an earlier process, as its log tells."""
        state = RunHistory.load(self.home.event_log(training_client_id)).state
        return {"status": str(ClientStatus.TERMINATED), "queue_depth": 0, "step": state.step}

    def forget(self, client: ServedClient) -> None:
        """Let go of a client that has been closed."""
        if not client.hung_up:
            client.hang_up()
        self.stored.forget()  # its journal has gone
        self.clients.pop(client.channel.training_client_id, None)


class Service:
    """All tenants of a server.

    Args:
        home: The server's home folder.
        models: The folder under which a `model_ref` names a model; None has the built-in ones only.
        hub_models: Hub ids that may be loaded.
        quotas: Of each tenant.
        losses: Dotted paths of losses that may be used.
        idle_after: Seconds after which a training client that nobody uses is put away; None keeps it in memory.
        exports: Weights may leave in the clear.
        engines: Makes the engines of all training clients; by default they are in this process.
    """

    def __init__(
        self,
        home: Home,
        models: Path | None,
        hub_models: Sequence[str],
        quotas: Quotas,
        losses: Sequence[str] = (),
        idle_after: float | None = None,
        *,
        exports: bool = True,
        engines: MakesEngines | None = None,
    ) -> None:
        self._engines = engines
        self._home, self._models, self._hub_models = home, models, frozenset(hub_models)
        self.quotas, self.dotted_losses = quotas, frozenset(losses)
        self.idle_after, self.exports = idle_after, exports
        self._tenants: dict[str, Tenant] = {}
        self.figures, self.draining, self._drained = Figures(), False, asyncio.Event()

    def tenant(self, name: str) -> Tenant:
        """Return a tenant, known or new."""
        if name not in self._tenants:
            self._tenants[name] = Tenant(Home(self._home.root, name), self.quotas, self._engines)
        self._tenants[name].stored.is_changed = True
        return self._tenants[name]

    def stored(self) -> dict[str, int]:
        """Return how many bytes all tenants together store, by kind, as they were counted last."""
        counted: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        for tenant in self._tenants.values():
            counted.update(tenant.stored.bytes)
        return dict(counted)

    def live_clients(self) -> list[ServedClient]:
        """Return every client of every tenant that is not closed."""
        return [client for tenant in self._tenants.values() for client in tenant.live]

    def limits(self) -> dict[str, int]:
        """Return how much of what one request may ask for."""
        return {
            "tokens_of_a_batch": MOST_TOKENS,
            "rank": MOST_RANK,
            "body_bytes": MOST_BODY_BYTES,
            "waiting_operations": queue.MAX_PENDING,
        }

    async def create(
        self, tenant: Tenant, config: TrainingConfig, source: StateSource | None, key: str | None
    ) -> ServedClient:
        """Make a training client, or return the one that was made for this key.

        Raises:
            ValidationError: A model that is not offered here, a rank above the limit.
            QueueFullError: It has as many as it may.
        """
        for client in tenant.live:
            if key is not None and client.journal.begun["key"] == key:
                return client
        if key is not None and key in tenant.made:
            return await asyncio.shield(tenant.made[key])
        made = asyncio.ensure_future(self._make(tenant, config, source, key))
        if key is not None:
            tenant.made[key] = made
            made.add_done_callback(lambda _: tenant.made.pop(key))
        return await asyncio.shield(made)

    async def _make(
        self, tenant: Tenant, config: TrainingConfig, source: StateSource | None, key: str | None
    ) -> ServedClient:
        self.refuse_if_draining()
        there = len(tenant.live) + tenant.making
        if there >= tenant.limits.clients:
            self.quotas.note("too_many")
            raise too_many_clients(there)
        if config.lora_config is not None and config.lora_config.rank > MOST_RANK:
            raise ValidationError(f"LoRAConfig.rank is at most {MOST_RANK} on this server.")
        self._refuse_code(config.loss.type)
        self._check_model(config.model_ref)
        tenant.making += 1  # of others that are asked for at the same time, one more is there already
        try:
            await asyncio.to_thread(tenant.room)
            if source is not None and source.future_id is not None:  # it may still be on its way here
                with suppress(NotFoundError):
                    await tenant.client(source.parent or "").arrived(source.future_id)
            client = await asyncio.to_thread(tenant.create, config, source, key)
        finally:
            tenant.making -= 1
        tenant.clients[client.channel.training_client_id] = client
        client.channel.subscribe(self.figures.count)
        client.channel.subscribe(tenant.stored.count)
        return client

    def resume(self) -> None:
        """Bring back the training clients of all tenants that an earlier process has left; their models load later."""
        names = [TENANT, *sorted(folder.name for folder in (self._home.root / "tenants").glob("*"))]
        for name in names:
            self.tenant(name).resume()
        for tenant in self._tenants.values():
            for client in tenant.live:
                client.channel.subscribe(self.figures.count)
                client.channel.subscribe(tenant.stored.count)

    def offered_models(self) -> list[str]:
        """Return the names of models that may be loaded; of a folder, those that lie directly in it."""
        there = (
            [] if self._models is None else [path.name for path in self._models.iterdir() if path.is_dir()]
        )
        inside = sorted(name for name in there if self._is_inside(name))
        return ["builtin:tiny", "builtin:sums", *inside, *sorted(self._hub_models)]

    def _is_inside(self, ref: str) -> bool:
        """Whether it names something beneath the folder of models, and no link that leads out of it."""
        if self._models is None:
            return False
        root = self._models.resolve()
        with suppress(ValueError, OSError):  # no path at all
            found = (root / ref).resolve()
            beneath = not Path(ref).is_absolute() and found.is_relative_to(root) and found != root
            return beneath and found.exists()
        return False

    def _check_model(self, ref: str) -> None:
        if ref.startswith("builtin:") or ref in self._hub_models or self._is_inside(ref):
            return
        raise ValidationError(  # the same where it is not there, and where it is not offered
            f"The model {ref!r} is not offered by this server.{nearest(ref, self.offered_models())} Whoever runs it "
            "offers others by serve --models and --hub-model.",
            details={"given": ref},
        )

    async def sample(
        self, tenant: Tenant, request: SampleFrom, weights: StoredWeights | None = None
    ) -> FutureHandle[SampleResult]:
        """Sample without a training client: from a checkpoint's weights, or from a model that is offered here.

        Raises:
            ArtifactNotFoundError: The tenant has no such checkpoint.
            ValidationError: A model that is not offered here, or more than one request may draw.
            QueueFullError: As many operations wait as may.
        """
        tenant.check_queue()
        self.check_operation(tenant, request.sample)
        if weights is None:  # else they are known already
            weights = await self.stored_weights(tenant, request.artifact_id, request.model_ref)
        handle = tenant.transport.samplers.submit(request, weights)
        tenant.keep(handle)
        return handle

    async def stored_weights(
        self, tenant: Tenant, artifact_id: str | None, model_ref: str | None
    ) -> StoredWeights:
        """Return the weights that are named, where they are offered here.

        Raises:
            ArtifactNotFoundError: The tenant has no such checkpoint.
            ValidationError: A model that is not offered here.
        """
        if model_ref is not None:
            self._check_model(model_ref)
        weights = await tenant.aside(tenant.transport.samplers.weights, artifact_id, model_ref)
        self._check_model(weights.config.model_ref)  # of a checkpoint that came from elsewhere
        return weights

    def check_operation(self, tenant: Tenant, operation: Operation[Any]) -> None:
        """Refuse what one request may not ask for."""
        self.refuse_if_draining()
        batch = getattr(operation, "batch", None)
        if batch is not None and batch.input_ids.size > MOST_TOKENS:
            rows, tokens = batch.shape
            raise ValidationError(
                f"The batch has {rows} × {tokens} tokens; this server takes {MOST_TOKENS} in one. Send several with "
                f"forward_backward: their gradients add up."
            )
        if isinstance(operation, Sample):
            sampling = operation.sampling
            drawn = len(operation.prompts) * sampling.num_samples * sampling.max_new_tokens
            drawn *= 1 + sampling.top_logprobs
            if drawn > MOST_SAMPLED:
                raise ValidationError(
                    f"This may draw {drawn:,} tokens, top_logprobs counted; this server draws {MOST_SAMPLED:,} in one. "
                    f"Sample in parts."
                )
        self._refuse_code(getattr(operation, "loss_fn", None))
        if isinstance(operation, SaveState):
            tenant.room()
        if isinstance(operation, ReadAdapter):
            self.refuse_if_kept()

    def refuse_if_kept(self) -> None:
        """Let weights leave in the clear only where whoever runs the server lets them.

        Raises:
            ValidationError: They do not.
        """
        if not self.exports:
            raise ValidationError(
                "Weights do not leave this server in the clear: whoever runs it has started it with serve --no-export.",
                code="forbidden",
            )

    def _refuse_code(self, loss: object) -> None:
        """Refuse a loss that is a path to somebody's code, unless whoever runs the server names that very path."""
        if isinstance(loss, str) and ":" in loss and loss not in self.dotted_losses:
            raise ValidationError(
                "Losses from a dotted path run in the user's own process only. Whoever runs the server may allow one "
                "by its name: serve --loss pkg.mod:attr",
                code="forbidden",
            )

    def refuse_if_draining(self) -> None:
        """Take nothing new once the server is about to stop.

        Raises:
            TGTinkerError: It is.
        """
        if self.draining:
            raise TGTinkerError("This server is about to stop and takes nothing new.", code="draining")

    async def or_drained(self, wait: Coroutine[Any, Any, object]) -> None:
        """Wait, but no longer than until the server has drained: what has not ended by then does not end here."""
        waits = {asyncio.ensure_future(wait), asyncio.ensure_future(self._drained.wait())}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()

    async def keep_house(self) -> None:
        """Put the journals on the disk, and away what nobody uses, about once a second, until the server stops."""
        while not self.draining:
            await asyncio.sleep(SYNC_SECONDS)
            for client in self.live_clients():
                client.put_away_if_idle(self.idle_after)
                client.channel.connections.expire(ENCRYPTED_IDLE)
                try:
                    await asyncio.to_thread(client.journal.sync)
                except TGTinkerError as error:
                    logger.error("a journal could not be put on the disk; it is tried again: %s", error)
            for tenant in list(self._tenants.values()):
                if self.idle_after is not None:
                    tenant.transport.samplers.put_away(self.idle_after)
                with suppress(TGTinkerError):  # it is tried again
                    await asyncio.to_thread(tenant.answers.sync)
                if tenant.stored.is_due:
                    await asyncio.to_thread(tenant.stored.measure)

    async def drain(self) -> None:
        """Finish what runs, leave what waits to the journals, end all streams, write out the logs; idempotent."""
        self.draining = True
        await asyncio.gather(*(client.drain() for client in self.live_clients()))
        for tenant in self._tenants.values():
            for client in list(tenant.clients.values()):
                tenant.forget(client)
            await asyncio.to_thread(tenant.transport.close)
            tenant.answers.close()
        self._drained.set()
