"""The verbs of a training client, as plain data: one declaration for client, queue, executor, server and docs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar, get_args

import numpy as np

from tensafe_nb import config
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.batch import Array, BatchData
from tensafe_nb.protocol.codec import tagged
from tensafe_nb.protocol.results import (
    ForwardBackwardResult,
    ForwardResult,
    FreezeReferenceResult,
    LoadAdapterResult,
    LoadStateResult,
    LogprobsResult,
    OptimStepResult,
    Prompt,
    ReadAdapterResult,
    SampleResult,
    SaveStateResult,
    VoidPrivacyResult,
)

R = TypeVar("R")
Op = TypeVar("Op", bound="type[Operation[Any]]")
VERBS: "dict[str, type[Operation[Any]]]" = {}  # what a core can be asked for


class Operation(Generic[R]):
    """Base of all operations; R is the class of the result that a handle gives.

    Attributes:
        verb: Its name everywhere: the client's method, the record of the audit log, the tag it is written under.
        result: R, at run time.
        lasting: What it does is done for good, whether or not anybody waits for the result.
    """

    __slots__ = ()
    verb: ClassVar[str]
    result: ClassVar[type]
    lasting: ClassVar[bool]


def verb(name: str, *, lasting: bool = False) -> Callable[[Op], Op]:
    """Class decorator that declares an operation."""

    def declare(cls: Op) -> Op:
        (base,) = cls.__orig_bases__  # type: ignore[attr-defined]  # Operation[R]
        cls.verb, cls.result, cls.lasting = name, *get_args(base), lasting
        VERBS[name] = cls
        return tagged(name)(cls)

    return declare


@verb("forward_backward")
@dataclass(frozen=True, slots=True)
class ForwardBackward(Operation[ForwardBackwardResult]):
    """Compute the loss and add its gradient to what is accumulated."""

    batch: BatchData
    loss_fn: str | Callable[..., Any] | None = None
    loss_kwargs: Mapping[str, Any] = field(default_factory=dict)
    return_logprobs: bool = False


@verb("forward")
@dataclass(frozen=True, slots=True)
class Forward(Operation[ForwardResult]):
    """Compute the loss in evaluation mode, without gradients."""

    batch: BatchData
    loss_fn: str | Callable[..., Any] | None = None
    loss_kwargs: Mapping[str, Any] = field(default_factory=dict)
    return_logprobs: bool = False


@verb("optim_step")
@dataclass(frozen=True, slots=True)
class OptimStep(Operation[OptimStepResult]):
    """Apply what is accumulated."""

    apply_dp_noise: bool = True
    step: config.StepConfig = config.UNCHANGED


@verb("sample")
@dataclass(frozen=True, slots=True)
class Sample(Operation[SampleResult]):
    """Draw completions."""

    prompts: tuple[Prompt, ...]
    sampling: config.SamplingConfig
    stream: bool = False


@verb("compute_logprobs")
@dataclass(frozen=True, slots=True)
class ComputeLogprobs(Operation[LogprobsResult]):
    """Score the labels of a batch under the current or the reference weights."""

    batch: BatchData
    temperature: float = 1.0
    reference: bool = False


@verb("save_state", lasting=True)
@dataclass(frozen=True, slots=True)
class SaveState(Operation[SaveStateResult]):
    """Seal the client's state as an artifact; `position` says where a run stood in its data."""

    include_optimizer: bool = True
    metadata: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    position: Mapping[str, Any] | None = None


@verb("void_privacy", lasting=True)
@dataclass(frozen=True, slots=True)
class VoidPrivacy(Operation[VoidPrivacyResult]):
    """Give the privacy guarantee up, for good; the reason is on record."""

    reason: str


@verb("freeze_reference")
@dataclass(frozen=True, slots=True)
class FreezeReference(Operation[FreezeReferenceResult]):
    """Keep a copy of the trained weights: the reference that later scores are compared with."""


@verb("read_adapter")
@dataclass(frozen=True, slots=True)
class ReadAdapter(Operation[ReadAdapterResult]):
    """Return the adapter's tensors."""


@verb("load_adapter")
@dataclass(frozen=True, slots=True, eq=False)
class LoadAdapter(Operation[LoadAdapterResult]):
    """Take tensors of an adapter, by PEFT's names, in place of its own; those that are not named stay."""

    tensors: Mapping[str, Array]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", _tensors(self.tensors))


@verb("load_state")
@dataclass(frozen=True, slots=True)
class LoadState(Operation[LoadStateResult]):
    """Take the state of an artifact, given by its id or its name; `for_run` refuses one that no such run saved."""

    artifact_id: str
    for_run: str | None = None
    include_optimizer: bool = True


@tagged("sample_from")
@dataclass(frozen=True, slots=True)
class SampleFrom:
    """Draw completions without a training client: from a checkpoint's weights, or from a model as it is."""

    sample: Sample
    artifact_id: str | None = None
    model_ref: str | None = None

    def __post_init__(self) -> None:
        if (self.artifact_id is None) == (self.model_ref is None):
            raise ValidationError(
                "sample() takes artifact_id= (a checkpoint's id or name) or model_ref= (a model as it is): one of them."
            )


def _tensors(given: object) -> dict[str, Array]:
    """Return an adapter's tensors as float32 arrays of their own: the caller may reuse its buffers."""
    how = 'tc.read_adapter() returns such, and safetensors.numpy.load_file(folder / "adapter_model.safetensors").'
    if not isinstance(given, Mapping) or not given or not all(isinstance(name, str) for name in given):
        raise ValidationError(
            f"load_adapter takes an adapter's tensors by name, a dict of arrays, not {as_given(given)}. {how}"
        )
    tensors = {}
    for name, value in given.items():
        if hasattr(value, "detach"):  # of torch, which numpy reads on the CPU only, and not in bfloat16
            value = value.detach().cpu().float().numpy()
        try:
            array = np.array(value, dtype=np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValidationError(
                f"load_adapter: {as_given(name)} is no array of numbers, but {as_given(value)}. {how}"
            ) from error
        if not np.isfinite(array).all():
            raise ValidationError(
                f"load_adapter: {as_given(name)} has values that are NaN or infinite. Nothing was loaded."
            )
        tensors[name] = array
    return tensors
