"""Readings before an update's first step: whether the batch can teach, and its log-probabilities and values."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.batch import Array
from tensafe_nb.rlvr.algorithms.options import PolicyConfig, smallest_group
from tensafe_nb.rlvr.algorithms.packing import pack, unpack
from tensafe_nb.rlvr.policy import PolicyClient
from tensafe_nb.rlvr.rollouts.trajectories import TrajectoryBatch


@dataclass(slots=True)
class Readings:
    """What was read before the update, each (N, C) or None."""

    old: Array | None = None
    values: Array | None = None
    reference: Array | None = None

    @classmethod
    def of(cls, config: PolicyConfig, batch: TrajectoryBatch, method: str, client: PolicyClient) -> Self:
        """Score the batch with the weights as they are, and with the reference, where the options need it.

        Raises:
            ValidationError: A value head is needed, and there is none.
        """
        width, temperature = max(int(batch.widths.max()), 1), batch.sampling.temperature
        if not (config.reads_old or method == "gae" or config.kl_coef):
            return cls()
        rows = list(batch)
        data = pack(rows, {})
        own = client.compute_logprobs(data, temperature=temperature)
        other = None
        if config.kl_coef:
            other = client.compute_logprobs(data, reference=True, temperature=temperature)
        scored = own.result()
        if method == "gae" and scored.values is None:
            raise ValidationError(
                "advantage='gae' needs a value head: create the client with TrainingConfig(value_head=True)."
            )
        read = cls()
        if config.reads_old or config.kl_in == "reward":
            read.old = unpack(rows, scored.logprobs, width)
        if scored.values is not None:
            read.values = unpack(rows, scored.values, width)
        if other is not None:
            read.reference = unpack(rows, other.result().logprobs, width)
        return read

    def penalty(self, coefficient: float, mask: Array) -> Array:
        """Return (N, C) the KL penalty of every token: β (log π_old − log π_ref), the k1 estimate (Schulman 2020)."""
        assert self.old is not None and self.reference is not None, "read before it is used"
        penalty: Array = coefficient * (self.old - self.reference) * mask
        return penalty


def check_batch(config: PolicyConfig, batch: TrajectoryBatch, method: str) -> None:
    """Refuse a batch that teaches nothing, or that lacks what the options need.

    Raises:
        ValidationError: Says what to change.
    """
    for trajectory, reward in zip(batch, batch.rewards, strict=True):  # tensors and the like become numbers
        trajectory.reward = None if trajectory.reward is None else float(reward)
    if not np.isfinite(batch.rewards).any():
        raise ValidationError(
            "No trajectory of the batch has a reward: "
            "set `traj.reward = reward_fn(traj.prompt, traj.response)` before the update."
        )
    if batch.sampling.temperature == 0:
        raise ValidationError("Greedy rollouts (temperature=0) teach nothing: sample with temperature=1.")
    told = all(t.logprobs is not None and len(t.logprobs) == len(t.tokens) for t in batch)
    if config.tis_cap is not None and not told:
        raise ValidationError(
            f"tis_cap={config.tis_cap:g} compares the policy with what the sampler said, and there are rollouts "
            f"without the sampler's log-probabilities (trajectory.logprobs): bring them, or leave out tis_cap."
        )
    smallest = smallest_group(batch)
    if smallest < 2 and (method in ("rloo", "group") or config.effective_scale == "group"):
        raise ValidationError(
            f"baseline={as_given(method)}, scale={as_given(config.effective_scale)} compare the rollouts of a prompt, "
            f"but a group has {smallest}. Sample with group_size ≥ 2, or use a running mean: baseline='ema' "
            f"(of PPO: advantage='ema')."
        )
