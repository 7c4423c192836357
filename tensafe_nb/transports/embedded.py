"""The core in the same process: each training client is a Worker with a thread of its own."""

import atexit
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from tensafe_nb.config import TrainingConfig
from tensafe_nb.engine import adapter_folders, checkpoints, export
from tensafe_nb.engine.ledger_binding import TenantLedger
from tensafe_nb.engine.worker import Origin, Worker
from tensafe_nb.errors import DecryptionError, TGTinkerError
from tensafe_nb.events import ArtifactDeleted, ClientCreated, Event, EventBus, Forked, StateLoaded
from tensafe_nb.losses import resolve_loss
from tensafe_nb.plain import to_plain
from tensafe_nb.store import home
from tensafe_nb.store.vault import Vault
from tensafe_nb.transports.base import Channel
from tensafe_nb.types import AuditLogEntry, AuditVerification, SaveStateResult


class EmbeddedTransport:
    """Training clients of this process, and the artifacts of this home folder.

    Args:
        key_source: "file", "env" or "passphrase": where the key of the artifacts comes from.
    """

    def __init__(self, key_source: str | None = None) -> None:
        self._workers: dict[str, Worker] = {}
        self._vault = Vault(key_source)
        self._ledger = TenantLedger(self._vault.audit, self._vault.tables)
        atexit.register(self.close)  # a script that just ends leaves no thread inside torch

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
        loss = resolve_loss(config.loss.type, **config.loss.kwargs)
        config = config.replace(lora_config=adapter_folders.announced(config.model_ref, config.lora_config))
        training_client_id = f"tc-{uuid.uuid4().hex[:12]}"
        created = ClientCreated(training_client_id=training_client_id, config=to_plain(config))
        bus = EventBus(home.event_log(training_client_id))
        try:
            self._vault.keys.primary_id()  # one that cannot be had is an error of the call, not of the first operation
        except TGTinkerError:
            bus.close()
            raise
        bus.publish(created)
        worker = Worker(training_client_id, config, bus, loss, self._vault, self._ledger, origin)
        self._workers[training_client_id] = worker
        return worker

    def channels(self) -> list[Channel]:
        return [worker for worker in self._workers.values() if worker.info().status != "TERMINATED"]

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
        if owner in self._workers:
            self._workers[owner].bus.publish(ArtifactDeleted(artifact_id=found))

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
        for worker in self._workers.values():
            worker.close()
            worker.bus.close()
        self._workers.clear()
        atexit.unregister(self.close)


def _tell_of_fork(parent: Worker, child: Worker) -> None:
    """Publish on both buses that the child has started, once its state is loaded."""

    def on_event(event: Event) -> None:
        if isinstance(event, StateLoaded) and not told:
            told.append(event)
            forked = Forked(
                parent=parent.training_client_id,
                artifact_id=event.artifact_id,
                child=child.training_client_id,
                step=event.step,
            )
            child.bus.publish(forked)
            parent.bus.publish(forked)

    told: list[StateLoaded] = []
    child.bus.subscribe(on_event, after=0)
