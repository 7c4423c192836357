"""The passes of one update over its batch: minibatches of whole prompt groups, a gradient and a step for each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensafe_nb.errors import TGTinkerError, ValidationError
from tensafe_nb.futures import FutureHandle, combine
from tensafe_nb.protocol.batch import Array, BatchData
from tensafe_nb.protocol.results import ForwardBackwardResult, LogprobsResult, OptimStepResult
from tensafe_nb.rlvr.algorithms import private
from tensafe_nb.rlvr.algorithms.advantages import token_weights
from tensafe_nb.rlvr.algorithms.options import PolicyConfig
from tensafe_nb.rlvr.algorithms.packing import entropy_of, group_numbers, pack, sampler_logprobs, unpack
from tensafe_nb.rlvr.algorithms.result import Move, UpdateResult, mock_notes, read_results, staleness
from tensafe_nb.rlvr.policy import PolicyClient
from tensafe_nb.rlvr.rollouts.trajectories import Trajectory, TrajectoryBatch

SPENT_ON_MEASURING = (
    0.02  # share of an update's passes that may go into measuring how far it moved the policy
)
GRADIENT = 3  # forward passes that a row's gradient costs: its own, and a backward pass of twice that
SAME_PATH = 2e-4  # approx_kl of the very first minibatch: more, and scoring and training disagree


@dataclass(slots=True)
class Readings:
    """What was read before the update, each (N, C) or None."""

    old: Array | None = None
    values: Array | None = None
    reference: Array | None = None


@dataclass(slots=True)
class Passes:
    """One update on its way: passes over minibatches of whole prompt groups."""

    config: PolicyConfig
    batch: TrajectoryBatch
    mask: Array
    readings: Readings
    returns: Array | None
    client: PolicyClient
    number: int
    is_private: bool = False

    def run(self, rows: Array, *, value_only: bool) -> FutureHandle[UpdateResult]:
        gradients: list[FutureHandle[ForwardBackwardResult]] = []
        steps: list[FutureHandle[OptimStepResult]] = []
        measure = None if value_only else self._begin_measuring(rows)
        weights = self._weights()
        epochs, stopped = 0, False
        for epoch in range(self.config.passes):
            if epoch and self._too_far():
                stopped = True
                break
            minibatches = self._minibatches(rows, epoch)
            # The mean gradient of a pass is that of the whole batch, in however many minibatches it is taken.
            scale = 1 if self.config.aggregation == "sum" else len(minibatches)
            for minibatch in minibatches:
                first = self.config.reads_old and not gradients
                data = self._data(minibatch, weights[minibatch] * scale, value_only)
                self._step(data, gradients, steps, value_only, first=first)
            epochs += 1
        scored = [] if measure is None else measure.after(self.client)
        # What is said of the batch is read now: rewards may be edited later.
        mean_reward, entropy, notes = (
            self.batch.mean_reward,
            entropy_of(self.batch),
            mock_notes(self.batch),
        )
        versions = [t.policy_version for t in self.batch if isinstance(t.policy_version, int)]
        count, known = len(gradients), self._explained() | left_out(self.batch, self.config)

        def read(results: list[Any]) -> UpdateResult:
            done: list[OptimStepResult] = results[count : 2 * count]
            began = done[0].policy_version - 1
            metrics, stale = staleness(versions, began, self.config.tis_cap)
            return read_results(
                results[:count],
                done,
                mean_reward=mean_reward,
                epochs_run=epochs,
                early_stopped=stopped,
                entropy=entropy,
                move=None if measure is None else measure.read(results[2 * count :], began),
                notes=notes + stale,
                metrics=known | metrics,
            )

        return combine([*gradients, *steps, *scored], read, operation="update", result_type=UpdateResult)

    def _begin_measuring(self, rows: Array) -> "Measurement | None":
        """Choose the rollouts on which the move is measured, and learn their log-probabilities before it.

        They come from what was read for the update, or from the sampler if it drew from these very weights, uncut.
        """
        rows = rows[self.mask[rows].any(1)]
        if not rows.size:
            return None
        trajectories, width, sampling = list(self.batch), self.mask.shape[1], self.batch.sampling
        old, read = self.readings.old, 0 if self.readings.old is None else len(trajectories)
        uncut, version = sampling.top_p == 1 and sampling.top_k == 0, None
        if (
            old is None
            and uncut
            and all(t.policy_version == self.client.policy_version for t in trajectories)
        ):
            old, version = sampler_logprobs(trajectories, width), self.client.policy_version
        budget = SPENT_ON_MEASURING * (GRADIENT * rows.size * self.config.passes + read)
        chosen = spread(self.batch, rows, max(1, int(budget) // (2 if old is None else 1)), self.number)
        data = pack([trajectories[row] for row in chosen], {})
        temperature = sampling.temperature
        before = self.client.compute_logprobs(data, temperature=temperature) if old is None else None
        return Measurement(
            [trajectories[row] for row in chosen],
            data,
            self.mask[chosen],
            temperature,
            _rows(old, chosen),
            None if old is None else version,
            before,
        )

    def _weights(self) -> Array:
        """Return the weights of all tokens in a step on the whole batch: scored rollouts count, with signal or not."""
        if self.is_private:
            return private.group_weights(self.batch, self.mask, self.config)
        scored = int(np.isfinite(self.batch.rewards).sum())
        limit = self.batch.sampling.max_new_tokens
        return token_weights(self.mask, self.config.aggregation, limit, scored)

    def _explained(self) -> dict[str, float]:
        """Return the share of the returns' variance that the value head foresaw: 1 is all, below 0 worse than none."""
        if self.returns is None or self.readings.values is None:
            return {}
        inside = self.mask > 0
        spread = self.returns[inside].var()
        if spread <= 0:
            return {}
        return {
            "value/explained_var": float(1 - (self.returns - self.readings.values)[inside].var() / spread)
        }

    def _step(
        self,
        data: BatchData,
        gradients: list[FutureHandle[ForwardBackwardResult]],
        steps: list[FutureHandle[OptimStepResult]],
        value_only: bool,
        *,
        first: bool,
    ) -> None:
        name, kwargs = self._loss(value_only)
        gradient = self.client.forward_backward(data, loss_fn=name, loss_kwargs=kwargs)
        try:
            if first and not value_only:
                check_same_path(gradient.result())
            steps.append(self.client.optim_step())
        except TGTinkerError:
            gradient.cancel()  # a full queue must not leave half an update behind
            raise
        gradients.append(gradient)

    def _loss(self, value_only: bool) -> tuple[str, dict[str, Any]]:
        head = self.config.value if self.returns is not None else None
        value = {} if head is None else {"value": {"coef": head.coef, "clip": head.clip}}
        if value_only:
            return "policy_value", value
        name, kwargs = self.config.loss_terms
        shared = {"temperature": self.batch.sampling.temperature, "entropy_coef": self.config.entropy_coef}
        return name, shared | kwargs | value

    def _minibatches(self, rows: Array, epoch: int) -> list[Array]:
        """Split the rows into minibatches of whole prompt groups, in an order of its own in every pass."""
        count = self.config.parts
        if count == 1:
            return [rows]
        groups = group_numbers(self.batch)
        order = np.random.default_rng([self.number, epoch]).permutation(np.unique(groups[rows]))
        parts = [rows[np.isin(groups[rows], part)] for part in np.array_split(order, count)]
        return [part for part in parts if part.size]

    def _data(self, rows: Array, weights: Array, value_only: bool) -> BatchData:
        trajectories, width = list(self.batch), self.mask.shape[1]
        chosen = [trajectories[row] for row in rows]
        extras: dict[str, Array | None] = {"weights": weights, "old_values": None}
        if self.returns is not None:
            extras |= {"returns": self.returns[rows], "old_values": _rows(self.readings.values, rows)}
        if not value_only:
            extras |= {
                "advantages": _advantage_rows(chosen, width),
                "old_logprobs": _rows(self.readings.old, rows),
                "ref_logprobs": _rows(self.readings.reference, rows),
                "sampler_logprobs": sampler_logprobs(chosen, width),
            }
        owners = private.record_ids(self.batch)[rows] if self.is_private else None
        present = {name: v for name, v in extras.items() if v is not None}
        return pack(chosen, present, numbers=rows, owners=owners)

    def _too_far(self) -> bool:
        """Measure KL(old ‖ new) over the whole batch, against the target. Nothing has to be thrown away for it."""
        if self.config.kl_limit is None or self.readings.old is None:
            return False
        rows = list(self.batch)
        scored = self.client.compute_logprobs(pack(rows, {}), temperature=self.batch.sampling.temperature)
        new = unpack(rows, scored.result().logprobs, self.mask.shape[1])
        difference = np.clip(new - self.readings.old, -20, 20)
        k3 = (np.expm1(difference) - difference) * self.mask
        return bool(k3.sum() / max(self.mask.sum(), 1.0) > 1.5 * self.config.kl_limit)


@dataclass(slots=True)
class Measurement:
    """The move of the policy over an update, on some of its rollouts."""

    trajectories: Sequence[Trajectory]
    data: BatchData
    mask: Array  # (S, C)
    temperature: float
    old: Array | None  # (S, C), where known before
    version: int | None  # whose they are, where the sampler told them
    before: FutureHandle[LogprobsResult] | None  # where they had to be asked for

    def after(self, client: PolicyClient) -> list[FutureHandle[LogprobsResult]]:
        """Queue the scoring under the new weights; return all that is to be waited for."""
        new = client.compute_logprobs(self.data, temperature=self.temperature)
        return [new] if self.before is None else [new, self.before]

    def read(self, scored: Sequence[LogprobsResult], began: int) -> Move:
        """Return KL(old ‖ new) = E[e^d − d − 1], d = log π_new − log π_old, and the largest |d|.

        Args:
            scored: What was waited for.
            began: Version of the weights that the update began with. If another update got in between, what the
                sampler told is not of these, and nothing was measured: NaN.
        """
        if self.version not in (None, began):
            return Move(math.nan, 0.0)
        new, *before = (unpack(self.trajectories, result.logprobs, self.mask.shape[1]) for result in scored)
        difference = (new - (before[0] if before else _needed(self.old))) * self.mask
        bounded = np.minimum(difference, 20)  # against overflow; far below 0 the term is linear
        k3 = ((np.expm1(bounded) - bounded) * self.mask).sum() / self.mask.sum()
        return Move(float(k3), float(np.abs(difference).max()))


def spread(batch: TrajectoryBatch, rows: Array, count: int, number: int) -> Array:
    """Return a systematic sample of rows: every n-th of those ordered by the sign of the advantage and by likelihood.

    What an update moves most are unlikely answers that it pushes down, least those it need not push. Ordered so, a
    tenth of the rows tells the KL about as well as a third drawn blindly.

    Args:
        batch: The rollouts, with their advantages.
        rows: Numbers of those to choose from.
        count: How many at most.
        number: Of the update: where in the order it starts.
    """
    trajectories = list(batch)
    signs = [float(np.mean(trajectories[row].advantage or 0.0)) > 0 for row in rows]
    likelihood = [sum(trajectories[row].logprobs or ()) for row in rows]
    order = rows[np.lexsort((likelihood, signs))]
    count = min(count, rows.size)
    start = np.random.default_rng([number, rows.size]).random()
    chosen: Array = order[((np.arange(count) + start) * rows.size / count).astype(np.int64)]
    return chosen


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


def _advantage_rows(trajectories: Sequence[Any], width: int) -> Array:
    found = np.zeros((len(trajectories), width))
    for row, trajectory in enumerate(trajectories):
        found[row, : len(trajectory.tokens)] = trajectory.advantage
    return found


def _needed(values: Array | None) -> Array:
    assert values is not None, "known before, or asked for"
    return values


def _rows(values: Array | None, rows: Array) -> Array | None:
    return None if values is None else values[rows]
