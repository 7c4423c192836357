"""The core in the same process: each training client is a Worker with a thread of its own."""

import atexit
import uuid
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tensafe_nb.config import TrainingConfig
from tensafe_nb.core import checkpoints, export
from tensafe_nb.core.bus import EventBus
from tensafe_nb.core.ledger import TenantLedger
from tensafe_nb.core.worker import Origin, Worker
from tensafe_nb.engine.models import adapter_folders
from tensafe_nb.errors import ClientClosedError, DecryptionError, TGTinkerError
from tensafe_nb.events import ArtifactDeleted, ClientCreated, Event, Forked, StateLoaded
from tensafe_nb.losses import resolve_loss
from tensafe_nb.protocol.codec import encode
from tensafe_nb.protocol.results import AuditLogEntry, AuditVerification, SaveStateResult
from tensafe_nb.store import home
from tensafe_nb.store.vault import Vault
from tensafe_nb.transports.base import Channel

_alive: "weakref.WeakSet[Worker]" = weakref.WeakSet()  # of this process; one that works is held by its thread


class EmbeddedTransport:
    """Training clients of this process, and the artifacts of this home folder.

    It holds no worker: a client holds its own.

    Args:
        key_source: "file", "env" or "passphrase": where the key of the artifacts comes from.
    """

    def __init__(self, key_source: str | None = None) -> None:
        self._workers: weakref.WeakValueDictionary[str, Worker] = weakref.WeakValueDictionary()
        self._closed = False
        self._vault = Vault(key_source)
        self._ledger = TenantLedger(self._vault.audit, self._vault.tables)

    def create(self, config: TrainingConfig) -> Channel:
        return self._start(config, None)

    def restore(
        self, config: TrainingConfig, artifact_id: Callable[[], str], relative: Channel | None = None
    ) -> Channel:
        parent = self._workers.get(relative.training_client_id) if relative is not None else None
        child = self._start(config, Origin(artifact_id, parent))
        if parent is not None:
            _tell_of_fork(parent, child)
        return child

    def _start(self, config: TrainingConfig, origin: Origin | None) -> Worker:
        if self._closed:
            raise ClientClosedError("This ServiceClient is closed. Create a new one: ServiceClient().")
        loss = resolve_loss(config.loss.type, **config.loss.kwargs)
        config = config.replace(lora_config=adapter_folders.announced(config.model_ref, config.lora_config))
        training_client_id = f"tc-{uuid.uuid4().hex[:12]}"
        created = ClientCreated(training_client_id=training_client_id, config=encode(config))
        bus = EventBus(home.event_log(training_client_id))
        try:
            self._vault.keys.primary_id()  # one that cannot be had is an error of the call, not of the first operation
        except TGTinkerError:
            bus.close()
            raise
        bus.publish(created)
        worker = Worker(training_client_id, config, bus, loss, self._vault, self._ledger, origin)
        self._workers[training_client_id] = worker
        _alive.add(worker)
        return worker

    def channels(self) -> list[Channel]:
        known = sorted(self._workers.values(), key=lambda worker: worker.created_at)
        return [worker for worker in known if worker.info().status != "TERMINATED"]

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
            return export.export(self._vault.artifacts, artifact_id, path, merged=merged)

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
        _close(self._workers.values())


def _close(workers: Iterable[Worker]) -> None:
    for worker in list(workers):
        worker.close()
        worker.bus.close()


@atexit.register
def _close_all() -> None:
    """Leave no thread inside torch when a script just ends."""
    _close(_alive)


def _tell_of_fork(parent: Worker, child: Worker) -> None:
    """Publish on both buses that the child has started, once its state is loaded."""
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

    child.bus.subscribe(on_event, after=0)
