"""The policy as reinforcement learning sees it: the verbs of a training client that it calls, and no more."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tensafe_nb.config import SamplingConfig, TrainingConfig
from tensafe_nb.events import Event
from tensafe_nb.futures import FutureHandle
from tensafe_nb.protocol.batch import BatchData
from tensafe_nb.protocol.results import (
    ForwardBackwardResult,
    FreezeReferenceResult,
    LogprobsResult,
    OptimStepResult,
    Prompt,
    SampleResult,
)

PRIVATE = "differential_privacy"  # among the capabilities of a client that trains privately


class PolicyClient(Protocol):
    """What reinforcement learning needs of a training client: the wire contract, embedded or remote."""

    @property
    def training_client_id(self) -> str: ...
    @property
    def config(self) -> TrainingConfig: ...
    @property
    def step(self) -> int: ...
    @property
    def policy_version(self) -> int: ...
    @property
    def capabilities(self) -> frozenset[str]: ...
    @property
    def tokenizer(self) -> Any: ...

    def sample(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> FutureHandle[SampleResult]: ...
    def forward_backward(
        self, batch: BatchData, loss_fn: str, loss_kwargs: Mapping[str, Any]
    ) -> FutureHandle[ForwardBackwardResult]: ...
    def compute_logprobs(
        self, batch: BatchData, reference: bool = False, *, temperature: float = 1.0
    ) -> FutureHandle[LogprobsResult]: ...
    def freeze_reference(self) -> FutureHandle[FreezeReferenceResult]: ...
    def optim_step(self) -> FutureHandle[OptimStepResult]: ...
    def publish(self, event: Event) -> Any: ...
