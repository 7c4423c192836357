"""From a scored batch to an optimiser step: advantages → weights → a batch with a named loss → step."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
import pydantic

from tensafe_nb.batch import IGNORE, Array, BatchData
from tensafe_nb.config import Config
from tensafe_nb.errors import TGTinkerError, ValidationError
from tensafe_nb.futures import FutureHandle, combine, completed
from tensafe_nb.plain import plain
from tensafe_nb.rlvr.advantages import Aggregation, Baseline, EMABaseline, Scale, advantages, token_weights
from tensafe_nb.rlvr.rollouts import MOCK, PolicyClient, Trajectory, TrajectoryBatch
from tensafe_nb.types import ForwardBackwardResult, OptimStepResult

MOCK_NOTE = "off-policy: mock data"


class REINFORCEConfig(Config):
    """Options of REINFORCE (Williams 1992): one pass over fresh rollouts, gradient A · ∇log π.

    Args:
        baseline: What a reward is compared with: "rloo" the mean of the prompt's other rollouts, "group" the
            mean of all of them, "ema" a running mean of earlier batches, "none". Unset: rloo where every
            prompt has two rollouts or more, else ema.
        use_baseline: False is baseline="none".
        scale: Divide advantages by the standard deviation of the "group", of the "batch", or by nothing.
        normalize_advantages: True is scale="batch".
        aggregation: How tokens are weighed: "token_mean", "seq_mean", "const" (every rollout by the longest
            length there could have been: no bias towards short or long answers), or "sum".
        entropy_coef: Weight of the entropy bonus.
        mask_truncated: Leave rollouts that ran into the token limit out of the loss; their reward still
            counts in the baseline.
        ema_decay: Weight of the past in the "ema" baseline.
    """

    baseline: Baseline | None = None
    use_baseline: bool = True
    scale: Scale | None = None
    normalize_advantages: bool = False
    aggregation: Aggregation = "const"
    entropy_coef: pydantic.NonNegativeFloat = 0.0
    mask_truncated: bool = True
    ema_decay: float = pydantic.Field(default=0.9, ge=0.0, lt=1.0)

    @pydantic.model_validator(mode="after")
    def _options_agree(self) -> Self:
        if not self.use_baseline and self.baseline not in (None, "none"):
            raise ValueError(f"use_baseline=False contradicts baseline={self.baseline!r}: leave one out")
        if self.normalize_advantages and self.scale not in (None, "batch"):
            raise ValueError(f"normalize_advantages=True is scale='batch', not {self.scale!r}: leave one out")
        return self

    @property
    def effective_scale(self) -> Scale:
        """`scale`, with `normalize_advantages` taken into account."""
        return "batch" if self.normalize_advantages else self.scale or "none"

    def effective_baseline(self, smallest_group: int) -> Baseline:
        """`baseline`, chosen by the smallest group where it is unset."""
        if not self.use_baseline:
            return "none"
        return self.baseline or ("rloo" if smallest_group >= 2 else "ema")


@plain
@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What an update did.

    Attributes:
        step: The client's optimiser step after it.
        policy_version: Version of the weights after it.
        mean_reward: Over the scored rollouts.
        policy_loss: The weighted sum that was differentiated; not a measure of progress.
        entropy: Exact, in nats, mean over the tokens in the loss; None when nothing was computed.
        approx_kl: KL(old ‖ new), k3 estimate over the tokens in the loss; 0 in one pass over fresh data.
        clip_ratio: Share of tokens at which a clip acted; 0 where nothing clips.
        grad_norm: Before clipping.
        param_delta_norm: Norm of the change of the weights.
        tokens: Tokens in the loss.
        skipped: Why nothing was queued; None when a step was taken.
        notes: What to know about this update, such as "off-policy: mock data".
        metrics: Per-token means of the loss's own sums.
    """

    step: int
    policy_version: int
    mean_reward: float
    policy_loss: float = 0.0
    entropy: float | None = None
    approx_kl: float = 0.0
    clip_ratio: float = 0.0
    grad_norm: float = 0.0
    param_delta_norm: float = 0.0
    tokens: int = 0
    skipped: Literal["no signal", "all truncated"] | None = None
    notes: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


class REINFORCE:
    """Policy gradient with a baseline: `update(batch, training_client)` takes one optimiser step.

    Args:
        config: The options; or give its fields by name.

    Example:
        >>> algo = REINFORCE(REINFORCEConfig(baseline="rloo"))
        >>> result = algo.update(batch, training_client)  # a handle, at once
        >>> result.param_delta_norm > 0
        True
    """

    def __init__(self, config: REINFORCEConfig | None = None, **fields: Any) -> None:
        config = config or REINFORCEConfig()
        self.config = config.replace(**fields) if fields else config
        self.ema = EMABaseline(self.config.ema_decay)

    def __repr__(self) -> str:
        return f"REINFORCE({self.config!r})"

    def update(self, batch: TrajectoryBatch, training_client: PolicyClient) -> FutureHandle[UpdateResult]:
        """Queue one step on a scored batch; return at once.

        Fills in every trajectory's `advantage`. With nothing to learn from (all advantages 0 and no entropy
        bonus) nothing is queued and no weight moves: the result says so in `skipped`.

        Args:
            batch: Rollouts with rewards.
            training_client: Whose weights to update.

        Raises:
            ValidationError: Nothing is scored, a group is too small for the baseline, or sampling was greedy.
        """
        self._check(batch)
        tokenize_mock(batch, training_client)
        self._fill_in_advantages(batch)
        data = policy_batch(batch, self.config)
        if data is None:
            return self._skip(batch, training_client)
        return _step(batch, data, training_client, self._loss_kwargs(batch))

    def state_dict(self) -> dict[str, Any]:
        """Return what it remembers from batch to batch, as plain data: the running baseline."""
        return {"total": self.ema.total, "updates": self.ema.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self.ema.total, self.ema.updates = float(state["total"]), int(state["updates"])

    def _check(self, batch: TrajectoryBatch) -> None:
        if not np.isfinite(batch.rewards).any():
            raise ValidationError(
                "No trajectory of the batch has a reward: "
                "set `traj.reward = reward_fn(traj.prompt, traj.response)` before the update."
            )
        if batch.sampling.temperature == 0:
            raise ValidationError("Greedy rollouts (temperature=0) teach nothing: sample with temperature=1.")
        smallest = _smallest_group(batch)
        needs_two = self._baseline(batch) in ("rloo", "group") or self.config.effective_scale == "group"
        if needs_two and smallest < 2:
            raise ValidationError(
                f"baseline={self._baseline(batch)!r}, scale={self.config.effective_scale!r} compare the "
                f"rollouts of a prompt, but a group has {smallest}. Sample with group_size ≥ 2, or use "
                f"baseline='ema'."
            )

    def _baseline(self, batch: TrajectoryBatch) -> Baseline:
        return self.config.effective_baseline(_smallest_group(batch))

    def _fill_in_advantages(self, batch: TrajectoryBatch) -> None:
        groups = np.repeat(np.arange(len(batch.groups)), [len(group.rollouts) for group in batch.groups])
        baseline, scale, rewards = self._baseline(batch), self.config.effective_scale, batch.rewards
        values = advantages(rewards, groups, baseline=baseline, scale=scale, ema=self.ema)
        self.ema.update(rewards)
        for trajectory, value in zip(batch, values.tolist(), strict=True):
            trajectory.advantage = value

    def _loss_kwargs(self, batch: TrajectoryBatch) -> dict[str, float]:
        return {"temperature": batch.sampling.temperature, "entropy_coef": self.config.entropy_coef}

    def _skip(self, batch: TrajectoryBatch, client: PolicyClient) -> FutureHandle[UpdateResult]:
        cut = bool(_advantages(batch).any())
        if cut:
            warnings.warn(
                f"Every rollout that could teach something was cut at max_new_tokens="
                f"{batch.sampling.max_new_tokens}: no step was taken. Raise it, or pass mask_truncated=False.",
                stacklevel=3,
            )
        result = UpdateResult(
            client.step,
            client.policy_version,
            batch.mean_reward,
            skipped="all truncated" if cut else "no signal",
            notes=_notes(batch),
        )
        return completed(result, operation="update", training_client_id=client.training_client_id)


def tokenize_mock(batch: TrajectoryBatch, client: PolicyClient) -> None:
    """Give mock rollouts the tokens that the client's model would read; real ones keep their own.

    Raises:
        ValidationError: The tokenizer knows nothing of a text.
    """
    for trajectory in batch:
        if trajectory.policy_version == MOCK and not trajectory.tokens:
            end = [] if trajectory.truncated else [client.tokenizer.eos_token_id]
            trajectory.prompt_tokens = _encode(client, trajectory.prompt, special=True)
            trajectory.tokens = _encode(client, trajectory.response, special=False) + end


def _encode(client: PolicyClient, text: str, *, special: bool) -> list[int]:
    try:
        tokens = list(client.tokenizer(text, add_special_tokens=special)["input_ids"])
    except Exception as error:  # tokenizers raises bare Exception for letters it does not know
        raise ValidationError(f"The model's tokenizer cannot read {text!r}: {error}.") from error
    if not tokens:
        raise ValidationError(f"The model's tokenizer turns {text!r} into no tokens at all.")
    return tokens


def policy_batch(batch: TrajectoryBatch, config: REINFORCEConfig) -> BatchData | None:
    """Return the batch of a policy loss, or None when no token of it would have a gradient.

    Weights are computed over all rollouts; rows that cannot matter are then left out of the forward pass.
    """
    mask = _loss_mask(batch, config.mask_truncated)  # (N, C)
    weights = token_weights(mask, config.aggregation, batch.sampling.max_new_tokens)
    matters = mask.any(1) & ((_advantages(batch) != 0) | (config.entropy_coef > 0))
    kept = np.flatnonzero(matters)
    rows = list(batch)
    return pack([rows[row] for row in kept], weights[kept]) if kept.size else None


def pack(trajectories: Sequence[Trajectory], weights: Array) -> BatchData:
    """Lay trajectories out as rows, padded on the right.

    `labels[t]` is the token at t + 1, so a completion's first label sits at the prompt's last position, and
    its last token (the end token) is a label but never an input.

    Args:
        trajectories: B of them, with tokens and advantage.
        weights: (B, C) weight of each completion token.

    Returns:
        input_ids, attention_mask, labels, advantages and weights, each (B, T).
    """
    shape = (len(trajectories), max(len(t.prompt_tokens) + len(t.tokens) - 1 for t in trajectories))
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORE, np.int64)
    extras = {"advantages": np.zeros(shape), "weights": np.zeros(shape)}
    for row, trajectory in enumerate(trajectories):
        start, count = len(trajectory.prompt_tokens) - 1, len(trajectory.tokens)
        completion = slice(start, start + count)
        ids[row, : start + count] = [*trajectory.prompt_tokens, *trajectory.tokens[:-1]]
        mask[row, : start + count] = 1
        labels[row, completion] = trajectory.tokens
        extras["advantages"][row, completion] = trajectory.advantage
        extras["weights"][row, completion] = weights[row, :count]
    return BatchData(ids, mask, labels, extras)


def _loss_mask(batch: TrajectoryBatch, mask_truncated: bool) -> Array:
    """Return (N, C): 1 for completion tokens, the end token included, except those of truncated rollouts."""
    lengths = np.where([t.truncated and mask_truncated for t in batch], 0, batch.lengths)
    positions = np.arange(max(int(batch.lengths.max()), 1))
    return (positions < lengths[:, None]).astype(np.float64)


def _advantages(batch: TrajectoryBatch) -> Array:
    return np.array([trajectory.advantage for trajectory in batch], dtype=np.float64)


def _smallest_group(batch: TrajectoryBatch) -> int:
    return min((len(group.rollouts) for group in batch.groups), default=0)


def _notes(batch: TrajectoryBatch) -> tuple[str, ...]:
    return (MOCK_NOTE,) if any(trajectory.policy_version == MOCK for trajectory in batch) else ()


def _step(
    batch: TrajectoryBatch, data: BatchData, client: PolicyClient, loss_kwargs: Mapping[str, float]
) -> FutureHandle[UpdateResult]:
    gradient = client.forward_backward(data, loss_fn="policy_reinforce", loss_kwargs=loss_kwargs)
    try:
        step = client.optim_step()
    except TGTinkerError:
        gradient.cancel()  # a full queue must not leave half an update behind
        raise
    mean_reward, notes = batch.mean_reward, _notes(batch)  # as they are now: rewards may be edited later
    return combine(
        [gradient, step],
        lambda results: _result(results[0], results[1], mean_reward, notes),
        operation="update",
        result_type=UpdateResult,
    )


def _result(
    gradient: ForwardBackwardResult, step: OptimStepResult, mean_reward: float, notes: tuple[str, ...]
) -> UpdateResult:
    tokens = gradient.metrics["tokens"]
    sums = {name: total for name, total in gradient.metrics.items() if name.endswith("_sum")}
    means = {name.removesuffix("_sum"): total / tokens for name, total in sums.items()}
    return UpdateResult(
        step.step,
        step.policy_version,
        mean_reward,
        policy_loss=gradient.loss,
        entropy=means["entropy"],
        approx_kl=means.get("approx_kl", 0.0),
        clip_ratio=means.get("clipped", 0.0),
        grad_norm=step.grad_norm,
        param_delta_norm=step.param_delta_norm,
        tokens=int(tokens),
        notes=notes,
        metrics=means,
    )
