"""The line between a client and its core: what both its ends keep to, in this process or across a network.

Operations, events and records go along it as plain data, handles come back. No bus, no promise, no object of the core
crosses, and what waits for a state names it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tensafe_nb.config import TrainingConfig
from tensafe_nb.events import Event
from tensafe_nb.futures import FutureHandle
from tensafe_nb.history.log import RunHistory
from tensafe_nb.privacy.audit_canary import PrivacyAudit
from tensafe_nb.privacy.ledger.statement import PrivacyStatement
from tensafe_nb.protocol.encrypted import EncryptedConnection, EncryptedOffer
from tensafe_nb.protocol.operations import Operation, SampleFrom
from tensafe_nb.protocol.results import (
    AuditLogEntry,
    AuditVerification,
    SampleResult,
    SaveStateResult,
    StateSource,
    StepEstimate,
    TrainingClientInfo,
)

R = TypeVar("R")


class EncryptedLine(Protocol):
    """The line on which a core applies a training client's adapter to ciphertexts; its methods wait for the answer.

    Attributes:
        keys: The key store that both ends have; None where they are two machines.
        is_demonstration: Whether both ends are one process, so that nothing is hidden.
        most_bytes: Of one message.
    """

    @property
    def keys(self) -> Any: ...
    @property
    def is_demonstration(self) -> bool: ...
    @property
    def most_bytes(self) -> int: ...

    def offer(self, layers: Sequence[int], modules: Sequence[str] | None) -> EncryptedOffer:
        """Say what could be applied."""

    def open(
        self,
        layers: Sequence[int],
        modules: Sequence[str] | None,
        shape: tuple[int, int, int],
        params: str,
        tokens: int | str,
        bundle: bytes,
    ) -> EncryptedConnection:
        """Open a connection for the adapters of one shape, with a client's bundle."""

    def apply(self, connection_id: str, request: bytes) -> bytes:
        """Return the reply to a request."""

    def refresh(self, connection_id: str) -> EncryptedConnection:
        """Serve the weights as they are now, under the same keys."""

    def close(self, connection_id: str) -> None:
        """Drop a connection's keys at the other end; idempotent."""


class Channel(Protocol):
    """The line to one training client."""

    @property
    def training_client_id(self) -> str:
        """Names it."""

    @property
    def config(self) -> TrainingConfig:
        """What it is made of; a model folder with an adapter brings its own configuration once it is loaded."""

    @property
    def history(self) -> RunHistory:
        """Its events and curves, read from the log in this home folder; see `subscribe` for what comes."""

    def submit(self, operation: Operation[R], future_id: str | None = None) -> FutureHandle[R]:
        """Queue an operation, under an id of the submitter's own or one that is made here; returns at once."""

    def cancel(self, handles: Sequence[FutureHandle[Any]]) -> int:
        """Cancel several, in the order given; return how many were cancelled before they completed."""

    def ready(self) -> FutureHandle[TrainingClientInfo]:
        """Return a handle that ends when the model is loaded, or could not be."""

    def info(self) -> TrainingClientInfo:
        """Return how the training client stands: everything that a property of the client tells."""

    def refresh(self) -> TrainingClientInfo:
        """Return the same, asked for anew where it is known from what was told."""

    def tokenizer(self) -> Any:
        """Return the model's tokenizer, which batches are made with; waits until the model is loaded."""

    def subscribe(self, subscriber: Callable[[Event], None], after: int | None = None) -> Callable[[], None]:
        """Call `subscriber(event)` on every event: recorded ones above number `after` first, then live ones.

        Returns:
            A function that ends the subscription.
        """

    def publish(self, event: Event) -> Event:
        """Have the core number and record what a run or a producer of rollouts tells: see `events.check_reported`."""

    def sync(self) -> None:
        """Return when everything recorded so far is on the disk."""

    def enter_draw(self, unit: str) -> tuple[int, bytes]:
        """Number a Poisson draw that is about to be made, of examples or users; with the key of its ticket's hashes."""

    def estimate(self, batch_size: int | None, length: int | None) -> StepEstimate:
        """Return what a training step will take; waits for the operation that runs, and takes no place in the queue."""

    def privacy_statement(self) -> PrivacyStatement:
        """Return what may be said about the privacy of what is trained."""

    def privacy_audit(self, canaries: int, steps: int) -> PrivacyAudit:
        """Train on canaries, as privately as this client trains, and measure what they leave behind."""

    @property
    def encrypted(self) -> EncryptedLine:
        """The line for encrypted calls."""

    def close(self) -> None:
        """Terminate the training client: cancel what waits, end its core; what runs tell of their end still counts.

        Idempotent.
        """

    def leave(self) -> None:
        """End this end of the line on purpose: a core in this process ends with it, a server's lives on."""

    def hang_up(self) -> None:
        """Write out the log; nothing is recorded after this. Called behind `close()`, once the runs have ended."""

    def detach(self) -> None:
        """Leave: the client at this end was freed. Never waits, takes no lock.

        The core ends with its last client, as soon as nobody waits for anything any more.
        """


class Transport(Protocol):
    """A service that holds training clients and their artifacts."""

    def create(self, config: TrainingConfig, source: StateSource | None = None) -> Channel:
        """Make a training client, afresh or from a state; returns before its model is loaded."""

    def attach(self, training_client_id: str) -> Channel:
        """Return a line to a training client that exists; several clients may share one.

        Raises:
            TrainingClientNotFoundError: There is none of that id.
        """

    def list_training_clients(self) -> list[TrainingClientInfo]:
        """Return the training clients that are not closed, oldest first."""

    def sample(self, request: SampleFrom) -> FutureHandle[SampleResult]:
        """Draw completions from stored weights, or from a model as it is; returns at once.

        Raises:
            ArtifactNotFoundError: There is no such artifact.
        """

    def list_artifacts(self, training_client_id: str | None) -> list[SaveStateResult]:
        """Return the stored artifacts, newest first."""

    def get_artifact(self, artifact_id: str) -> SaveStateResult:
        """Return one, by id or name."""

    def config_of(self, artifact_id: str) -> TrainingConfig:
        """Return the configuration of the client that saved it."""

    def pull_artifact(self, artifact_id: str, to: Path | None) -> bytes | Path:
        """Return the sealed file, or write it to a path at this end."""

    def push_artifact(self, path: Path) -> SaveStateResult:
        """Take in a sealed file of this end."""

    def delete_artifact(self, artifact_id: str) -> None:
        """Delete one for good."""

    def export_adapter(self, artifact_id: str, path: Path, merged: bool) -> Path:
        """Write one as a folder, at this end, that PEFT and transformers read."""

    def rotate_keys(self) -> int:
        """Make a new key and rewrap every artifact with it."""

    def audit_logs(
        self, training_client_id: str | None, operation: str | None, limit: int, offset: int
    ) -> Sequence[AuditLogEntry]:
        """Return records of the audit log, newest first."""

    def verify_audit_log(self, anchors: Sequence[str]) -> AuditVerification:
        """Verify the audit log."""

    def close(self) -> None:
        """Let go of all training clients, and take no new ones."""
