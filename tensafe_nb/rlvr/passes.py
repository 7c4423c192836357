"""The passes of one update over its batch: minibatches of whole prompt groups, a gradient and a step for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tensafe_nb.batch import Array, BatchData
from tensafe_nb.errors import TGTinkerError, ValidationError
from tensafe_nb.futures import FutureHandle, combine
from tensafe_nb.rlvr import private, updates
from tensafe_nb.rlvr.advantages import token_weights
from tensafe_nb.rlvr.options import PolicyConfig
from tensafe_nb.rlvr.rollouts import PolicyClient, TrajectoryBatch
from tensafe_nb.rlvr.updates import UpdateResult
from tensafe_nb.types import ForwardBackwardResult, OptimStepResult

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
        epochs, stopped = 0, False
        for epoch in range(self.config.passes):
            if epoch and self._too_far():
                stopped = True
                break
            for minibatch in self._minibatches(rows, epoch):
                first = self.config.reads_old and not gradients
                self._step(self._data(minibatch, value_only), gradients, steps, value_only, first=first)
            epochs += 1
        mean_reward, notes = (
            self.batch.mean_reward,
            updates.notes_on(self.batch),
        )  # rewards may be edited later
        count, explained = len(gradients), self._explained()
        return combine(
            [*gradients, *steps],
            lambda results: updates.read_results(
                results[:count],
                results[count:],
                mean_reward=mean_reward,
                epochs_run=epochs,
                early_stopped=stopped,
                notes=notes,
                metrics=explained,
            ),
            operation="update",
            result_type=UpdateResult,
        )

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
        groups = updates.group_numbers(self.batch)
        order = np.random.default_rng([self.number, epoch]).permutation(np.unique(groups[rows]))
        parts = [rows[np.isin(groups[rows], part)] for part in np.array_split(order, count)]
        return [part for part in parts if part.size]

    def _data(self, rows: Array, value_only: bool) -> BatchData:
        whole = self.config.parts == 1  # the normaliser counts every rollout of the optimiser step
        counted = np.arange(len(self.batch)) if whole else rows
        if self.is_private:
            weights = private.group_weights(self.batch, self.mask, self.config)
        else:
            weights = np.zeros(self.mask.shape)
            weights[counted] = token_weights(
                self.mask[counted], self.config.aggregation, self.batch.sampling.max_new_tokens
            )
        trajectories, width = list(self.batch), self.mask.shape[1]
        chosen = [trajectories[row] for row in rows]
        extras: dict[str, Array | None] = {"weights": weights[rows], "old_values": None}
        if self.returns is not None:
            extras |= {"returns": self.returns[rows], "old_values": _rows(self.readings.values, rows)}
        if not value_only:
            extras |= {
                "advantages": _advantage_rows(chosen, width),
                "old_logprobs": _rows(self.readings.old, rows),
                "ref_logprobs": _rows(self.readings.reference, rows),
                "sampler_logprobs": updates.sampler_logprobs(chosen, width),
            }
        owners = private.record_ids(self.batch)[rows] if self.is_private else None
        present = {name: v for name, v in extras.items() if v is not None}
        return updates.pack(chosen, present, numbers=rows, owners=owners)

    def _too_far(self) -> bool:
        """Measure KL(old ‖ new) over the whole batch, against the target. Nothing has to be thrown away for it."""
        if self.config.kl_limit is None or self.readings.old is None:
            return False
        rows = list(self.batch)
        scored = self.client.compute_logprobs(
            updates.pack(rows, {}), temperature=self.batch.sampling.temperature
        )
        new = updates.unpack(rows, scored.result().logprobs, self.mask.shape[1])
        difference = np.clip(new - self.readings.old, -20, 20)
        k3 = (np.expm1(difference) - difference) * self.mask
        return bool(k3.sum() / max(self.mask.sum(), 1.0) > 1.5 * self.config.kl_limit)


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


def _rows(values: Array | None, rows: Array) -> Array | None:
    return None if values is None else values[rows]
