"""What the core asks of an engine, be it one of this process or a group of them elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from tensafe_nb.config import SamplingConfig, StepConfig, TrainingConfig
from tensafe_nb.engine.accumulation import Tick, Window
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models import load as models
from tensafe_nb.engine.models.low_rank import Factors
from tensafe_nb.engine.private_step import Account
from tensafe_nb.engine.sampling import sampler
from tensafe_nb.engine.state import EngineState
from tensafe_nb.events import Event
from tensafe_nb.losses import Loss
from tensafe_nb.protocol.batch import Array, BatchData
from tensafe_nb.protocol.results import (
    ForwardBackwardResult,
    ForwardResult,
    FreezeReferenceResult,
    LoadAdapterResult,
    LogprobsResult,
    OptimStepResult,
    Prompt,
    ReadAdapterResult,
    SampleResult,
    StepEstimate,
)
from tensafe_nb.store.home import Home


class Trains(Protocol):
    """The verbs, and the state that a checkpoint keeps; `Engine` says what each does."""

    samples_drawn: int

    @property
    def config(self) -> TrainingConfig: ...
    @property
    def step(self) -> int: ...
    @property
    def policy_version(self) -> int: ...
    @property
    def window(self) -> Window: ...
    @property
    def resumable(self) -> bool: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def holder(self) -> object: ...
    @property
    def about(self) -> dict[str, Any]: ...
    @property
    def fingerprint(self) -> str: ...

    def train_privately(self, account: Account, client_id: str) -> None: ...
    def forward_backward(
        self, batch: BatchData, loss: Loss, tick: Tick, return_logprobs: bool
    ) -> ForwardBackwardResult: ...
    def optim_step(self, apply_dp_noise: bool, step: StepConfig) -> OptimStepResult: ...
    def discard_gradients(self) -> None: ...
    def forward(self, batch: BatchData, loss: Loss, return_logprobs: bool, tick: Tick) -> ForwardResult: ...
    def compute_logprobs(
        self, batch: BatchData, temperature: float, reference: bool, tick: Tick
    ) -> LogprobsResult: ...
    def freeze_reference(self) -> FreezeReferenceResult: ...
    def sample(
        self, prompts: Sequence[Prompt], config: SamplingConfig, tick: Tick, tell: sampler.Tell | None
    ) -> SampleResult: ...
    def kind_of(self, config: SamplingConfig, prompts: int) -> str | None: ...
    def together(self, kind: str) -> sampler.Together: ...
    def call(
        self, prompts: Sequence[Prompt], config: SamplingConfig, tick: Tick, tell: sampler.Tell | None
    ) -> sampler.SampleCall: ...
    def read_adapter(self) -> ReadAdapterResult: ...
    def load_adapter(
        self, tensors: Mapping[str, Array], take_over: Callable[[], None]
    ) -> LoadAdapterResult: ...
    def factors(self, layers: Sequence[int], modules: Sequence[str] | None) -> Factors: ...
    def capture(self, include_optimizer: bool) -> EngineState: ...
    def restore(self, state: EngineState, *, keep_moments: bool = True) -> None: ...
    def streams(self) -> dict[str, Any]: ...
    def restore_streams(self, facts: Mapping[str, Any]) -> None: ...
    def estimate(self, batch_size: int | None, length: int | None) -> StepEstimate: ...
    def close(self) -> None: ...


Tell: TypeAlias = Callable[[Event], None]


@runtime_checkable
class MakesEngines(Protocol):
    """Makes the engine of a training client."""

    def check(self, config: TrainingConfig) -> None:
        """Refuse, in the caller's cell, what such an engine cannot train.

        Raises:
            ValidationError: Says what that is, and what to do.
        """

    def make(
        self,
        config: TrainingConfig,
        home: Home,
        relative: Trains | None,
        tell: Tell,
        tick: Tick,
        *,
        served: bool,
    ) -> Trains:
        """Load the model and return what trains it; on the worker's thread.

        Args:
            config: What to load and how to train it.
            home: Where a converted model is kept.
            relative: The engine of the client it is forked from, whose frozen weights it may share.
            tell: Called with what is to be known of the engine itself, not of an operation.
            tick: Called now and then where that takes long; raises once nobody waits for it any more.
            served: Nobody but the core reads its tokenizer.
        """

    def close(self) -> None:
        """Let go of what engines were made from; idempotent."""


class InThisProcess:
    """An engine beside the core."""

    def check(self, config: TrainingConfig) -> None:
        """It trains whatever there is."""

    def make(
        self,
        config: TrainingConfig,
        home: Home,
        relative: Trains | None,
        tell: Tell,
        tick: Tick,
        *,
        served: bool,
    ) -> Engine:
        shared = models.share(relative.model) if isinstance(relative, Engine) else None
        return Engine(config, shared or models.load(config, home, served=served))

    def close(self) -> None:
        """There is nothing but the engines themselves."""
