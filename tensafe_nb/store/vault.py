"""The vault of one tenant: its keys, artifacts and audit log behind one door, which puts every change on record."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tensafe_nb.protocol.results import AuditLogEntry, AuditVerification, SaveStateResult
from tensafe_nb.store.artifacts.artifacts import ArtifactStore
from tensafe_nb.store.audit.log import AuditLog, outcome_of
from tensafe_nb.store.home import Home
from tensafe_nb.store.keys.keyring import Keys
from tensafe_nb.store.sealed.log import key_of
from tensafe_nb.store.sealed.tables import SealedTables


class Vault:
    """The store of one tenant in a home folder.

    Args:
        home: Which folder, and whose share of it.
        key_source: "file", "env" or "passphrase"; None takes TENSAFE_KEK where it is set, else the local key file.
    """

    def __init__(self, home: Home, key_source: str | None = None) -> None:
        self.home, tenant = home, home.tenant
        self.keys = Keys(home.keys(), key_source, tenant=tenant)
        self.artifacts = ArtifactStore(home.artifacts(), self.keys, tenant)
        self.audit = AuditLog(home.audit(), self.keys, tenant)
        self.tables = SealedTables(home.ledger(), self.keys, tenant)

    def list(self, training_client_id: str | None = None) -> list[SaveStateResult]:
        """Return the artifacts, newest first; of one training client when it is given."""
        stored = self.artifacts.list()
        return [found for found in stored if training_client_id in (None, found.saved_by)]

    def pull(self, artifact_id: str, to: Path | None = None) -> bytes | Path:
        """Return the sealed file, or copy it to a path."""
        with self._on_record("pull_artifact") as touched:
            found = self.artifacts.resolve(artifact_id)
            touched.consumed.append(found)
            return self.artifacts.pull(found) if to is None else self.artifacts.pull_to(found, to)

    def push(self, path: Path) -> SaveStateResult:
        """Take in a sealed file."""
        with self._on_record("push_artifact") as touched:
            pushed = self.artifacts.push(path)
            touched.produced.append(pushed.artifact_id)
            return pushed

    def delete(self, artifact_id: str) -> None:
        """Delete an artifact for good."""
        with self._on_record("delete_artifact") as touched:
            found = self.artifacts.resolve(artifact_id)
            touched.consumed.append(found)
            self.artifacts.delete(found)

    def rotate(self, *, instead_of: str | None = None) -> int:
        """Wrap every artifact's own key with a new key, and retire the old one.

        A key file gets a new key; from the environment or a passphrase comes the one that is set now. Automatic
        checkpoints of a server are rewrapped, too; each journal beside them begins anew under the new key when its
        training client makes the next one, and opens with the old key until then.

        Args:
            instead_of: The key that a rotation was to replace which was cut off: what it has done is not done again.

        Returns:
            How many artifacts were rewrapped.
        """
        with self._on_record("rotate_keys", kind="key"):
            old = instead_of or self.keys.primary_id()
            if self.keys.source == "file" and self.keys.primary_id() == old:
                self.keys.new()
            count = self.artifacts.rotate()
            for _, states in self._journals():
                states.rotate()
            self.audit.rewrap()
            self.tables.rewrap()
            if self.keys.source == "file":
                self.keys.retire(old)
            return count

    def needing(self, key_id: str) -> Sequence[str]:
        """Return what a key is needed for: ids of artifacts, and journals, as folders below that of the runs."""
        journals = [
            f"{folder.parent.name}/{folder.name}"
            for folder, states in self._journals()
            if key_id in map(key_of, folder.glob("*.tsnj")) or states.needing(key_id)
        ]
        return [*self.artifacts.needing(key_id), *journals]

    def forget(self, key_id: str) -> None:
        """Erase a key from the key file, for good.

        Raises:
            ValidationError: Something needs it, it is the primary key, or there is none of this id.
        """
        with self._on_record("forget_key", kind="key"):
            self.audit.rewrap()
            self.tables.rewrap()
            self.keys.forget(key_id, self.needing)

    def _journals(self) -> Iterator[tuple[Path, ArtifactStore]]:
        for folder in self.home.sealed_beside_runs():
            yield folder, ArtifactStore(folder / "states", self.keys, self.home.tenant)

    def logs(
        self, training_client_id: str | None, operation: str | None, limit: int, offset: int
    ) -> Sequence[AuditLogEntry]:
        """Return records of the audit log, newest first."""
        return self.audit.entries(training_client_id, operation, limit, offset)

    def verify(self, anchors: Sequence[str]) -> AuditVerification:
        """Verify the audit log."""
        return self.audit.verify(anchors)

    @contextmanager
    def exported(self, artifact_id: str) -> Iterator[None]:
        """Put an export on record."""
        with self._on_record("export_adapter") as touched:
            touched.consumed.append(self.artifacts.resolve(artifact_id))
            yield

    @contextmanager
    def _on_record(self, operation: str, kind: str = "artifact") -> "Iterator[Touched]":
        touched, started = Touched(), time.time()
        error: BaseException | None = None
        try:
            yield touched
        except BaseException as raised:  # an interrupt and a full disk are failures too
            error = raised
            raise
        finally:
            self.audit.append(
                kind=kind,
                operation=operation,
                produced=tuple(touched.produced),
                consumed=tuple(touched.consumed),
                started_at=started,
                completed_at=time.time(),
                **outcome_of(error),
            )


class Touched:
    """The artifacts that an operation made and used, for its record."""

    def __init__(self) -> None:
        self.produced: list[str] = []
        self.consumed: list[str] = []
