"""What a client needs of its core, whatever lies between them."""

from typing import Any, Protocol

from tensafe_nb.config import TrainingConfig
from tensafe_nb.events import EventBus
from tensafe_nb.futures import FutureHandle, Promise
from tensafe_nb.types import Operation, TrainingClientInfo


class Channel(Protocol):
    """The line to one training client's core."""

    training_client_id: str
    config: TrainingConfig
    bus: EventBus
    step: int
    policy_version: int
    loaded: Promise[Any]

    def submit(self, operation: Operation) -> FutureHandle[Any]:
        """Queue an operation; returns at once."""

    def info(self) -> TrainingClientInfo:
        """Return the core's present state."""

    def close(self) -> None:
        """Cancel what waits, end the core, release what it holds; idempotent."""


class Transport(Protocol):
    """A service that holds training clients."""

    def create(self, config: TrainingConfig) -> Channel:
        """Make a training client; returns before its model is loaded."""

    def channels(self) -> list[Channel]:
        """Return the training clients that are not closed, oldest first."""

    def close(self) -> None:
        """Close all of them."""
