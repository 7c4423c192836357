"""The core in the same process: each training client is a Worker with a thread of its own."""

import atexit
import uuid
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

from tensafe_nb.config import TrainingConfig
from tensafe_nb.core import checkpoints, export
from tensafe_nb.core.bus import EventBus
from tensafe_nb.core.engines import InThisProcess, MakesEngines
from tensafe_nb.core.ledger import TenantLedger
from tensafe_nb.core.past import Keeper, Resumed
from tensafe_nb.core.samplers import Samplers
from tensafe_nb.core.worker import Origin, Worker
from tensafe_nb.display import as_given
from tensafe_nb.engine.models import adapter_folders
from tensafe_nb.errors import (
    ClientClosedError,
    DecryptionError,
    TGTinkerError,
    TrainingClientNotFoundError,
)
from tensafe_nb.events import ArtifactDeleted, ClientCreated, Event, Forked, StateLoaded
from tensafe_nb.futures import FutureHandle
from tensafe_nb.losses import resolve_loss
from tensafe_nb.protocol.codec import encode
from tensafe_nb.protocol.operations import SampleFrom
from tensafe_nb.protocol.results import (
    AuditLogEntry,
    AuditVerification,
    SampleResult,
    SaveStateResult,
    StateSource,
    TrainingClientInfo,
)
from tensafe_nb.store.home import Home
from tensafe_nb.store.vault import Vault

_alive: "weakref.WeakSet[Worker]" = weakref.WeakSet()  # of this process; one that works is held by its thread


class EmbeddedTransport:
    """Training clients of this process, and the artifacts of a home folder.

    It holds no worker: a client holds its own.

    Args:
        home: Where everything is kept.
        key_source: "file", "env" or "passphrase": where the key of the artifacts comes from.
        served: Its users are in other processes: none of them can change what its clients share.
        engines: Makes the engines of its training clients; by default they are in this process.
    """

    def __init__(
        self,
        home: Home,
        key_source: str | None = None,
        *,
        served: bool = False,
        engines: MakesEngines | None = None,
    ) -> None:
        self._home, self._served, self._engines = home, served, engines or InThisProcess()
        self._workers: weakref.WeakValueDictionary[str, Worker] = weakref.WeakValueDictionary()
        self._closed = False
        self.vault = self._vault = Vault(home, key_source)
        self._ledger = TenantLedger(self._vault.audit, self._vault.tables)
        self.samplers = Samplers(self._vault, self._engines, served=served)

    def create(
        self,
        config: TrainingConfig,
        source: StateSource | None = None,
        keeper_of: "Callable[[str, TrainingConfig], Keeper] | None" = None,
    ) -> Worker:
        """Make a training client; see `Transport.create`.

        Args:
            config: What it is made of.
            source: The state it starts from.
            keeper_of: Makes the keeper of a training client, given its id and its configuration.
        """
        if self._closed:
            raise ClientClosedError("This ServiceClient is closed. Create a new one: ServiceClient().")
        loss = resolve_loss(config.loss.type, **config.loss.kwargs)
        self._engines.check(config)
        config = config.replace(lora_config=adapter_folders.announced(config.model_ref, config.lora_config))
        relative = self._workers.get(source.parent) if source is not None and source.parent else None
        origin = Origin.of(source, relative) if source is not None else None
        training_client_id = f"tc-{uuid.uuid4().hex[:12]}"
        created = ClientCreated(training_client_id=training_client_id, config=encode(config))
        bus = EventBus(self._home.event_log(training_client_id))
        try:
            self._vault.keys.primary_id()  # one that cannot be had is an error of the call, not of the first operation
        except TGTinkerError:
            bus.close()
            raise
        bus.publish(created)
        try:
            keeper = None if keeper_of is None else keeper_of(training_client_id, config)
        except BaseException:
            bus.close()
            raise
        worker = Worker(
            training_client_id,
            config,
            bus,
            loss,
            self._vault,
            self._ledger,
            origin,
            keeper,
            served=self._served,
            engines=self._engines,
        )
        self._know(worker)
        if relative is not None:
            tell_of_fork(relative, worker)
        return worker

    def _know(self, worker: Worker) -> None:
        self._workers[worker.training_client_id] = worker
        _alive.add(worker)

    def resume(
        self,
        bus: EventBus,
        config: TrainingConfig,
        source: StateSource | None,
        keeper: Keeper | None,
        resumed: Resumed,
    ) -> Worker:
        """Bring a training client back that an earlier process has left.

        Args:
            bus: Its log.
            config: What it is made of.
            source: The state it started from.
            keeper: Keeps it.
            resumed: What is left of it.
        """
        relative = self._workers.get(source.parent) if source is not None and source.parent else None
        origin = None
        if source is not None:
            origin = Origin(source) if resumed.base is not None else Origin.of(source, relative)
        loss = resolve_loss(config.loss.type, **config.loss.kwargs)
        name = resumed.info.training_client_id
        worker = Worker(
            name,
            config,
            bus,
            loss,
            self._vault,
            self._ledger,
            origin,
            keeper,
            resumed,
            served=self._served,
            engines=self._engines,
        )
        self._know(worker)
        if relative is not None:
            tell_of_fork(relative, worker)
        return worker

    def attach(self, training_client_id: str) -> Worker:
        worker = self._workers.get(training_client_id)
        if worker is None or not worker.attach():
            known = [info.training_client_id for info in self.list_training_clients()]
            raise TrainingClientNotFoundError(
                f"There is no training client {as_given(training_client_id)} in this process. Known: {known}. "
                f"One that nothing refers to any more is freed: keep it in a variable. The history of earlier ones is "
                f"in list_runs()."
            )
        return worker

    def list_training_clients(self) -> list[TrainingClientInfo]:
        known = [worker.info() for worker in self._workers.values()]
        return sorted(
            (info for info in known if info.status != "TERMINATED"), key=lambda info: info.created_at
        )

    def sample(self, request: SampleFrom) -> FutureHandle[SampleResult]:
        return self.samplers.submit(request)

    def list_artifacts(self, training_client_id: str | None) -> list[SaveStateResult]:
        return self._vault.list(training_client_id)

    def get_artifact(self, artifact_id: str) -> SaveStateResult:
        return self._vault.artifacts.get(artifact_id)

    def config_of(self, artifact_id: str) -> TrainingConfig:
        return checkpoints.config_of(self._vault.artifacts, artifact_id)

    def pull_artifact(self, artifact_id: str, to: Path | None) -> bytes | Path:
        return self._vault.pull(artifact_id, to)

    def push_artifact(self, path: Path) -> SaveStateResult:
        return self._vault.push(path)

    def delete_artifact(self, artifact_id: str) -> None:
        found = self._vault.artifacts.resolve(artifact_id)
        try:
            owner = self._vault.artifacts.get(found).saved_by
        except DecryptionError:  # damaged: it can still be thrown away
            owner = ""
        self._vault.delete(found)
        worker = self._workers.get(owner)
        if worker is not None:
            worker.bus.publish(ArtifactDeleted(artifact_id=found))

    def export_adapter(self, artifact_id: str, path: Path, merged: bool) -> Path:
        with self._vault.exported(artifact_id):
            return export.export(self._vault, artifact_id, path, merged=merged)

    def rotate_keys(self) -> int:
        return self._vault.rotate()

    def audit_logs(
        self, training_client_id: str | None, operation: str | None, limit: int, offset: int
    ) -> Sequence[AuditLogEntry]:
        return self._vault.logs(training_client_id, operation, limit, offset)

    def verify_audit_log(self, anchors: Sequence[str]) -> AuditVerification:
        return self._vault.verify(anchors)

    def close(self) -> None:
        self._closed = True
        for worker in list(self._workers.values()):
            worker.close()
            worker.hang_up()
        self.samplers.close()
        self._engines.close()
        self._vault.audit.close()


@atexit.register
def close_all() -> None:
    """Leave no thread inside torch when a script just ends."""
    for worker in list(_alive):
        worker.close()
        worker.hang_up()


def tell_of_fork(parent: Worker, child: Worker) -> None:
    """Publish in both logs that the child has started, once its state is loaded."""
    names = parent.training_client_id, child.training_client_id
    of_parent, of_child = weakref.ref(parent.bus), weakref.ref(child.bus)  # neither keeps the other
    told: list[StateLoaded] = []

    def on_event(event: Event) -> None:
        if isinstance(event, StateLoaded) and not told:
            told.append(event)
            forked = Forked(parent=names[0], artifact_id=event.artifact_id, child=names[1], step=event.step)
            for bus in (of_child(), of_parent()):
                if bus is not None:
                    bus.publish(forked)

    if not any(fork.child == names[1] for fork in child.history.state.forks):
        child.bus.subscribe(on_event, after=0)
