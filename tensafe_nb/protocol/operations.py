"""The operations of the queue, as plain data: what a client submits, and what a server would be sent."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from tensafe_nb import config
from tensafe_nb.protocol.batch import BatchData
from tensafe_nb.protocol.codec import plain
from tensafe_nb.protocol.results import Prompt


@plain
@dataclass(frozen=True, slots=True)
class ForwardBackward:
    """Compute the loss and add its gradient to what is accumulated."""

    batch: BatchData
    loss_fn: str | Callable[..., Any] | None = None
    loss_kwargs: Mapping[str, Any] = field(default_factory=dict)


@plain
@dataclass(frozen=True, slots=True)
class Forward:
    """Compute the loss in evaluation mode, without gradients."""

    batch: BatchData
    loss_fn: str | Callable[..., Any] | None = None
    loss_kwargs: Mapping[str, Any] = field(default_factory=dict)
    return_logprobs: bool = False


@plain
@dataclass(frozen=True, slots=True)
class OptimStep:
    """Apply what is accumulated."""

    apply_dp_noise: bool = True


@plain
@dataclass(frozen=True, slots=True)
class Sample:
    """Draw completions."""

    prompts: tuple[Prompt, ...]
    sampling: config.SamplingConfig


@plain
@dataclass(frozen=True, slots=True)
class ComputeLogprobs:
    """Score the labels of a batch under the current or the reference weights."""

    batch: BatchData
    temperature: float = 1.0
    reference: bool = False


@plain
@dataclass(frozen=True, slots=True)
class SaveState:
    """Seal the client's state as an artifact; `position` says where a run stood in its data."""

    include_optimizer: bool = True
    metadata: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    position: Mapping[str, Any] | None = None


@plain
@dataclass(frozen=True, slots=True)
class VoidPrivacy:
    """Give the privacy guarantee up, for good; the reason is on record."""

    reason: str


@plain
@dataclass(frozen=True, slots=True)
class FreezeReference:
    """Keep a copy of the trained weights: the reference that later scores are compared with."""


@plain
@dataclass(frozen=True, slots=True)
class LoadState:
    """Take the state of an artifact, given by its id or its name; `for_run` refuses one that no such run saved."""

    artifact_id: str
    for_run: str | None = None


Operation: TypeAlias = (
    ForwardBackward
    | Forward
    | OptimStep
    | Sample
    | ComputeLogprobs
    | FreezeReference
    | SaveState
    | LoadState
    | VoidPrivacy
)
