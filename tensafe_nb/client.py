"""A TrainingClient, as a notebook holds it: each verb checks its arguments, queues an operation, returns a handle."""

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

from tensafe_nb.chats.chat import ModelChat
from tensafe_nb.checks import checked
from tensafe_nb.config import (
    MIN_TEMPERATURE,
    Precision,
    SamplingConfig,
    SamplingEngine,
    StepConfig,
    TrainingConfig,
    joins,
    spells,
)
from tensafe_nb.data import Batches, OnBadRows, Rows, batches, read_prompts
from tensafe_nb.data.poisson import PoissonDraws, poisson_draws, sample_rate_of
from tensafe_nb.display import as_given, settle, widgets
from tensafe_nb.errors import ClientClosedError, FutureTimeoutError, ValidationError, near_misses, nearest
from tensafe_nb.events import Event, RunDescribed, RunState
from tensafe_nb.futures import FutureHandle, Outstanding, Pieces, is_telling, promise_of
from tensafe_nb.history.log import RunHistory
from tensafe_nb.history.sinks.forwarding import Forwarding, check_samples, reporter
from tensafe_nb.history.sinks.sink import sink_of
from tensafe_nb.history.stream import Subscriptions, stream
from tensafe_nb.lifetimes import Freed
from tensafe_nb.privacy.audit_canary import PrivacyAudit
from tensafe_nb.privacy.ledger.statement import PrivacyStatement
from tensafe_nb.privacy.what_if import WhatIf, what_if_of
from tensafe_nb.protocol.batch import BatchData
from tensafe_nb.protocol.codec import plain_metadata
from tensafe_nb.protocol.operations import (
    VERBS,
    ComputeLogprobs,
    Forward,
    ForwardBackward,
    FreezeReference,
    LoadAdapter,
    LoadState,
    Operation,
    OptimStep,
    ReadAdapter,
    Sample,
    SaveState,
    VoidPrivacy,
)
from tensafe_nb.protocol.results import (
    ClientStatus,
    DPMetrics,
    ForwardBackwardResult,
    ForwardResult,
    FreezeReferenceResult,
    LoadAdapterResult,
    LoadStateResult,
    LogprobsResult,
    OptimStepResult,
    Prompt,
    ReadAdapterResult,
    RunStatus,
    SampleResult,
    SaveStateResult,
    StateSource,
    StepEstimate,
    TrainingClientInfo,
    VoidPrivacyResult,
)
from tensafe_nb.runs.alarms import check_schedule
from tensafe_nb.runs.checkpoints import Checkpoints
from tensafe_nb.runs.description import described
from tensafe_nb.runs.loop import Batch, Loop, LossSpec
from tensafe_nb.runs.run import SILENT_SECONDS, TrainingRun
from tensafe_nb.runs.supervised import SupervisedLoop, summary_of
from tensafe_nb.transports.base import Channel, Transport
from tensafe_nb.transports.encrypted.adapter import HEAdapter

R = TypeVar("R")

JOIN_SECONDS = 5.0  # how long close() waits for a run that is inside the user's own code
MOST_SEQUENCES = 1 << 20  # of one call of sample()
MOST_COLUMNS = 8  # of a chat
MAX_NAME = 200  # characters of a checkpoint's name
UNFORKED = ("model_ref", "lora_config", "resize_embeddings")  # that a state would not fit
Clients: TypeAlias = "weakref.WeakValueDictionary[str, TrainingClient]"


@near_misses(
    train="tc.fit(batches, steps=…) (a run), or tc.forward_backward(batch) and tc.optim_step() (one step)",
    train_step="tc.forward_backward(batch), then tc.optim_step()",
    generate="tc.sample(prompts, max_new_tokens=…)",
    complete="tc.sample(prompts, max_new_tokens=…)",
    backward="tc.forward_backward(batch)",
    zero_grad="not needed: tc.optim_step() ends the window",
    evaluate="tc.forward(batch), or tc.fit(…, eval_batches=…)",
    eval="tc.forward(batch), or tc.fit(…, eval_batches=…)",
    save="tc.save_state(name=…)",
    save_checkpoint="tc.save_state(name=…)",
    load="tc.load_state(artifact_id)",
    load_checkpoint="tc.load_state(artifact_id)",
    restore="service.restore(artifact_id)",
    export="tc.export_checkpoint(artifact_id, path)",
    delete="tc.close() (the client), or tc.delete_checkpoint(artifact_id)",
    metrics='tc.history["loss"] (one series), tc.history.table() (all of them)',
    id="tc.training_client_id",
    model="not here: the model lives in the core; tc.sample(…), tc.forward(…), tc.config.model_ref",
    state="tc.status",
)
class TrainingClient:
    """One model in training. Every verb queues an operation and returns a FutureHandle at once.

    Operations run in the order they were submitted. Made by `ServiceClient.create_training_client`. It lives as long as
    something of yours refers to it, or one of its runs is under way; then its thread ends and its model is freed.
    `close()` is for saying when.

    Example:
        >>> loss = tc.forward_backward(batch)
        >>> step = tc.optim_step()          # queued behind it: no need to wait in between
        >>> print((await loss).loss, (await step).step)
    """

    marks: tuple[str, ...] = ()
    steerable = True

    def __init__(self, channel: Channel, transport: Transport, clients: Clients) -> None:
        self._channel, self._transport, self._clients = channel, transport, clients
        clients[channel.training_client_id] = self
        self._runs: list[TrainingRun] = []
        self._outstanding = Outstanding()
        self._subscriptions = Subscriptions(channel.subscribe)
        self._forwardings: dict[object, Forwarding] = {}
        self._chats: list[ModelChat] = []
        self._encrypted: weakref.WeakSet[HEAdapter] = weakref.WeakSet()
        weakref.finalize(self, channel.detach).atexit = False  # there, the transport closes what is left

    # verbs

    @checked
    def forward_backward(
        self,
        batch: Batch,
        loss_fn: LossSpec | None = None,
        loss_kwargs: Mapping[str, Any] | None = None,
        *,
        return_logprobs: bool = False,
    ) -> FutureHandle[ForwardBackwardResult]:
        """Compute the loss of a batch and add its gradient to what is accumulated.

        Args:
            batch: A BatchData, or a dict of `input_ids`, `attention_mask`, `labels` (B, T) and what the loss needs.
            loss_fn: A registered name, "package.module:attribute" or a callable; token cross entropy when None.
            loss_kwargs: Keywords of the loss.
            return_logprobs: Also return each label's log-probability, (B, T), before the step.

        Raises:
            ValidationError: A batch or loss that does not fit.
        """
        return self._submit(
            ForwardBackward(BatchData.of(batch), loss_fn, dict(loss_kwargs or {}), return_logprobs)
        )

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

    @joins(StepConfig, "step")
    def optim_step(
        self,
        apply_dp_noise: bool = True,
        step: StepConfig | None = None,
        *,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        betas: tuple[float, float] | None = None,
        eps: float | None = None,
        max_grad_norm: float | None = None,
    ) -> FutureHandle[OptimStepResult]:
        """Apply the accumulated gradients with the optimiser.

        Args:
            apply_dp_noise: Without differential privacy it has no effect. With it, False is refused while there is a
                guarantee to lose; see `void_privacy`.
            step: What this step does otherwise than `config.optimizer` says: a StepConfig, whose fields the keywords
                are. Those that you give come on top of it.
            learning_rate: Of this step, whatever the schedule says; 0 moves no weight.
            weight_decay: Of this step.
            betas: Of this step; for adamw and adam, like `eps`.
            eps: Of this step.
            max_grad_norm: Norm to which the gradient is scaled down; 0 leaves it.

        Raises:
            ValidationError: A setting that does not fit, or that the optimiser does not have. The handle of a private
                client's step fails with `PrivacyUnitError` for a draw that is not whole, and with
                `DPBudgetExceededError` instead of spending more than the budget.
        """
        if not isinstance(apply_dp_noise, bool):
            raise ValidationError(
                f"optim_step(apply_dp_noise=…) is True or False, not {as_given(apply_dp_noise)}."
            )
        assert step is not None  # the keywords are in it
        step.applied_to(self.config.optimizer)
        return self._submit(OptimStep(apply_dp_noise, step))

    @joins(SamplingConfig, "sampling")
    def sample(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingConfig | None = None,
        *,
        stream: bool = False,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        num_samples: int = 1,
        stop: str | Sequence[str] | None = (),
        stop_tokens: Sequence[int] | None = (),
        seed: int | None = None,
        ignore_end: bool = False,
        top_logprobs: int = 0,
        prompt_logprobs: bool = False,
        top_prompt_logprobs: int = 0,
        precision: Precision = "exact",
        alone: bool = False,
        engine: SamplingEngine = "torch",
    ) -> FutureHandle[SampleResult]:
        """Draw completions.

        Args:
            prompts: A text, a list of chat messages or of token ids, or a list of any of these.
            sampling: How to draw: a SamplingConfig, whose fields the keywords are. Those that you give come on top of
                it.
            stream: Tell pieces of the texts as they are drawn: `async for piece in handle.pieces()`.
            max_new_tokens: Longest completion, in tokens.
            temperature: Divides the logits; 0 takes the most likely token.
            top_p: Keep the smallest set of tokens whose probability reaches this.
            top_k: Keep the k most likely tokens; 0 keeps all.
            num_samples: Completions per prompt.
            stop: Strings that end a completion; they are cut from its text.
            stop_tokens: Tokens that end a completion, as the model's end token does.
            seed: Fixes every row's random stream; None takes the client's next one.
            ignore_end: Go on past end tokens, so that every completion has `max_new_tokens`.
            top_logprobs: Also return the most likely tokens at the place of each one drawn, so many.
            prompt_logprobs: Also return the log-probability of each token of the prompts.
            top_prompt_logprobs: Also return the most likely tokens of each place in the prompts, so many.
            precision: Of the weights that tokens are drawn with: "exact", "bfloat16", "int8" or "auto".
            alone: Draw beside no other sample, so that logprobs, too, are the same to the last bit.
            engine: "torch", or "llama.cpp" where llama-cpp-python is installed: see SamplingConfig.

        Raises:
            ValidationError: No prompt, a field that does not fit, or an engine that is not there, or cannot sample what
                is trained.
        """
        assert sampling is not None  # the keywords are in it
        return self._submit(Sample(prompts_to_sample(prompts, sampling), sampling, stream))

    @joins(SamplingConfig, "sampling")
    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingConfig | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: str | Sequence[str] | None = (),
        stop_tokens: Sequence[int] | None = (),
        seed: int | None = None,
        ignore_end: bool = False,
        engine: SamplingEngine = "torch",
    ) -> Pieces:
        """Draw one completion, piece by piece, with `async for` or `for`; who leaves the loop ends the sampling.

        It takes its place in the queue as `sample` does: what was submitted before comes first. With the same seed, the
        pieces add up to what `sample` draws.

        Args:
            prompt: A text, a list of chat messages, or of token ids.
            sampling: As for `sample`, like its fields, which are keywords here as well.
            max_new_tokens: Longest completion, in tokens.
            temperature: Divides the logits; 0 takes the most likely token.
            top_p: Keep the smallest set of tokens whose probability reaches this.
            top_k: Keep the k most likely tokens; 0 keeps all.
            stop: Strings that end the completion; they are cut from its text.
            stop_tokens: Tokens that end the completion, as the model's end token does.
            seed: Fixes the random stream; None takes the client's next one.
            ignore_end: Go on past end tokens.
            engine: "torch", or "llama.cpp": see SamplingConfig.

        Returns:
            Pieces (`SampledPiece`): text of whole characters, tokens, their logprobs; the last one says why it ended.
            Its `handle` is that of the sample.

        Raises:
            ValidationError: No prompt or several, `num_samples`, or a field that does not fit.

        Example:
            >>> async for piece in tc.stream("def add(a, b):", max_new_tokens=16):
            ...     print(piece.text, end="")
        """
        assert sampling is not None  # the keywords are in it
        read = read_prompts(prompt)
        if len(read) != 1 or sampling.num_samples != 1:
            raise ValidationError(
                "stream() draws one completion of one prompt. Several at a time: "
                "tc.sample(prompts, num_samples=…, stream=True).pieces()"
            )
        handle = self._submit(Sample(read, sampling, stream=True))
        return Pieces(handle, promise_of(handle), cancels=True)

    @joins(SamplingConfig, "sampling")
    def chat(
        self,
        system: str = "",
        sampling: SamplingConfig | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: str | Sequence[str] | None = (),
        stop_tokens: Sequence[int] | None = (),
        seed: int | None = None,
        ignore_end: bool = False,
    ) -> ModelChat:
        """Return a chat with this client: in a notebook a panel to type into. With several clients: `tn.chat`.

        Each message takes its place in the queue, as with `stream`. What was said can be told apart by thumbs, which
        makes rows for `dpo` and its like of it: `chat.rows`.

        Args:
            system: What stands before the conversation.
            sampling: How answers are drawn, like its fields, which are keywords here as well.
            max_new_tokens: Longest answer, in tokens.
            temperature: Divides the logits; 0 takes the most likely token.
            top_p: Keep the smallest set of tokens whose probability reaches this.
            top_k: Keep the k most likely tokens; 0 keeps all.
            stop: Strings that end an answer; they are cut from its text.
            stop_tokens: Tokens that end an answer, as the model's end token does.
            seed: Fixes the random stream of first answers; None takes the client's next one.
            ignore_end: Go on past end tokens.

        Raises:
            ValidationError: A field that does not fit.

        Example:
            >>> chat = tc.chat(system="Answer briefly.", temperature=0.7)
            >>> print((await chat.say("Hello!")).text)
        """
        return chat(self, system=system, sampling=sampling)

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

    @checked
    def load_state(
        self, artifact_id: str, *, for_run: str | None = None, include_optimizer: bool = True
    ) -> FutureHandle[LoadStateResult]:
        """Take the state of an artifact in place of this client's own; all of it, or on any failure nothing.

        Args:
            artifact_id: Its id, or its name.
            for_run: Refuse a state that was not saved by a run with a loop of this name.
            include_optimizer: False takes the weights, and lets the optimiser's moments start at zero.

        Raises:
            ValidationError: No id. The handle fails with `ArtifactNotFoundError`, `DecryptionError`, or, for an
                artifact of another model, adapter or optimiser, with a ValidationError that lists the differences.
        """
        if not artifact_id:
            raise ValidationError(f"load_state takes an artifact's id or name, not {as_given(artifact_id)}.")
        return self._submit(LoadState(artifact_id, for_run, bool(include_optimizer)))

    def read_adapter(self) -> FutureHandle[ReadAdapterResult]:
        """Return the adapter's tensors: float32 arrays by PEFT's names, as in an exported `adapter_model.safetensors`.

        It takes its place in the queue: they are the weights after what was submitted before.

        Example:
            >>> tensors = tc.read_adapter().tensors
        """
        return self._submit(ReadAdapter())

    def load_adapter(self, tensors: Mapping[str, Any]) -> FutureHandle[LoadAdapterResult]:
        """Take tensors in place of the adapter's own, such as the mean of several clients; or on any failure nothing.

        Step, learning rate and random streams go on; the optimiser's moments and what was accumulated start anew.

        Args:
            tensors: Arrays or torch tensors, by the names of `read_adapter`. Those that are not named stay as they are:
                with `freeze_a`, the Bs are enough.

        Raises:
            ValidationError: No dict of arrays, or values that are NaN. The handle fails with one for a name that the
                adapter does not have, for another shape, and for a client that trains with differential privacy:
                tensors come with no account of what they hold.

        Example:
            >>> tc.load_adapter(member.decrypt(total))
        """
        return self._submit(LoadAdapter(tensors))

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

    def _submit(self, operation: Operation[R]) -> FutureHandle[R]:
        handle = self._channel.submit(operation)
        self._outstanding.add(handle)
        return handle

    def cancel_pending(self) -> int:
        """Cancel what waits in the queue; what runs finishes. Returns how many operations there were."""
        return self._channel.cancel(self._outstanding.waiting())

    # states

    @spells(TrainingConfig, but=UNFORKED)
    @checked
    def fork(self, artifact_id: str | None = None, **changes: Any) -> "TrainingClient":
        """Return a new training client that starts from a state of this one, sharing its frozen weights.

        Args:
            artifact_id: The state; None saves and takes it as it is now.
            changes: Fields of TrainingConfig that are to be different; of `optimizer` and `loss` only those that
                differ: `optimizer={"learning_rate": 1e-3}`.

        Raises:
            ValidationError: A field that does not fit, or that the state would not fit.
        """
        for field in UNFORKED:
            if field in changes:
                raise ValidationError(
                    f"fork: {field} cannot change: the state would not fit. Create a new client for it."
                )
        config = self.config.change(**changes)
        parent = self.training_client_id
        if artifact_id is not None:
            source = StateSource(artifact_id=artifact_id, parent=parent)
        else:
            saved = self.save_state(metadata={"reason": "fork"})
            source = StateSource(future_id=saved.future_id, parent=parent)
        return TrainingClient(self._transport.create(config, source), self._transport, self._clients)

    @checked
    def delete_checkpoint(self, artifact_id: str) -> None:
        """Delete an artifact for good; retention does this to a run's own checkpoints."""
        self._transport.delete_artifact(artifact_id)

    @checked
    def get_checkpoint(self, artifact_id: str) -> SaveStateResult:
        """Return what is known of an artifact: size, hash, encryption, metadata."""
        return self._transport.get_artifact(artifact_id)

    @checked
    def export_checkpoint(self, artifact_id: str, path: str | Path) -> Path:
        """Write an artifact in the clear, as a folder for plain PEFT; see `ServiceClient.export_adapter`."""
        return self._transport.export_adapter(artifact_id, Path(path), merged=False)

    # data

    @checked
    def batches(
        self,
        source: Rows,
        *,
        max_length: int | None = None,
        truncate: bool = False,
        on_bad_rows: OnBadRows = "raise",
        seed: int = 0,
    ) -> Batches:
        """Tokenise rows for this model and batch them, `config.batch_size` rows each; see `tensafe_nb.data.batches`.

        Rows longer than `max_length` or the model's context are found here, not in the middle of a run. For a private
        client with sampling="worst_case", each batch says which rows it holds.
        """
        return batches(
            source,
            self.tokenizer,
            batch_size=self.config.batch_size,
            max_length=max_length,
            truncate=truncate,
            on_bad_rows=on_bad_rows,
            context=self.context,
            seed=seed,
            with_ids="differential_privacy" in self.capabilities,
        )

    @checked
    def dp_batches(
        self,
        examples: Rows,
        *,
        steps: int | None = None,
        unit_ids: Sequence[object] | None = None,
        max_length: int | None = None,
        truncate: bool = False,
        on_bad_rows: OnBadRows = "raise",
    ) -> PoissonDraws:
        """Return Poisson draws of rows for private training: one item is one step's batch, sometimes an empty one.

        Args:
            examples: Rows, as for `batches`.
            steps: Draws per pass; None takes as many as use each unit once on average.
            unit_ids: Whose each row is: all rows of one person are drawn, and clipped, together. None takes each row
                for itself.
            max_length: How many tokens a row may have.
            truncate: Cut longer rows at the end.
            on_bad_rows: "skip" leaves rows that cannot be used out before anything is drawn. Whether a row is left out
                depends on that row alone, so the guarantee stays; `dataset_size` stays what you declared.

        Raises:
            ValidationError: No DPConfig with sampling="poisson", or rows that cannot be read.

        Example:
            >>> for draw in tc.dp_batches(rows, steps=100):
            ...     tc.forward_backward(draw), tc.optim_step()
        """
        sample_rate = sample_rate_of(self.config)
        assert self.config.dp_config is not None  # else it was refused
        return poisson_draws(
            sample_rate,
            examples,
            self.tokenizer,
            context=self.context,
            declared=self.config.dp_config.dataset_size,
            client_id=self.training_client_id,
            enter=self._channel.enter_draw,
            steps=steps,
            unit_ids=unit_ids,
            max_length=max_length,
            truncate=truncate,
            on_bad_rows=on_bad_rows,
        )

    @checked
    def estimate(self, batch_size: int | None = None, length: int | None = None) -> StepEstimate:
        """Return what a training step will take in time and memory, from a short trial that trains nothing.

        It waits for the model to be loaded and for the operation that runs, takes a few passes over at most some
        hundred made-up tokens, and leaves weights, optimiser, random streams and queue as they are.

        Args:
            batch_size: Rows of a step; None takes `config.batch_size × gradient_accumulation_steps`.
            length: Tokens of a row; None takes 512, or the model's context where that is shorter.

        Raises:
            InsufficientMemoryError: The step will not fit the memory that is there; says what would.
            ValidationError: A size does not fit the model, or the device cannot be asked for its memory.

        Example:
            >>> tc.estimate(batch_size=4, length=128).seconds_per_step
        """
        return self._channel.estimate(batch_size, length)

    # encrypted

    @checked
    def he_adapter(
        self,
        layers: Sequence[int] | int = (-1,),
        modules: Sequence[str] | str | None = None,
        tokens: int | str = "auto",
        *,
        params: str = "n8192-d2",
    ) -> HEAdapter:
        """Return this client's adapter as something to call with activations that its core cannot read.

        Over a server, activations are encrypted here, and the adapter never leaves there; embedded, both halves are in
        one process, which protects nothing and says so. Waits for the model, and for the operation that runs.

        Args:
            layers: Their numbers, from the end where negative.
            modules: Names of adapted modules in them, such as "q_proj"; None takes all that are adapted.
            tokens: How many share a ciphertext: "auto", or 1, 8, 64 or 512, which needs fewer keys.
            params: Name of the parameter set: "n8192-d2", or "n16384-d2" for 256-bit security.

        Raises:
            ValidationError: No such layer or module, or none that is adapted.
            EncryptionContextError: No such parameter set, or tenseal is not installed: says the line that does it.

        Example:
            >>> he = tc.he_adapter(layers=[-1], modules=["q_proj", "v_proj"])
            >>> print(he.cost(tokens=64))
            >>> result = await he[-1](x)  # x: (S, d_in); result["q_proj"]: (S, d_out)
        """
        adapter = HEAdapter(self, self._channel, layers, modules, tokens, params)
        self._encrypted.add(adapter)
        return adapter

    # privacy

    def privacy_statement(self) -> PrivacyStatement:
        """Return what may be said about the privacy of what was trained so far: as Markdown, and as JSON.

        Raises:
            ValidationError: This client trains without differential privacy.
        """
        self.ready().exception()
        return self._channel.privacy_statement()

    @checked
    def privacy_audit(self, canaries: int = 1000, steps: int = 1) -> PrivacyAudit:
        """Measure, on made-up canaries, whether clip, sum and noise of this client keep what its epsilon promises.

        A model of canaries is trained by the same code with the same DPConfig. Nothing of this client's data or budget
        is used. It can find a violation; that it finds none is evidence, not proof.

        Args:
            canaries: How many, 100 to 10,000; half of them take part.
            steps: Private steps.

        Raises:
            ValidationError: No differential privacy, or no noise.
        """
        if self.config.dp_config is None or not self.config.dp_config.enabled:
            raise ValidationError("privacy_audit(): this client trains without differential privacy.")
        return self._channel.privacy_audit(canaries, steps)

    @checked
    def what_if(
        self,
        *,
        noise_multiplier: float | None = None,
        target_epsilon: float | None = None,
        steps: int | None = None,
        epochs: float | None = None,
        expected_batch_size: int | None = None,
        dataset_size: int | None = None,
    ) -> WhatIf:
        """Return what a plan would spend, or how much noise it needs; nothing is spent, and no step of yours waits.

        Args:
            noise_multiplier: Sigma; None and no `target_epsilon` either takes the client's own.
            target_epsilon: Solve sigma for this epsilon instead.
            steps: Planned steps; or give `epochs`.
            epochs: How often to use each unit, on average; 1 when `steps` is not given either.
            expected_batch_size: L; None takes the client's own.
            dataset_size: N; None takes the client's own.

        Raises:
            ValidationError: No N, or arguments that do not go together.
        """
        return what_if_of(
            self.config,
            noise_multiplier=noise_multiplier,
            target_epsilon=target_epsilon,
            steps=steps,
            epochs=epochs,
            expected_batch_size=expected_batch_size,
            dataset_size=dataset_size,
            parameters=self._channel.info().trained_parameters or None,
        )

    # runs

    @checked
    def fit(
        self,
        batches: Iterable[Batch],
        *,
        loss_fn: LossSpec | None = None,
        loss_kwargs: Mapping[str, Any] | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        eval_batches: Iterable[Batch] | None = None,
        eval_every: int | None = None,
        checkpoint_every: int | None = None,
        keep_last: int | None = None,
        keep_best: str | None = None,
        resume_from: str | None = None,
        name: str | None = None,
        tags: str | Sequence[str] = (),
        notes: str = "",
        show: bool = True,
    ) -> TrainingRun:
        """Train on batches. Returns at once with a run that can be awaited, paused and stopped.

        Args:
            batches: Iterated anew for each epoch; `gradient_accumulation_steps` of them make one optimiser step.
            loss_fn: As for `forward_backward`; the client's own when None.
            loss_kwargs: Keywords of the loss, as {"beta": 0.1}.
            epochs: Passes over the batches; 1 when `steps` is not given either.
            steps: Optimiser steps after which to end.
            eval_batches: Held-out batches; their loss appears as "eval/loss" before the first and after the last step,
                and what else the loss measures as "eval/…".
            eval_every: Evaluate every so many steps as well.
            checkpoint_every: Save the state every so many steps, and after the last.
            keep_last: Of the checkpoints this run saved by itself, keep the newest so many; None keeps all.
            keep_best: Keep the one with the best value of this metric as well, for instance "eval/loss".
            resume_from: A checkpoint of a run like this one: go on where it stood in the data. `steps` and `epochs`
                count from that run's beginning.
            name: What the run is called, in `list_runs`, in the panel and in the legend of compared curves.
            tags: Words to find it by.
            notes: What there is to say of it; `run.describe(…)` changes any of the three.
            show: Show the progress: a bar, or plain lines where the output is no terminal.

        Raises:
            ValidationError: A number that is not positive; or steps that would train at learning rate 0, since the
                schedule ends before.
        """
        loop = SupervisedLoop(
            self,
            batches,
            epochs=epochs,
            steps=steps,
            eval_batches=eval_batches,
            eval_every=eval_every,
            loss_fn=loss_fn,
            loss_kwargs=loss_kwargs,
        )
        if loop.planned_steps is not None:  # those of a resumed run count from its beginning
            begun_at = 0 if resume_from is not None else self.step
            check_schedule(self.config.optimizer, begun_at + loop.planned_steps, loop.planned_steps)
        return self.start_run(
            loop,
            planned_steps=loop.planned_steps,
            show=show,
            checkpoints=Checkpoints(checkpoint_every, keep_last, keep_best),
            resume_from=resume_from,
            name=name,
            tags=tags,
            notes=notes,
            started_with={
                "run": {
                    "kind": "fit",
                    **loop.described_loss,
                    "epochs": epochs,
                    "steps": steps,
                    "batches": summary_of(batches),
                    "eval_batches": summary_of(eval_batches),
                    "eval_every": eval_every,
                    "checkpoint_every": checkpoint_every,
                    "keep_last": keep_last,
                    "keep_best": keep_best,
                    "resume_from": resume_from,
                }
            },
        )

    def start_run(
        self,
        loop: Loop,
        *,
        planned_steps: int | None = None,
        show: bool = True,
        checkpoints: Checkpoints | None = None,
        resume_from: str | None = None,
        name: str | None = None,
        tags: str | Sequence[str] = (),
        notes: str = "",
        started_with: Mapping[str, Any] | None = None,
    ) -> TrainingRun:
        """Run a loop of your own on a thread of its own; `fit` and `RLVRTrainer` are made of this.

        Args:
            loop: What it repeats.
            planned_steps: How many steps of its own it is to take.
            show: Show the progress.
            checkpoints: When to save, and what to keep.
            resume_from: A checkpoint of a run like this one.
            name: As for `fit`, like `tags` and `notes`.
            tags: Words to find it by.
            notes: What there is to say of it.
            started_with: Plain data that `run.config` shows beside the client's configuration.
        """
        description = described(RunDescribed(run_id=""), name, tags, notes)
        if self.status is ClientStatus.TERMINATED:
            raise ClientClosedError(
                f"The training client {self.training_client_id} is closed. Create a new one."
            )
        if self._runs and not self._runs[-1].done():
            raise ValidationError(
                f"The run {self._runs[-1].run_id} is still under way, and two would mix their steps. "
                f"Await it, or stop() it first; another model can train at the same time on a client of its own."
            )
        self._make_way()
        earlier = max(len(self._runs), len(self.history.state.runs))  # there, another client's may be, too
        run = TrainingRun(
            self,
            loop,
            earlier + 1,
            planned_steps,
            checkpoints,
            resume_from,
            replace(description, time=0.0),
            plain_metadata(started_with or {}),
        )
        self._runs.append(run)
        try:
            run.claim()
            if show:
                widgets().show_run(run)
            return run.start()
        except BaseException:  # an interrupt of the cell, or another client was first
            if not run.give_up():
                self._runs.remove(run)
            raise

    def _make_way(self) -> None:
        """Refuse to train beside a run that another client drives; of one that has fallen silent, tell that it ended.

        Raises:
            ValidationError: It is under way.
        """
        state = self.history.state
        latest = state.latest_run
        if latest is None or latest.state.ended or any(run.run_id == latest.run_id for run in self._runs):
            return
        silent = time.time() - max(latest.started_at, state.measured_at)
        if state.queue.depth or silent < SILENT_SECONDS:
            raise ValidationError(
                f"The run {latest.run_id} of another client of {self.training_client_id} is under way "
                f"({latest.state}, step {latest.steps_done}), and two would mix their steps. Stop it there, or train a "
                f"client of your own: tc.fork(). If its kernel has ended, that shows after {SILENT_SECONDS:.0f} s of "
                f"silence: try again then."
            )
        why = f"another client started a run when nothing had been heard of this one for {silent:.0f} s"
        self.publish(
            RunState(
                run_id=latest.run_id,
                state=RunStatus.INTERRUPTED,
                step=self.step,
                planned_steps=latest.planned_steps,
                reason=why,
                done=latest.steps_done_if_killed,
                taken=latest.steps_taken,
                curve=latest.curve,
            )
        )

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
        return self._channel.info().step

    @property
    def policy_version(self) -> int:
        """Version of the weights; every change of them counts one up."""
        return self._channel.info().policy_version

    @property
    def dp_metrics(self) -> DPMetrics | None:
        """What the last private step spent, and the total; None without differential privacy, or before a step."""
        return self._channel.info().dp_metrics

    @property
    def capabilities(self) -> frozenset[str]:
        """What its core can do.

        The verbs; "value_head" if the model has one; "base_reference" if its base stays as it was;
        "differential_privacy" if it trains privately, and "differential_privacy:poisson" if on Poisson draws.
        """
        lora, dp = self.config.lora_config, self.config.dp_config
        private = dp is not None and dp.enabled
        has = {
            "differential_privacy": private,
            "differential_privacy:poisson": private and dp is not None and dp.sampling == "poisson",
            "value_head": self.config.value_head,
            "base_reference": lora is not None and lora.bias == "none",
        }
        return frozenset(VERBS) | {name for name, is_so in has.items() if is_so}

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer; waits for the model to be loaded."""
        return self._channel.tokenizer()

    @property
    def context(self) -> int | None:
        """How many tokens the model reads at most, if there is a limit; waits for the model to be loaded."""
        return self.ready().result().context

    def refresh(self) -> TrainingClientInfo:
        """Read the core's state now."""
        return self._channel.refresh()

    def ready(self) -> FutureHandle[TrainingClientInfo]:
        """Return a handle that ends when the model is loaded: await it, or ask for its `result()`.

        It fails with a `ModelLoadError` where the model cannot be loaded. Cancelling it has no effect.
        """
        return self._channel.ready()

    @checked
    def wait_for_step(self, timeout: float) -> bool:
        """Wait so many seconds until `step` is known, which a restored client reads from its state; return if it is."""
        if self._channel.info().source is None:
            return True
        try:
            self.ready().exception(timeout)
        except FutureTimeoutError:
            return False
        return True

    # events

    @property
    def history(self) -> RunHistory:
        """Every metric as a curve, every event by number; outlives the process."""
        return self._channel.history

    def events(self, after: int = 0) -> AsyncIterator[Event]:
        """Iterate over what happened since event number `after`, then over what happens, until the client is closed."""
        return stream(self.subscribe, after)

    @checked
    def subscribe(self, subscriber: Callable[[Event], None], after: int | None = None) -> Callable[[], None]:
        """Call `subscriber(event)` on every event, at once and on whatever thread it happens; see `events()`.

        A subscriber must be quick, and must neither submit operations nor wait for them. One that raises is reported
        once, and told no more. It does not keep this client: a subscription ends with the client.

        Returns:
            A function that ends the subscription.

        Raises:
            ValidationError: A subscriber that cannot be called, or is a coroutine function.
        """
        return self._subscriptions.add(subscriber, after)

    @checked
    def watch(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        """Subscribe for what may outlive this client and must not refer to it, such as its panel: to the last event.

        Returns:
            A function that ends the subscription.
        """
        return self._channel.subscribe(subscriber)

    @checked
    def log_to(
        self,
        sink: Any,
        where: str | Path | None = None,
        *,
        samples: int = 0,
        only: str | None = None,
        **options: Any,
    ) -> Forwarding:
        """Hand everything that is measured to a sink as well, under the same names: what was measured so far first.

        Each run is a run there, with its configuration; alarms are texts. A sink has a thread of its own: it never
        holds up the training, and one that fails ends with an alarm. Called again for the same place, as a cell that is
        run again does, it returns the forwarding that is there. It ends with this client, or with `close()`.

        Args:
            sink: "tensorboard", "trackio", "mlflow" or "wandb"; a function of (values, step); or an object with the
                methods of `history.sinks.sink.Sink`.
            where: The folder of TensorBoard ("runs"); the project of trackio or wandb, the experiment of MLflow
                ("tensafe_nb").
            samples: Also so many prompts of each step of reinforcement learning, with their answers; no text leaves
                unasked.
            only: The id of a run: of this one alone.
            options: What else trackio.init, wandb.init or MLflow (`tracking_uri`, `tags`) take.

        Raises:
            ValidationError: No such sink, or its package is not installed: says the line that does it.

        Example:
            >>> tc.log_to("tensorboard", "runs")
        """
        check_samples(samples)
        key = (sink if isinstance(sink, str) else id(sink), str(where), only, samples, repr(options))
        if key in self._forwardings and not self._forwardings[key].done:
            return self._forwardings[key]
        name, made = sink_of(sink, where, options)
        forwarding = Forwarding(
            name, made, self.history, reporter(self._channel.publish), only=only, samples=samples
        )
        self._forwardings[key] = forwarding.start(self._channel.subscribe)
        weakref.finalize(self, forwarding.stop).atexit = False
        return forwarding

    @checked
    def publish(self, event: Event) -> Event:
        """Record an event of your own in the history: `Metrics` with a `run_id`, `Alarm`, or what else a run tells.

        Raises:
            ValidationError: An event that only the core can tell.
        """
        return self._channel.publish(event)

    def sync_events(self) -> None:
        """Put every recorded event on the disk."""
        self._channel.sync()

    # how it looks in a notebook

    @checked
    def dashboard(self, sections: Sequence[str] | None = None) -> Any:
        """Return the live panel of this client, a widget; or one with only some sections: see `widgets.Dashboard`."""
        return widgets().panel(self, sections)

    def _repr_mimebundle_(self, **_: Any) -> Any:
        return widgets().mimebundle(self)

    def _mime_(self) -> tuple[str, str]:
        """Return what marimo shows."""
        shown: tuple[str, str] = widgets().mime(self)
        return shown

    # the end

    def close(self) -> None:
        """Stop the runs, cancel what waits, end the threads, free the memory, on a server too; idempotent.

        Raises:
            TGTinkerError: The server could not be told, within the patience: there it lives on. Its own words say how
                to close it later; everything at this end has ended.
            ValidationError: A subscriber asks for it: the client would wait for it, and it for the client.
        """
        if is_telling():
            raise ValidationError(
                "close() cannot be called in a subscriber: it would wait for what waits for the subscriber. Stop the "
                "run there, run.stop(), and close once it has ended."
            )
        self._end(self._channel.close)

    def leave(self) -> None:
        """Stop the runs of this kernel; a training client of this process ends, one of a server lives on."""
        self._end(self._channel.leave)

    def _end(self, end: Callable[[], None]) -> None:
        for run in self._runs:
            run.stop()
        for adapter in tuple(self._encrypted):
            adapter.close()
        with ExitStack() as rest:  # what an interrupt leaves undone, close() does when it is called again
            rest.callback(settle, self)
            for forwarding in self._forwardings.values():
                rest.callback(forwarding.close)
            rest.callback(self._channel.hang_up)
            for run in self._runs:
                rest.callback(run.join, timeout=JOIN_SECONDS)
            try:
                end()
            except KeyboardInterrupt:
                rest.pop_all()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await asyncio.to_thread(self.close)

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise ValidationError(
            "A TrainingClient belongs to this process and can be neither copied nor pickled. tc.fork() makes another, "
            "tc.save_state() keeps what it has learnt, tc.config can be pickled."
        )

    def __repr__(self) -> str:
        adapter = f"LoRA r{self.config.lora_config.rank}" if self.config.lora_config else "all weights"
        return (
            f"<TrainingClient {self.training_client_id} {self.config.model_ref} {adapter}, "
            f"step {self.step}, {self.status}>"
        )

    def _left_behind(self) -> Freed:
        """Return what a notebook's output history keeps of this client when nothing else refers to it."""
        kept = {"history": self.history, "training_client_id": self.training_client_id, "config": self.config}
        return Freed(f"The training client {self.training_client_id}", **kept, _feed=vars(self).get("_feed"))


def chat(
    *clients: TrainingClient,
    system: str = "",
    sampling: SamplingConfig | None = None,
    **named: Any,
) -> ModelChat:
    """Return a chat with several training clients side by side: each answers every message, in a column of its own.

    They answer at the same time, each in the order of its own queue, embedded or on whatever server it is.

    Args:
        clients: Training clients; each is called by its id.
        system: What stands before the conversation.
        sampling: How answers are drawn.
        named: Training clients by the names of their columns; and fields of SamplingConfig.

    Raises:
        ValidationError: No training client, or a field of SamplingConfig that does not fit.

    Example:
        >>> base = service.create_training_client(config)
        >>> chat = tn.chat(base=base, tuned=tc, temperature=0)
        >>> await chat.say("def add(a, b):")
    """
    talking = {name: value for name, value in named.items() if isinstance(value, TrainingClient)}
    fields = {name: value for name, value in named.items() if name not in talking}
    if strangers := [value for value in clients if not isinstance(value, TrainingClient)]:
        raise ValidationError(f"chat() takes training clients, not {as_given(strangers[0])}.")
    if unknown := next((name for name in fields if name not in SamplingConfig.model_fields), None):
        raise ValidationError(
            f"chat(): {unknown}={as_given(fields[unknown])} is neither a training client nor a field of "
            f"SamplingConfig.{nearest(unknown, [*SamplingConfig.model_fields, 'system', 'sampling'])}"
        )
    if sampling is not None and not isinstance(sampling, SamplingConfig):
        raise ValidationError(f"chat(): sampling is a SamplingConfig, not {as_given(sampling)}.")
    columns = {one.training_client_id: one for one in clients} | talking
    if not 0 < len(columns) <= MOST_COLUMNS:
        raise ValidationError(
            f"chat() takes 1 to {MOST_COLUMNS} training clients, and was given {len(columns)}: "
            f"tn.chat(base=tc0, tuned=tc1)."
        )
    made = ModelChat(columns, system, (sampling or SamplingConfig()).replace(**fields))
    for client in columns.values():
        client._chats.append(made)  # whoever keeps one of them keeps the chat
    return made


def prompts_to_sample(prompts: Prompt | Sequence[Prompt], sampling: SamplingConfig) -> tuple[Prompt, ...]:
    """Return the prompts of a call of `sample`, read.

    Raises:
        ValidationError: There are none, or too many.
    """
    read = read_prompts(prompts)
    if len(read) * sampling.num_samples > MOST_SEQUENCES:
        raise ValidationError(
            f"sample(): {len(read):,} prompts with num_samples={sampling.num_samples:,} are more than "
            f"{MOST_SEQUENCES:,} sequences: sample in parts."
        )
    return read
