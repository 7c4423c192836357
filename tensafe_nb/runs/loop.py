"""Protocols of a run: the loop that it drives, and what both need of a training client."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tensafe_nb.config import TrainingConfig
from tensafe_nb.events import Event
from tensafe_nb.futures import FutureHandle
from tensafe_nb.history.log import RunHistory
from tensafe_nb.history.sinks.forwarding import Forwarding
from tensafe_nb.protocol.batch import BatchData
from tensafe_nb.protocol.results import LoadStateResult, SaveStateResult

Batch = BatchData | Mapping[str, Any]
LossSpec = str | Callable[..., Any]
R = TypeVar("R")


class RunClient(Protocol):
    """What a run needs of a training client."""

    @property
    def training_client_id(self) -> str: ...
    @property
    def config(self) -> TrainingConfig: ...
    @property
    def step(self) -> int: ...
    @property
    def history(self) -> RunHistory: ...
    def publish(self, event: Event) -> Event: ...
    def log_to(
        self, sink: Any, where: str | Path | None, *, samples: int, only: str | None, **options: Any
    ) -> Forwarding: ...
    def subscribe(self, subscriber: Callable[[Event], None]) -> Callable[[], None]: ...
    def sync_events(self) -> None: ...
    def wait_for_step(self, timeout: float) -> bool:
        """Wait so many seconds until `step` is known, which a restored client reads from its state."""

    def forward_backward(
        self, batch: Batch, loss_fn: LossSpec | None = None, loss_kwargs: Mapping[str, Any] | None = None
    ) -> FutureHandle[Any]: ...
    def forward(
        self, batch: Batch, loss_fn: LossSpec | None = None, loss_kwargs: Mapping[str, Any] | None = None
    ) -> FutureHandle[Any]: ...
    def optim_step(self) -> FutureHandle[Any]: ...
    def save_state(
        self, *, metadata: Mapping[str, Any], position: Mapping[str, Any]
    ) -> FutureHandle[SaveStateResult]: ...
    def load_state(self, artifact_id: str, *, for_run: str | None) -> FutureHandle[LoadStateResult]: ...
    def fork(self, artifact_id: str | None, **changes: Any) -> Any: ...
    def delete_checkpoint(self, artifact_id: str) -> None: ...


class Run(Protocol):
    """What a loop needs of the run that drives it."""

    run_id: str

    @property
    def client(self) -> RunClient:
        """The training client it trains."""

    @property
    def steps_taken(self) -> int:
        """Optimiser steps it has taken."""

    def wait(self, handle: FutureHandle[R]) -> R:
        """Wait for a result within a step; `stop()` cancels what is waited for."""

    def pause(self) -> None:
        """Submit no further step."""

    def remark(self, text: str) -> None:
        """Say in the run's result why it did not go as planned; once for the same words."""


class Loop(Protocol):
    """What a run repeats; every method is called on the run's own thread."""

    lookahead: int  # steps that may be under way before the oldest is collected
    curve: str  # the metric that tells how it goes

    def attach(self, run: Run) -> None:
        """Get to know the run: its id for metrics, and its `wait` for results needed within a step."""

    def submit(self, index: int) -> Sequence[FutureHandle[Any]] | None:
        """Queue step `index` and return the handles to wait for; None when there is nothing left."""

    def collect(self, index: int, results: Sequence[Any]) -> None:
        """Take the results of step `index`."""

    def position(self) -> Mapping[str, Any]:
        """Return, as plain data, where the loop stands in its data, behind what it has submitted."""

    def seek(self, position: Mapping[str, Any]) -> None:
        """Go to such a place, forwards or back."""

    def interrupt(self) -> None:
        """Give up what a step waits for outside the queue; called by `stop()`, on any thread."""

    def close(self) -> None:
        """Release what it holds; called once, when the run ends."""
