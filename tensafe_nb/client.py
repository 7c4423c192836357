"""What a notebook holds: a TrainingClient, whose every verb queues an operation and returns a handle."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensafe_nb.batch import BatchData
from tensafe_nb.config import MIN_TEMPERATURE, SamplingConfig, TrainingConfig
from tensafe_nb.data import Batches, Row, batches, read_prompts
from tensafe_nb.errors import ClientClosedError, ValidationError
from tensafe_nb.events import Event, RunHistory
from tensafe_nb.futures import FutureHandle, Outstanding
from tensafe_nb.loops import Batch, Loop
from tensafe_nb.plain import plain_metadata
from tensafe_nb.registry import load_dotted
from tensafe_nb.retention import Checkpoints
from tensafe_nb.runs import TrainingRun
from tensafe_nb.streaming import stream
from tensafe_nb.supervised import SupervisedLoop
from tensafe_nb.transports.base import VERBS, Channel, Transport
from tensafe_nb.types import (
    ClientStatus,
    ComputeLogprobs,
    Forward,
    ForwardBackward,
    ForwardBackwardResult,
    ForwardResult,
    FreezeReference,
    FreezeReferenceResult,
    LoadState,
    LoadStateResult,
    LogprobsResult,
    Operation,
    OptimStep,
    OptimStepResult,
    Prompt,
    Sample,
    SampleResult,
    SaveState,
    SaveStateResult,
    TrainingClientInfo,
)

LossSpec = str | Callable[..., Any]
MAX_NAME = 200  # characters of a checkpoint's name
JOIN_SECONDS = 5.0  # how long close() waits for a run that is inside the user's own code
Fork = Callable[[Channel, TrainingConfig, Callable[[], str]], "TrainingClient"]


class TrainingClient:
    """One model in training. Every verb queues an operation and returns a FutureHandle at once.

    Operations run in the order they were submitted. Made by `ServiceClient.create_training_client`.

    Example:
        >>> loss = tc.forward_backward(batch)
        >>> step = tc.optim_step()          # queued behind it: no need to wait in between
        >>> print((await loss).loss, (await step).step)
    """

    marks: tuple[str, ...] = ()
    steerable = True

    def __init__(self, channel: Channel, fork: Fork, transport: Transport) -> None:
        self._channel, self._fork, self._transport = channel, fork, transport
        self._runs: list[TrainingRun] = []
        self._outstanding = Outstanding()

    # verbs

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
            apply_dp_noise: Has no effect on a client without differential privacy.
        """
        if not isinstance(apply_dp_noise, bool):
            raise ValidationError(f"optim_step(apply_dp_noise=…) is True or False, not {apply_dp_noise!r}.")
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
                f"sample() takes a SamplingConfig, or its fields as keywords, not {sampling!r}."
            )
        config = SamplingConfig(**fields) if sampling is None else sampling.replace(**fields)
        return self._submit(Sample(read_prompts(prompts), config))

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
            raise ValidationError(f"save_state: name={name!r} must be a text of 1 to {MAX_NAME} characters.")
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
            raise ValidationError(f"load_state takes an artifact's id or name, not {artifact_id!r}.")
        return self._submit(LoadState(artifact_id, for_run))

    def fork(self, artifact_id: str | None = None, **changes: Any) -> "TrainingClient":
        """Return a new training client that starts from a state of this one, sharing its frozen weights.

        Args:
            artifact_id: The state; None saves and takes it as it is now.
            changes: Fields of TrainingConfig that are to be different; of `optimizer` and `loss` only those that
                differ: `optimizer={"learning_rate": 1e-3}`.

        Raises:
            ValidationError: A field that does not fit, or that the state would not fit.
        """
        for field in ("model_ref", "lora_config"):
            if field in changes:
                raise ValidationError(
                    f"fork: {field} cannot change: the state would not fit. Create a new client for it."
                )
        config = self.config.change(**changes)
        if artifact_id is not None:
            return self._fork(self._channel, config, lambda: artifact_id)
        saved = self.save_state(metadata={"reason": "fork"})
        return self._fork(self._channel, config, lambda: saved.result().artifact_id)

    def delete_checkpoint(self, artifact_id: str) -> None:
        """Delete an artifact for good; retention does this to a run's own checkpoints."""
        self._transport.delete_artifact(artifact_id)

    def get_checkpoint(self, artifact_id: str) -> SaveStateResult:
        """Return what is known of an artifact: size, hash, encryption, metadata."""
        return self._transport.get_artifact(artifact_id)

    def export_checkpoint(self, artifact_id: str, path: str | Path) -> Path:
        """Write an artifact in the clear, as a folder for plain PEFT; see `ServiceClient.export_adapter`."""
        return self._transport.export_adapter(artifact_id, Path(path), merged=False)

    def cancel_pending(self) -> int:
        """Cancel what waits in the queue; what runs finishes. Returns how many operations there were."""
        return self._outstanding.cancel()

    # data and runs

    def batches(
        self, source: str | Path | Iterable[Row], *, max_length: int | None = None, seed: int = 0
    ) -> Batches:
        """Tokenise rows for this model and batch them, `config.batch_size` rows each; see `tensafe_nb.data.batches`."""
        return batches(
            source, self.tokenizer, batch_size=self.config.batch_size, max_length=max_length, seed=seed
        )

    def fit(
        self,
        batches: Iterable[Batch],
        *,
        epochs: int | None = None,
        steps: int | None = None,
        eval_batches: Iterable[Batch] | None = None,
        eval_every: int | None = None,
        checkpoint_every: int | None = None,
        keep_last: int | None = None,
        keep_best: str | None = None,
        resume_from: str | None = None,
        show: bool = True,
    ) -> TrainingRun:
        """Train on batches. Returns at once with a run that can be awaited, paused and stopped.

        Args:
            batches: Iterated anew for each epoch; `gradient_accumulation_steps` of them make one optimiser step.
            epochs: Passes over the batches; 1 when `steps` is not given either.
            steps: Optimiser steps after which to end.
            eval_batches: Held-out batches; their loss appears as "eval/loss" before the first and after the last step.
            eval_every: Evaluate every so many steps as well.
            checkpoint_every: Save the state every so many steps, and after the last.
            keep_last: Of the checkpoints this run saved by itself, keep the newest so many; None keeps all.
            keep_best: Keep the one with the best value of this metric as well, for instance "eval/loss".
            resume_from: A checkpoint of a run like this one: go on where it stood in the data. `steps` and `epochs`
                count from that run's beginning.
            show: Show the progress: a bar, or plain lines where the output is no terminal.

        Raises:
            ValidationError: A number that is not positive.
        """
        loop = SupervisedLoop(
            self, batches, epochs=epochs, steps=steps, eval_batches=eval_batches, eval_every=eval_every
        )
        return self.start_run(
            loop,
            planned_steps=loop.planned_steps,
            show=show,
            checkpoints=Checkpoints(checkpoint_every, keep_last, keep_best),
            resume_from=resume_from,
        )

    def start_run(
        self,
        loop: Loop,
        *,
        planned_steps: int | None = None,
        show: bool = True,
        checkpoints: Checkpoints | None = None,
        resume_from: str | None = None,
    ) -> TrainingRun:
        """Run a loop of your own on a thread of its own; `fit` and `RLVRTrainer` are made of this."""
        if self.status is ClientStatus.TERMINATED:
            raise ClientClosedError(
                f"The training client {self.training_client_id} is closed. Create a new one."
            )
        if self._runs and not self._runs[-1].done():
            raise ValidationError(
                f"The run {self._runs[-1].run_id} is still under way, and two would mix their steps. "
                f"Await it, or stop() it first; another model can train at the same time on a client of its own."
            )
        run = TrainingRun(self, loop, len(self._runs) + 1, planned_steps, checkpoints, resume_from)
        self._runs.append(run)
        if show:
            load_dotted("tensafe_nb.widgets:show_run")(run)
        return run.start()

    @property
    def runs(self) -> tuple[TrainingRun, ...]:
        """The runs started on this client."""
        return tuple(self._runs)

    # state

    @property
    def training_client_id(self) -> str:
        """Names this client in logs, runs and handles."""
        return self._channel.training_client_id

    @property
    def config(self) -> TrainingConfig:
        """What it was made of."""
        return self._channel.config

    @property
    def status(self) -> ClientStatus:
        """INITIALIZING, READY, BUSY, ERROR or TERMINATED."""
        return ClientStatus(self._channel.info().status)

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return self._channel.step

    @property
    def policy_version(self) -> int:
        """Version of the weights; every change of them counts one up."""
        return self._channel.policy_version

    @property
    def dp_metrics(self) -> None:
        """None: this client trains without differential privacy."""
        return None

    @property
    def capabilities(self) -> frozenset[str]:
        """The verbs its core knows, "value_head" if the model has one, "base_reference" if its base stays as it was."""
        lora = self.config.lora_config
        has = {
            "value_head": self.config.value_head,
            "base_reference": lora is not None and lora.bias == "none",
        }
        return VERBS | {name for name, is_so in has.items() if is_so}

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; waits for the model to be loaded."""
        self._channel.loaded.wait()
        return self._channel.loaded.outcome()

    def refresh(self) -> TrainingClientInfo:
        """Read the core's state now."""
        return self._channel.info()

    async def ready(self) -> None:
        """Wait until the model is loaded.

        Raises:
            ModelLoadError: It could not be loaded.
        """
        await self._channel.loaded.wait_async()
        self._channel.loaded.outcome()

    # events

    @property
    def history(self) -> RunHistory:
        """Every metric as a curve, every event by number; outlives the process."""
        return self._channel.bus.history

    def events(self, after: int = 0) -> AsyncIterator[Event]:
        """Iterate over what happened since event number `after`, then over what happens, until the client is closed."""
        return stream(self.subscribe, after)

    def subscribe(self, subscriber: Callable[[Event], None], after: int | None = None) -> Callable[[], None]:
        """Call `subscriber(event)` on every event, at once and on whatever thread it happens; see `events()`.

        A subscriber must be quick, and must neither submit operations nor wait for them.

        Returns:
            A function that ends the subscription.
        """
        return self._channel.bus.subscribe(subscriber, after)

    def publish(self, event: Event) -> Event:
        """Record an event of your own in the history, for instance Metrics."""
        return self._channel.bus.publish(event)

    def sync_events(self) -> None:
        """Put every recorded event on the disk."""
        self._channel.bus.sync()

    # how it looks in a notebook

    def dashboard(self, sections: Sequence[str] | None = None) -> Any:
        """Return the live panel of this client, a widget; or one with only some sections: see `widgets.Dashboard`."""
        return load_dotted("tensafe_nb.widgets:panel")(self, sections)

    def _repr_mimebundle_(self, **_: Any) -> Any:
        return load_dotted("tensafe_nb.widgets:mimebundle")(self)

    # the end

    def close(self) -> None:
        """Stop the runs, cancel what waits, end the threads, free the memory; idempotent."""
        for run in self._runs:
            run.stop()
        self._channel.close()
        for run in self._runs:
            run.join(timeout=JOIN_SECONDS)
        self._channel.bus.close()
        if "tensafe_nb.widgets" in sys.modules:  # something may be showing this client: let it show the end
            load_dotted("tensafe_nb.widgets:settle")(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await asyncio.to_thread(self.close)

    def __repr__(self) -> str:
        adapter = f"LoRA r{self.config.lora_config.rank}" if self.config.lora_config else "all weights"
        return (
            f"<TrainingClient {self.training_client_id} {self.config.model_ref} {adapter}, "
            f"step {self.step}, {self.status}>"
        )

    def _submit(self, operation: Operation) -> FutureHandle[Any]:
        handle = self._channel.submit(operation)
        self._outstanding.add(handle)
        return handle
