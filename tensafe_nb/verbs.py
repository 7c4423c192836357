"""What can be queued: every verb checks what was given, submits an operation, and returns a handle at once."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from tensafe_nb.checks import checked
from tensafe_nb.config import MIN_TEMPERATURE, SamplingConfig
from tensafe_nb.data import read_prompts
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.futures import FutureHandle
from tensafe_nb.protocol.batch import BatchData
from tensafe_nb.protocol.codec import plain_metadata
from tensafe_nb.protocol.operations import (
    ComputeLogprobs,
    Forward,
    ForwardBackward,
    FreezeReference,
    LoadState,
    Operation,
    OptimStep,
    Sample,
    SaveState,
    VoidPrivacy,
)
from tensafe_nb.protocol.results import (
    ForwardBackwardResult,
    ForwardResult,
    FreezeReferenceResult,
    LoadStateResult,
    LogprobsResult,
    OptimStepResult,
    Prompt,
    SampleResult,
    SaveStateResult,
    VoidPrivacyResult,
)
from tensafe_nb.runs.loop import Batch

R = TypeVar("R")

LossSpec = str | Callable[..., Any]
MOST_SEQUENCES = 1 << 20  # of one call of sample()
MAX_NAME = 200  # characters of a checkpoint's name


class Verbs(ABC):
    """The verbs of a training client."""

    @abstractmethod
    def _submit(self, operation: Operation[R]) -> FutureHandle[R]:
        """Queue an operation."""

    @checked
    def forward_backward(
        self, batch: Batch, loss_fn: LossSpec | None = None, loss_kwargs: Mapping[str, Any] | None = None
    ) -> FutureHandle[ForwardBackwardResult]:
        """Compute the loss of a batch and add its gradient to what is accumulated.

        Args:
            batch: A BatchData, or a dict of `input_ids`, `attention_mask`, `labels` (B, T) and what the loss needs.
            loss_fn: A registered name, "package.module:attribute" or a callable; token cross entropy when None.
            loss_kwargs: Keywords of the loss.

        Raises:
            ValidationError: A batch or loss that does not fit.
        """
        return self._submit(ForwardBackward(BatchData.of(batch), loss_fn, dict(loss_kwargs or {})))

    @checked
    def forward(
        self,
        batch: Batch,
        loss_fn: LossSpec | None = None,
        loss_kwargs: Mapping[str, Any] | None = None,
        *,
        return_logprobs: bool = False,
    ) -> FutureHandle[ForwardResult]:
        """Compute the loss of a batch in evaluation mode, without gradients.

        Args:
            batch: As for `forward_backward`.
            loss_fn: As for `forward_backward`.
            loss_kwargs: Keywords of the loss.
            return_logprobs: Also return each label's log-probability, (B, T).
        """
        return self._submit(Forward(BatchData.of(batch), loss_fn, dict(loss_kwargs or {}), return_logprobs))

    def optim_step(self, apply_dp_noise: bool = True) -> FutureHandle[OptimStepResult]:
        """Apply the accumulated gradients with the optimiser.

        Args:
            apply_dp_noise: Without differential privacy it has no effect. With it, False is refused while there is a
                guarantee to lose; see `void_privacy`.

        Raises:
            ValidationError: Not a truth value. The handle of a private client's step fails with `PrivacyUnitError` for
                a draw that is not whole, and with `DPBudgetExceededError` instead of spending more than the budget.
        """
        if not isinstance(apply_dp_noise, bool):
            raise ValidationError(
                f"optim_step(apply_dp_noise=…) is True or False, not {as_given(apply_dp_noise)}."
            )
        return self._submit(OptimStep(apply_dp_noise))

    def sample(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingConfig | None = None,
        **fields: Any,
    ) -> FutureHandle[SampleResult]:
        """Draw completions.

        Args:
            prompts: A text, a list of chat messages or of token ids, or a list of any of these.
            sampling: How to draw.
            fields: Fields of SamplingConfig, instead of or on top of `sampling`.

        Raises:
            ValidationError: No prompt, or a field that does not fit.
        """
        if sampling is not None and not isinstance(sampling, SamplingConfig):
            raise ValidationError(
                f"sample() takes a SamplingConfig, or its fields as keywords, not {as_given(sampling)}."
            )
        config = SamplingConfig(**fields) if sampling is None else sampling.replace(**fields)
        read = read_prompts(prompts)
        if len(read) * config.num_samples > MOST_SEQUENCES:
            raise ValidationError(
                f"sample(): {len(read):,} prompts with num_samples={config.num_samples:,} are more than "
                f"{MOST_SEQUENCES:,} sequences: sample in parts."
            )
        return self._submit(Sample(read, config))

    @checked
    def compute_logprobs(
        self, batch: Batch, reference: bool = False, *, temperature: float = 1.0
    ) -> FutureHandle[LogprobsResult]:
        """Score a batch's labels: log-probabilities and exact entropies, (B, T).

        Args:
            batch: As for `forward_backward`.
            reference: Score under the reference's weights: those of `freeze_reference`, else the base without adapter.
            temperature: Divides the logits.
        """
        if not temperature >= MIN_TEMPERATURE:
            raise ValidationError(
                f"compute_logprobs: temperature={temperature} must be at least {MIN_TEMPERATURE}."
            )
        return self._submit(ComputeLogprobs(BatchData.of(batch), temperature, reference))

    def freeze_reference(self) -> FutureHandle[FreezeReferenceResult]:
        """Keep a copy of the trained weights: what `compute_logprobs(reference=True)` scores with from now on.

        A LoRA client that has not trained yet needs none: its reference is the base. The copy is part of checkpoints.
        """
        return self._submit(FreezeReference())

    @checked
    def save_state(
        self,
        include_optimizer: bool = True,
        metadata: Mapping[str, Any] | None = None,
        name: str | None = None,
        *,
        position: Mapping[str, Any] | None = None,
    ) -> FutureHandle[SaveStateResult]:
        """Seal everything that training needs to go on, as an artifact in the home folder.

        It holds exactly the operations submitted before it: weights, optimiser, gradients of an open step, random
        streams, step, configuration.

        Args:
            include_optimizer: False leaves out the optimiser's moments (two thirds of the size with adamw).
            metadata: Your own plain data, sealed with the state.
            name: A name for `load_state`; the newest artifact of a name counts.
            position: Where a run stands in its data; `run.checkpoint()` fills it in.

        Raises:
            ValidationError: Metadata that is not plain data, or a name that is no text.
        """
        if name is not None and (not isinstance(name, str) or not 0 < len(name) <= MAX_NAME):
            raise ValidationError(
                f"save_state: name={as_given(name)} must be a text of 1 to {MAX_NAME} characters."
            )
        metadata = plain_metadata(metadata or {})
        return self._submit(SaveState(bool(include_optimizer), metadata, name, position))

    def load_state(self, artifact_id: str, *, for_run: str | None = None) -> FutureHandle[LoadStateResult]:
        """Take the state of an artifact in place of this client's own; all of it, or on any failure nothing.

        Args:
            artifact_id: Its id, or its name.
            for_run: Refuse a state that was not saved by a run with a loop of this name.

        Raises:
            ValidationError: No id. The handle fails with `ArtifactNotFoundError`, `DecryptionError`, or, for an
                artifact of another model, adapter or optimiser, with a ValidationError that lists the differences.
        """
        if not isinstance(artifact_id, str) or not artifact_id:
            raise ValidationError(f"load_state takes an artifact's id or name, not {as_given(artifact_id)}.")
        return self._submit(LoadState(artifact_id, for_run))

    def void_privacy(self, reason: str) -> FutureHandle[VoidPrivacyResult]:
        """Give up this client's privacy guarantee, for good: epsilon is infinite from then on, and the budget ends.

        Args:
            reason: Why; it is on record, and the privacy statement shows it.

        Raises:
            ValidationError: No reason.
        """
        if not isinstance(reason, str) or not reason.strip():
            raise ValidationError("void_privacy(reason): say why; the privacy statement shows it.")
        return self._submit(VoidPrivacy(reason.strip()))
