"""Results and statuses: the plain data that a core answers with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

from tensafe_nb.display import Facts
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.batch import Array
from tensafe_nb.protocol.codec import tagged

Message: TypeAlias = Mapping[str, Any]  # role and content, a text; content is None beside tool_calls
Prompt: TypeAlias = (
    str | Sequence[int] | Sequence[Message] | Mapping[str, Any]
)  # the last: {"messages", "tools"}, or {"tokens", "chat", "stream"} for a conversation that goes on


TopLogprobs: TypeAlias = tuple[tuple[int, float], ...]  # of one place: (token, log-probability)


class ClientStatus(StrEnum):
    """What a training client is doing."""

    INITIALIZING = "INITIALIZING"
    READY = "READY"
    BUSY = "BUSY"
    ERROR = "ERROR"
    TERMINATED = "TERMINATED"


class FutureStatus(StrEnum):
    """Where a queued operation is."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class RunStatus(StrEnum):
    """Where a training run is. INTERRUPTED is only ever read from the log of a process that died."""

    RUNNING = "RUNNING"
    PAUSING = "PAUSING"
    PAUSED = "PAUSED"
    STOPPING = "STOPPING"
    STOPPED = "STOPPED"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    INTERRUPTED = "INTERRUPTED"

    @property
    def ended(self) -> bool:
        return self in (RunStatus.STOPPED, RunStatus.FINISHED, RunStatus.FAILED, RunStatus.INTERRUPTED)


@tagged("forward_backward_result")
@dataclass(frozen=True, slots=True)
class ForwardBackwardResult:
    """What `forward_backward` found.

    Attributes:
        loss: Mean over the batch's labelled tokens (for policy losses: the weighted sum itself).
        grad_norm: Norm of the mean gradient accumulated so far in this window.
        tokens_processed: Labelled tokens.
        metrics: The loss function's own.
        weight: What this loss weighs in a mean over several batches: labelled tokens, or rows.
        logprobs: (B, T) log-probability of each label at temperature 1, with the dropout of this pass; 0 where nothing
            is labelled. None where it was not asked for. No noise covers it: of a private client, it is the operator's.
    """

    loss: float
    grad_norm: float
    tokens_processed: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    weight: float = 0.0
    logprobs: Array | None = field(default=None, compare=False)


@tagged("forward_result")
@dataclass(frozen=True, slots=True, eq=False)
class ForwardResult:
    """What `forward` found; `logprobs` is (B, T), 0 where nothing is labelled, when asked for."""

    loss: float
    tokens_processed: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    logprobs: Array | None = None
    weight: float = 0.0


@tagged("dp_metrics")
@dataclass(frozen=True, slots=True)
class DPMetrics:
    """What a private step spent. The norms and the count are for the operator: epsilon does not cover them.

    Attributes:
        noise_applied: Whether noise was added in this step.
        epsilon_spent: By this step; the values of a run add up to the total.
        total_epsilon: Of the account, after this step; infinite where there is no guarantee.
        delta: At which epsilon is stated.
        grad_norm_before_clip: Mean over the step's units; 0 for an empty draw.
        grad_norm_after_clip: Mean of min(norm, C).
        num_clipped: Units whose norm was above C.
    """

    noise_applied: bool
    epsilon_spent: float
    total_epsilon: float
    delta: float
    grad_norm_before_clip: float
    grad_norm_after_clip: float
    num_clipped: int


@tagged("optim_step_result")
@dataclass(frozen=True, slots=True)
class OptimStepResult:
    """What `optim_step` did.

    Attributes:
        step: Optimiser steps taken so far, this one included.
        learning_rate: Rate of this step.
        grad_norm: Norm of the mean gradient, before clipping.
        policy_version: Version of the weights after this step.
        param_delta_norm: Norm of the change of the weights; of large models estimated from some tensors.
        dp_metrics: None without differential privacy.
    """

    step: int
    learning_rate: float
    grad_norm: float
    policy_version: int
    param_delta_norm: float
    dp_metrics: DPMetrics | None = None


@tagged("sampled_sequence")
@dataclass(frozen=True, slots=True)
class SampledSequence:
    """One completion.

    Attributes:
        prompt_index: Which prompt of the call it continues.
        text: The completion, without stop string and end token. Special tokens in its middle are shown as written.
        prompt_tokens: The prompt as the model saw it.
        tokens: The completion as sampled, end token included.
        logprobs: Per token, under the distribution sampled from (temperature, top_p, top_k applied).
        raw_logprobs: Per token, at temperature 1 over the whole vocabulary.
        finish_reason: "stop" (an end token; in a chat, what ends a turn of its template, too), "stop_string", "length",
            or "fixed" (`ignore_end`).
        seed: Of this row's random stream.
        entropy: Exact entropy of the distributions sampled from, in nats, mean over the tokens; None where the
            sampler does not say.
        top_logprobs: For each token, the most likely of its place as (token, raw logprob), the likeliest first; empty
            where they were not asked for.
    """

    prompt_index: int
    text: str
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    raw_logprobs: tuple[float, ...]
    finish_reason: str
    seed: int
    entropy: float | None = None
    top_logprobs: tuple[TopLogprobs, ...] = ()


@tagged("sample_result")
@dataclass(frozen=True, slots=True)
class SampleResult:
    """What `sample` drew.

    Attributes:
        sequences: `num_samples` for the first prompt, then for the second, and so on.
        policy_version: Version of the weights.
        prompt_logprobs: For each prompt, of each of its tokens, at temperature 1 over the whole vocabulary; None for
            the first, which nothing comes before. Empty where they were not asked for.
        top_prompt_logprobs: For each prompt, at each of its tokens, the most likely ones as (token, logprob), the
            likeliest first; none for the first. Empty where they were not asked for.
        precision: Of the weights that tokens were drawn with: "exact" (those that train), "bfloat16" or "int8", or
            "llama.cpp", of that engine's. All logprobs of the sequences are those that these weights gave;
            `compute_logprobs` has the trained ones'.
    """

    sequences: tuple[SampledSequence, ...]
    policy_version: int
    prompt_logprobs: tuple[tuple[float | None, ...], ...] = ()
    top_prompt_logprobs: tuple[tuple[TopLogprobs, ...], ...] = ()
    precision: str = "exact"

    @property
    def texts(self) -> list[str]:
        """The completions' texts, in order."""
        return [sequence.text for sequence in self.sequences]

    def _facts(self) -> Facts:
        texts = {f"text {number}": text for number, text in enumerate(self.texts[:8], 1)}
        return {"sequences": len(self.sequences), "policy_version": self.policy_version} | texts

    def __repr__(self) -> str:
        return f"<SampleResult {len(self.sequences)} sequences, policy_version {self.policy_version}>"


@tagged("sampled_piece")
@dataclass(frozen=True, slots=True)
class SampledPiece:
    """A piece of a completion, as it is drawn; the pieces of a sequence add up to it, in text and in tokens.

    Attributes:
        sequence: Which sequence of the result it continues.
        text: Further text; whole characters, and none that a stop string may still take away.
        tokens: Drawn since the piece before. The text of some may come with a later piece.
        logprobs: Of each, as in `SampledSequence`.
        raw_logprobs: Of each, as in `SampledSequence`.
        finish_reason: As in `SampledSequence`, with the last piece of a sequence; None before.
        top_logprobs: Of each token, as in `SampledSequence`.
    """

    sequence: int
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    raw_logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None
    top_logprobs: tuple[TopLogprobs, ...] = ()


def missing_pieces(pieces: Sequence[SampledPiece], result: SampleResult) -> list[SampledPiece]:
    """Return what the pieces told so far lack of the result's sequences, so that they add up to them."""
    missing = []
    for number, sequence in enumerate(result.sequences):
        told = [piece for piece in pieces if piece.sequence == number]
        said, first = "".join(piece.text for piece in told), sum(len(piece.tokens) for piece in told)
        text = sequence.text.removeprefix(said) if sequence.text.startswith(said) else ""
        if text or not told or told[-1].finish_reason is None:
            missing.append(
                SampledPiece(
                    number,
                    text,
                    sequence.tokens[first:],
                    sequence.logprobs[first:],
                    sequence.raw_logprobs[first:],
                    sequence.finish_reason,
                    sequence.top_logprobs[first:],
                )
            )
    return missing


@tagged("logprobs_result")
@dataclass(frozen=True, slots=True, eq=False)
class LogprobsResult:
    """Scores of a batch's labels; both arrays are (B, T) and 0 where nothing is labelled.

    Attributes:
        logprobs: Log-probability of each label.
        entropy: Exact entropy of the distribution at each labelled position, in nats.
        policy_version: Version of the weights; None for the reference.
        values: (B, T) of the value head; None without one.
    """

    logprobs: Array
    entropy: Array
    policy_version: int | None
    values: Array | None = None


@tagged("freeze_reference_result")
@dataclass(frozen=True, slots=True)
class FreezeReferenceResult:
    """The reference is set: `reference_version` is the version of the weights it holds."""

    reference_version: int


@tagged("read_adapter_result")
@dataclass(frozen=True, slots=True, eq=False)
class ReadAdapterResult:
    """The adapter as it is: float32, by PEFT's names, as in `adapter_model.safetensors`."""

    tensors: Mapping[str, Array]
    policy_version: int


@tagged("load_adapter_result")
@dataclass(frozen=True, slots=True)
class LoadAdapterResult:
    """What `load_adapter` took: `loaded` tensors; the weights have this version now."""

    loaded: int
    policy_version: int


@tagged("void_privacy_result")
@dataclass(frozen=True, slots=True)
class VoidPrivacyResult:
    """The guarantee is given up: `total_epsilon` is infinite from now on."""

    reason: str
    total_epsilon: float


@tagged("encryption")
@dataclass(frozen=True, slots=True)
class Encryption:
    """How an artifact is sealed, and the id of the key that opens it."""

    algorithm: str
    key_id: str


@tagged("save_state_result")
@dataclass(frozen=True, slots=True)
class SaveStateResult:
    """What `save_state` wrote, and what `list_artifacts` finds.

    Attributes:
        artifact_id: Names it everywhere; `load_state` takes it.
        artifact_type: "checkpoint".
        size_bytes: Of the sealed file.
        content_hash: "sha256:…" of header and sealed content; changing the key does not change it.
        encryption: Algorithm and key id.
        metadata: The user's own. None where this process has no key to read it.
        created_at: Unix seconds.
        name: The user's own. None without one, or without the key.
        step: Optimiser steps taken when it was saved.
        model_ref: The base model.
        saved_by: Id of the training client.
        dp_metrics: Of the last private step before it; None without differential privacy, and in listings.
        dropped_batches: Under differential privacy, batches of an unfinished step: their gradients carry no noise yet,
            so that they are not in the file.
    """

    artifact_id: str
    artifact_type: str
    size_bytes: int
    content_hash: str
    encryption: Encryption
    metadata: Mapping[str, Any] | None
    created_at: float
    name: str | None
    step: int
    model_ref: str
    saved_by: str
    dp_metrics: DPMetrics | None = None
    dropped_batches: int = 0


@tagged("load_state_result")
@dataclass(frozen=True, slots=True)
class LoadStateResult:
    """What `load_state` took.

    Attributes:
        loaded_artifact_id: The artifact.
        step: Optimiser steps taken by the state that is now loaded.
        status: "READY".
        optimizer_restored: Whether the artifact held the optimiser's moments; without them they start at zero.
        position: Where the run that saved it stood in its data; None outside a run.
    """

    loaded_artifact_id: str
    step: int
    status: str
    optimizer_restored: bool
    position: Mapping[str, Any] | None = None


@tagged("audit_log_entry")
@dataclass(frozen=True, slots=True)
class AuditLogEntry:
    """One record of the audit log: who did what when, chained to the record before it.

    Attributes:
        entry_id: Names the record.
        seq: Its number in the log, from 0.
        kind: "op", "key", "artifact" (deleted, imported, exported), "genesis"; of the privacy ledger "dp_charge",
            "dp_void", "dp_join", "import".
        tenant_id: Whose log it is.
        training_client_id: None for what no client did.
        operation: The verb.
        request_hash: Keyed hash of what was asked for: without the key nobody can test guesses about the data.
        request_size_bytes: Size of what was asked for.
        artifact_ids_produced: Artifacts written.
        artifact_ids_consumed: Artifacts read or deleted.
        started_at: Unix seconds.
        completed_at: Unix seconds.
        duration_ms: Between the two.
        success: Whether it completed.
        error_code: Of the error, or "cancelled".
        error_message: The class of the error; never its text, which could hold data.
        prev_hash: `record_hash` of the record before; 64 zeros in the first.
        record_hash: SHA-256 of this record.
        dp_metrics: Of a charge for a private step, by the names of `DPMetrics`; what epsilon does not cover is None,
            and so is an infinite epsilon. None for other records.
    """

    entry_id: str
    seq: int
    kind: str
    tenant_id: str
    training_client_id: str | None
    operation: str
    request_hash: str
    request_size_bytes: int
    artifact_ids_produced: tuple[str, ...]
    artifact_ids_consumed: tuple[str, ...]
    started_at: float
    completed_at: float
    duration_ms: float
    success: bool
    error_code: str | None
    error_message: str | None
    prev_hash: str
    record_hash: str
    dp_metrics: Mapping[str, Any] | None = None


@tagged("audit_verification")
@dataclass(frozen=True, slots=True)
class AuditVerification:
    """What verifying an audit log showed.

    Attributes:
        ok: Whether every check that could be made passed.
        records: Records checked.
        first_bad_seq: Number of the first record that does not fit; None when all do.
        reason: What is wrong with it, or None.
        head: `record_hash` of the last record: note it elsewhere, it is the anchor of the next verification.
        anchors_matched: The given anchors that are in the log.
        not_checked: Checks that could not be made, and what they need.
    """

    ok: bool
    records: int
    first_bad_seq: int | None
    reason: str | None
    head: str | None
    anchors_matched: tuple[str, ...] = ()
    not_checked: tuple[str, ...] = ()


Result: TypeAlias = (
    ForwardBackwardResult
    | ForwardResult
    | OptimStepResult
    | SampleResult
    | LogprobsResult
    | FreezeReferenceResult
    | ReadAdapterResult
    | LoadAdapterResult
    | SaveStateResult
    | LoadStateResult
    | VoidPrivacyResult
)


@tagged("state_source")
@dataclass(frozen=True, slots=True)
class StateSource:
    """The state that a training client starts from; the core finds it.

    Attributes:
        artifact_id: An artifact that is stored.
        future_id: Or a `save_state` of the training client `parent`, which may not have run yet.
        parent: The training client it is forked from, whose frozen weights it shares where it can; a client that is
            restored has none.
    """

    artifact_id: str | None = None
    future_id: str | None = None
    parent: str | None = None

    def __post_init__(self) -> None:
        if (self.artifact_id is None) == (self.future_id is None) or (self.future_id and self.parent is None):
            raise ValidationError(
                "A source is an artifact_id, or the future_id of a save_state with the parent that was asked for it."
            )


@tagged("training_client_info")
@dataclass(frozen=True, slots=True)
class TrainingClientInfo:
    """A training client as its core sees it at one moment.

    Attributes:
        training_client_id: Names it.
        model_ref: What it trains.
        status: Which of ClientStatus.
        step: Optimiser steps taken; of a client with a `source`, known once its model is loaded.
        queue_depth: Operations that wait or run.
        created_at: Unix seconds.
        reason: Why it is in ERROR.
        dp_metrics: What its last private step spent, and the total.
        device: Where it computes; None before the model is loaded, as are the next two.
        precision: In what it computes.
        context: How many tokens the model reads at most; also None without a limit.
        policy_version: Version of the weights.
        trained_parameters: How many numbers are trained; 0 before the model is loaded.
        source: Where it started; None afresh.
        away: Whether a server has put its model away, for nobody used it; the next operation brings it back.
    """

    training_client_id: str
    model_ref: str
    status: str
    step: int
    queue_depth: int
    created_at: float
    reason: str | None = None
    dp_metrics: DPMetrics | None = None
    device: str | None = None
    precision: str | None = None
    context: int | None = None
    policy_version: int = 0
    trained_parameters: int = 0
    source: StateSource | None = None
    away: bool = False


@tagged("step_estimate")
@dataclass(frozen=True, slots=True)
class StepEstimate:
    """What one training step will take: forward and backward over its rows, and the optimiser step.

    Attributes:
        batch_size: Rows of the step.
        length: Tokens of a row.
        micro_batches: Pieces that the engine computes one after the other.
        trained_parameters: Numbers that are trained.
        seconds_per_step: Seconds, on the machine as it is now, every position labelled, with `token_ce`.
        tokens_per_second: Tokens of the rows, padding included, per second.
        memory_bytes: Bytes of all tensors at the peak: weights, optimiser, gradients and activations.
        weight_bytes: Bytes of the model's weights, trained and frozen.
        gradient_bytes: Bytes of the gradients.
        optimizer_bytes: Bytes of the optimiser's moments.
        activation_bytes: Bytes that a micro-batch holds at the peak, beyond weights, moments and gradients.
        needed_bytes: Bytes of the peak that are not allocated yet.
        available_bytes: Bytes that can still be had on the device; None where the system does not say.
        precision: What the model computes in.
        device: Where.
    """

    batch_size: int
    length: int
    micro_batches: int
    trained_parameters: int
    seconds_per_step: float
    tokens_per_second: float
    memory_bytes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    needed_bytes: int
    available_bytes: int | None
    precision: str
    device: str


@tagged("run_result")
@dataclass(frozen=True, slots=True)
class RunResult:
    """How a training run ended.

    Attributes:
        run_id: `<training_client_id>/<n>`.
        state: FINISHED or STOPPED.
        steps: Optimiser steps this run took, those that a rollback gave up among them.
        metrics: The last value of every metric.
        reason: Why it did not go as planned, where it did not: the privacy budget was spent, the batches ended early,
            steps were taken at a learning rate of 0.
        steps_done: Where it stands in its plan: of a resumed run, counted from that run's beginning.
    """

    run_id: str
    state: str
    steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None
    steps_done: int = 0
