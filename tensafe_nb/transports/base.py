"""What a client needs of its core, whatever lies between them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tensafe_nb.config import TrainingConfig
from tensafe_nb.core.bus import EventBus
from tensafe_nb.futures import FutureHandle, Promise
from tensafe_nb.privacy.audit_canary import PrivacyAudit
from tensafe_nb.privacy.ledger.statement import PrivacyStatement
from tensafe_nb.protocol.operations import Operation
from tensafe_nb.protocol.results import (
    AuditLogEntry,
    AuditVerification,
    SaveStateResult,
    StepEstimate,
    TrainingClientInfo,
)

R = TypeVar("R")


class Channel(Protocol):
    """The line to one training client's core."""

    training_client_id: str
    config: TrainingConfig
    bus: EventBus
    loaded: Promise[Any]
    starts_afresh: bool  # or from a stored state, which says its step

    @property
    def step(self) -> int:
        """Optimiser steps taken."""

    @property
    def policy_version(self) -> int:
        """Version of the weights."""

    @property
    def trained_parameters(self) -> int:
        """How many numbers are trained; 0 before the model is loaded."""

    @property
    def context(self) -> int | None:
        """How many tokens the model reads at most; None without a limit, or before it is loaded."""

    def submit(self, operation: Operation[R]) -> FutureHandle[R]:
        """Queue an operation; returns at once."""

    def info(self) -> TrainingClientInfo:
        """Return the core's present state."""

    def enter_draw(self, unit: str) -> tuple[int, bytes]:
        """Number a Poisson draw that is about to be made, of examples or users; with the key of its ticket's hashes."""

    def estimate(self, batch_size: int | None, length: int | None) -> StepEstimate:
        """Return what a training step will take; waits for the operation that runs, and takes no place in the queue."""

    def privacy_statement(self) -> PrivacyStatement:
        """Return what may be said about the privacy of what is trained."""

    def privacy_audit(self, canaries: int, steps: int) -> PrivacyAudit:
        """Train on canaries, as privately as this client trains, and measure what they leave behind."""

    def close(self) -> None:
        """Cancel what waits, end the core, release what it holds; idempotent."""

    def abandon(self) -> None:
        """End as soon as nobody waits for anything any more; called when the client is freed, so it never waits."""


class Transport(Protocol):
    """A service that holds training clients and their artifacts."""

    def create(self, config: TrainingConfig) -> Channel:
        """Make a training client; returns before its model is loaded."""

    def restore(
        self, config: TrainingConfig, artifact_id: Callable[[], str], relative: Channel | None = None
    ) -> Channel:
        """Make a training client that starts from a stored state, sharing a relative's base weights."""

    def channels(self) -> list[Channel]:
        """Return the training clients that are not closed, oldest first."""

    def list_artifacts(self, training_client_id: str | None) -> list[SaveStateResult]:
        """Return the stored artifacts, newest first."""

    def get_artifact(self, artifact_id: str) -> SaveStateResult:
        """Return one, by id or name."""

    def config_of(self, artifact_id: str) -> TrainingConfig:
        """Return the configuration of the client that saved it."""

    def pull_artifact(self, artifact_id: str, to: Path | None) -> bytes | Path:
        """Return the sealed file, or write it to a path."""

    def push_artifact(self, path: Path) -> SaveStateResult:
        """Take in a sealed file."""

    def delete_artifact(self, artifact_id: str) -> None:
        """Delete one for good."""

    def export_adapter(self, artifact_id: str, path: Path, merged: bool) -> Path:
        """Write one as a folder that PEFT and transformers read."""

    def rotate_keys(self) -> int:
        """Make a new key and rewrap every artifact with it."""

    def audit_logs(
        self, training_client_id: str | None, operation: str | None, limit: int, offset: int
    ) -> Sequence[AuditLogEntry]:
        """Return records of the audit log, newest first."""

    def verify_audit_log(self, anchors: Sequence[str]) -> AuditVerification:
        """Verify the audit log."""

    def close(self) -> None:
        """Close all training clients."""
