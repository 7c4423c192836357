"""The passes of one update over its batch: minibatches of whole prompt groups, a gradient and a step for each."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tensafe_nb.errors import TGTinkerError, ValidationError
from tensafe_nb.futures import FutureHandle, combine
from tensafe_nb.protocol.batch import Array, BatchData
from tensafe_nb.protocol.results import ForwardBackwardResult, OptimStepResult
from tensafe_nb.rlvr.algorithms import private
from tensafe_nb.rlvr.algorithms.advantages import token_weights
from tensafe_nb.rlvr.algorithms.measurement import NOT_MEASURED, Measurement, Pace
from tensafe_nb.rlvr.algorithms.options import PolicyConfig
from tensafe_nb.rlvr.algorithms.packing import entropy_of, group_numbers, pack, sampler_logprobs, unpack
from tensafe_nb.rlvr.algorithms.readings import Readings
from tensafe_nb.rlvr.algorithms.result import UpdateResult, mock_notes, read_results, staleness
from tensafe_nb.rlvr.policy import PolicyClient
from tensafe_nb.rlvr.rollouts.trajectories import TrajectoryBatch

FAST_TIS_CAP = 2.0  # of rollouts that other weights drew than those that train (Yao et al. 2025: C = 2)
SAME_PATH = 2e-4  # approx_kl of the very first minibatch: more, and scoring and training disagree
TOO_FAR = 1.5  # times target_kl: no further pass begins (as in OpenAI's Spinning Up)


@dataclass(slots=True)
class Passes:
    """One update on its way: passes over minibatches of whole prompt groups."""

    config: PolicyConfig
    batch: TrajectoryBatch  # N rollouts, the longest of C tokens
    mask: Array  # (N, C)
    readings: Readings
    returns: Array | None  # (N, C), what the value head is to learn
    client: PolicyClient
    number: int
    is_private: bool = False
    gradients: list[FutureHandle[ForwardBackwardResult]] = field(default_factory=list)
    steps: list[FutureHandle[OptimStepResult]] = field(default_factory=list)

    def run(self, rows: Array, pace: Pace, *, value_only: bool) -> FutureHandle[UpdateResult]:
        """Queue the passes over the rows that matter; return a handle on what they did.

        Args:
            rows: Numbers of the rollouts with a gradient.
            pace: Whether the move of the policy is measured.
            value_only: The value head learns alone.

        Raises:
            ValidationError: Scoring and training disagree before any weight has moved.
        """
        moving = rows[self.mask[rows].any(1)] if not value_only else rows[:0]
        measurement, unmeasured = self.measurement(moving, pace), NOT_MEASURED if moving.size else None
        epochs, stopped = self.queue(rows, value_only)
        scored = [] if measurement is None else measurement.after(self.client)
        # What is said of the batch is read now: rewards may be edited later.
        mean_reward, entropy, notes = self.batch.mean_reward, entropy_of(self.batch), mock_notes(self.batch)
        if self.tis_cap != self.config.tis_cap:
            notes += (f"sampled in {self.batch.sampling.drawn_in}, corrected by tis_cap={self.tis_cap:g}",)
        versions = [t.policy_version for t in self.batch if isinstance(t.policy_version, int)]
        known = self.explained_variance() | left_out(self.batch, self.config)
        count = len(self.gradients)

        def read(results: list[Any]) -> UpdateResult:
            done: list[OptimStepResult] = results[count : 2 * count]
            began = done[0].policy_version - 1
            metrics, stale = staleness(versions, began, self.tis_cap)
            return read_results(
                results[:count],
                done,
                mean_reward=mean_reward,
                epochs_run=epochs,
                early_stopped=stopped,
                entropy=entropy,
                move=unmeasured if measurement is None else measurement.read(results[2 * count :], began),
                notes=notes + stale,
                metrics=known | metrics,
            )

        waited: list[FutureHandle[Any]] = [*self.gradients, *self.steps, *scored]
        return combine(waited, read, operation="update", result_type=UpdateResult)

    @property
    def tis_cap(self) -> float | None:
        """The cap of the importance ratio π_old / π_sampler: what was asked for, else one wherever it is not 1."""
        if self.config.tis_cap is None and not self.batch.sampling.is_exact:
            return FAST_TIS_CAP
        return self.config.tis_cap

    def queue(self, rows: Array, value_only: bool) -> tuple[int, bool]:
        """Queue one pass after the other; return how many, and whether the policy had moved too far for a further."""
        weights = self.weights()
        for epoch in range(self.config.passes):
            if epoch and self.is_too_far():
                return epoch, True
            minibatches = self.minibatches(rows, epoch)
            # The mean gradient of a pass is that of the whole batch, in however many minibatches it is taken.
            scale = 1 if self.config.aggregation == "sum" else len(minibatches)
            for minibatch in minibatches:
                self.step(self.packed(minibatch, weights[minibatch] * scale, value_only), value_only)
        return self.config.passes, False

    def measurement(self, rows: Array, pace: Pace) -> Measurement | None:
        """Begin to measure how far the policy moves on these rows, where that is due."""
        passes, trajectories = self.config.passes, list(self.batch)
        tokens = sum(len(trajectories[row].prompt_tokens) + len(trajectories[row].tokens) for row in rows)
        if not rows.size or not pace.is_due(tokens * passes):
            return None
        old = self.readings.old
        return Measurement.begin(
            self.client, self.batch, self.mask, rows, old, passes=passes, number=self.number
        )

    def weights(self) -> Array:
        """Return (N, C) weights in a step on the whole batch: scored rollouts count, with signal or not."""
        if self.is_private:
            return private.group_weights(self.batch, self.mask, self.config)
        scored = int(np.isfinite(self.batch.rewards).sum())
        return token_weights(self.mask, self.config.aggregation, self.batch.longest, scored)

    def minibatches(self, rows: Array, epoch: int) -> list[Array]:
        """Split the rows into minibatches of whole prompt groups, in an order of its own in every pass."""
        count = self.config.minibatch_count
        if count == 1:
            return [rows]
        groups = group_numbers(self.batch)
        order = np.random.default_rng([self.number, epoch]).permutation(np.unique(groups[rows]))
        parts = [rows[np.isin(groups[rows], part)] for part in np.array_split(order, count)]
        return [part for part in parts if part.size]

    def packed(self, rows: Array, weights: Array, value_only: bool) -> BatchData:
        """Return a minibatch with all that its loss reads beside the tokens."""
        trajectories, width = list(self.batch), self.mask.shape[1]
        chosen = [trajectories[row] for row in rows]
        extras: dict[str, Array | None] = {"weights": weights}
        if self.returns is not None:
            extras |= {"returns": self.returns[rows], "old_values": _rows(self.readings.values, rows)}
        if not value_only:
            advantages = np.zeros((len(chosen), width))
            for row, trajectory in enumerate(chosen):
                advantages[row, : len(trajectory.tokens)] = trajectory.advantage
            extras |= {
                "advantages": advantages,
                "old_logprobs": _rows(self.readings.old, rows),
                "ref_logprobs": _rows(self.readings.reference, rows),
                "sampler_logprobs": sampler_logprobs(chosen, width),
            }
        owners = private.record_ids(self.batch)[rows] if self.is_private else None
        present = {name: values for name, values in extras.items() if values is not None}
        return pack(chosen, present, numbers=rows, owners=owners)

    def step(self, data: BatchData, value_only: bool) -> None:
        """Queue the gradient of a minibatch, and the step on it."""
        head = self.config.value if self.returns is not None else None
        value = {} if head is None else {"value": {"coef": head.coef, "clip": head.clip}}
        name, kwargs = "policy_value", value
        if not value_only:
            name, terms = self.config.loss_terms
            shared = {
                "temperature": self.batch.sampling.temperature,
                "entropy_coef": self.config.entropy_coef,
            }
            capped = {} if self.tis_cap is None else {"tis_cap": self.tis_cap}
            kwargs = shared | terms | capped | value
        gradient = self.client.forward_backward(data, loss_fn=name, loss_kwargs=kwargs)
        try:
            if self.config.reads_old and not self.gradients and not value_only:
                check_same_path(gradient.result())
            self.steps.append(self.client.optim_step())
        except TGTinkerError:
            gradient.cancel()  # a full queue must not leave half an update behind
            raise
        self.gradients.append(gradient)

    def is_too_far(self) -> bool:
        """Measure KL(old ‖ new) over the whole batch, against the target. Nothing has to be thrown away for it."""
        if self.config.kl_limit is None or self.readings.old is None:
            return False
        rows, temperature = list(self.batch), self.batch.sampling.temperature
        scored = self.client.compute_logprobs(pack(rows, {}), temperature=temperature).result()
        new = unpack(rows, scored.logprobs, self.mask.shape[1])
        difference = np.clip(new - self.readings.old, -20, 20)
        k3 = (np.expm1(difference) - difference) * self.mask
        return bool(k3.sum() / max(self.mask.sum(), 1.0) > TOO_FAR * self.config.kl_limit)

    def explained_variance(self) -> dict[str, float]:
        """Return 1 − Var(R − V) / Var(R): 1 where the value head foresaw all returns, below 0 if worse than none."""
        if self.returns is None or self.readings.values is None:
            return {}
        inside = self.mask > 0
        variance = self.returns[inside].var()
        if variance <= 0:
            return {}
        missed = (self.returns - self.readings.values)[inside].var()
        return {"value/explained_var": float(1 - missed / variance)}


def left_out(batch: TrajectoryBatch, config: PolicyConfig) -> dict[str, float]:
    """Return the share of the rollouts that the loss leaves out because they were cut."""
    return {"completions/masked_ratio": batch.clipped_ratio if config.mask_truncated else 0.0}


def check_same_path(result: ForwardBackwardResult) -> None:
    """Refuse to go on where scoring and training give the same weights different log-probabilities.

    Raises:
        ValidationError: They do, before any weight has moved.
    """
    approx_kl = result.metrics["approx_kl_sum"] / max(result.metrics["tokens"], 1.0)
    if approx_kl > SAME_PATH:
        raise ValidationError(
            f"The scoring path differs from the training path: before any step, KL(old ‖ new) is {approx_kl:.2g} per "
            f"token where it must be 0. Dropout does this: set LoRAConfig(dropout=0) for reinforcement learning."
        )


def _rows(values: Array | None, rows: Array) -> Array | None:
    return None if values is None else values[rows]
