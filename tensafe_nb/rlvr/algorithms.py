"""From a scored batch to optimiser steps: read → advantages → weights → a batch with a named loss → step.

`REINFORCE` and `PPO` are one driver with other options. With one pass over fresh rollouts their gradients are equal.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from tensafe_nb.batch import Array, BatchData
from tensafe_nb.errors import TGTinkerError, ValidationError
from tensafe_nb.futures import FutureHandle, combine, completed
from tensafe_nb.rlvr import updates
from tensafe_nb.rlvr.advantages import (
    EMABaseline,
    advantages,
    at_the_end,
    gae,
    resolve_advantage,
    token_weights,
    whiten,
)
from tensafe_nb.rlvr.options import (
    PolicyConfig,
    PPOConfig,
    REINFORCEConfig,
    ValueOptions,
    preset,
    smallest_group,
)
from tensafe_nb.rlvr.rollouts import PolicyClient, TrajectoryBatch
from tensafe_nb.rlvr.updates import UpdateResult
from tensafe_nb.types import ForwardBackwardResult, OptimStepResult

SAME_PATH = 2e-4  # approx_kl of the very first minibatch: more, and scoring and training disagree
C = TypeVar("C", bound=PolicyConfig)


@dataclass(slots=True)
class _Readings:
    """What was read before the update, each (N, C) or None."""

    old: Array | None = None
    values: Array | None = None
    reference: Array | None = None


class Algorithm(Protocol):
    """What turns a scored batch into optimiser steps."""

    def update(self, batch: TrajectoryBatch, training_client: PolicyClient) -> FutureHandle[UpdateResult]: ...
    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class PolicyGradient(Generic[C]):
    """The driver of an update; `REINFORCE` and `PPO` say what its options are.

    Args:
        config: The options, or the name of a preset; or give its fields by name.
    """

    options: ClassVar[type[PolicyConfig]]

    def __init__(self, config: C | str | None = None, **fields: Any) -> None:
        chosen: Any = (
            preset(config, self.options)
            if isinstance(config, str)
            else self.options()
            if config is None
            else config
        )
        if not isinstance(chosen, self.options):
            raise ValidationError(
                f"{type(self).__name__} takes a {self.options.__name__}, a preset's name, or fields; not {config!r}."
            )
        settled: Any = chosen.replace(**fields) if fields else chosen
        self.config: C = settled
        self.ema = EMABaseline(self.config.ema_decay)
        self.updates = 0
        self._reference_of: str | None = (
            None  # the client whose reference is settled; "" after a resume: the next one
        )

    def __repr__(self) -> str:
        idle = self.config.idle_options
        return f"{type(self).__name__}({self.config!r})" + (
            f"  # no effect in this run: {', '.join(idle)}" if idle else ""
        )

    def update(self, batch: TrajectoryBatch, training_client: PolicyClient) -> FutureHandle[UpdateResult]:
        """Queue the steps on a scored batch. Returns when the last of them is queued.

        Fills in every trajectory's `advantage`. With nothing to learn from (all advantages 0, no entropy bonus, no
        KL, no value head) nothing is queued and no weight moves: the result says so in `skipped`.

        Args:
            batch: Rollouts with rewards.
            training_client: Whose weights to update.

        Raises:
            ValidationError: Nothing is scored, a group is too small for the baseline, or sampling was greedy.
        """
        method = self.config.method(batch, training_client.capabilities)
        self._check(batch, method)
        updates.tokenize_mock(batch, training_client)
        mask = updates.loss_mask(batch, self.config.mask_truncated)
        readings = self._read(batch, method, training_client)
        returns = self._fill_in_advantages(batch, method, mask, readings)
        rows = self._rows_that_matter(batch, mask, method)
        if not rows.size:
            return self._skip(batch, training_client)
        job = _Job(self.config, batch, mask, readings, returns, training_client, self.updates)
        warming = (
            returns is not None and self.config.value is not None and self.updates < self.config.value.warmup
        )
        handle = job.run(rows, value_only=warming)
        self.updates += 1
        return handle

    def state_dict(self) -> dict[str, Any]:
        """Return what it remembers from batch to batch, as plain data: the running baseline, the number of updates."""
        return {
            "total": self.ema.total,
            "ema_updates": self.ema.updates,
            "updates": self.updates,
            "has_reference": self._reference_of is not None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self.ema.total, self.ema.updates = float(state["total"]), int(state["ema_updates"])
        self.updates, self._reference_of = int(state["updates"]), "" if state["has_reference"] else None

    def _check(self, batch: TrajectoryBatch, method: str) -> None:
        if not np.isfinite(batch.rewards).any():
            raise ValidationError(
                "No trajectory of the batch has a reward: "
                "set `traj.reward = reward_fn(traj.prompt, traj.response)` before the update."
            )
        if batch.sampling.temperature == 0:
            raise ValidationError("Greedy rollouts (temperature=0) teach nothing: sample with temperature=1.")
        smallest = smallest_group(batch)
        if smallest < 2 and (method in ("rloo", "group") or self.config.effective_scale == "group"):
            raise ValidationError(
                f"baseline={method!r}, scale={self.config.effective_scale!r} compare the rollouts of a prompt, but a "
                f"group has {smallest}. Sample with group_size ≥ 2, or use a running mean: baseline='ema' "
                f"(of PPO: advantage='ema')."
            )

    def _read(self, batch: TrajectoryBatch, method: str, client: PolicyClient) -> _Readings:
        """Score the batch with the weights as they are, and with the reference, where the options need it."""
        config, width = self.config, max(int(batch.lengths.max()), 1)
        if not (config.reads_old or method == "gae" or config.kl_coef):
            return _Readings()
        rows, temperature = list(batch), batch.sampling.temperature
        data = updates.pack(rows, {})
        if config.kl_coef:
            self._settle_reference(client)
        own = client.compute_logprobs(data, temperature=temperature)
        other = (
            client.compute_logprobs(data, reference=True, temperature=temperature) if config.kl_coef else None
        )
        scored = own.result()
        if method == "gae" and scored.values is None:
            raise ValidationError(
                "advantage='gae' needs a value head: create the client with TrainingConfig(value_head=True)."
            )
        return _Readings(
            updates.unpack(rows, scored.logprobs, width)
            if config.reads_old or config.kl_in == "reward"
            else None,
            None if scored.values is None else updates.unpack(rows, scored.values, width),
            None if other is None else updates.unpack(rows, other.result().logprobs, width),
        )

    def _settle_reference(self, client: PolicyClient) -> None:
        """Freeze the policy as it is before the first update; an adapter that is still at zero has its base."""
        if self._reference_of == client.training_client_id:
            return
        fresh = client.step == 0 and "base_reference" in client.capabilities
        if self._reference_of != "" and not fresh:
            client.freeze_reference()
        self._reference_of = client.training_client_id

    def _fill_in_advantages(
        self, batch: TrajectoryBatch, method: str, mask: Array, readings: _Readings
    ) -> Array | None:
        """Set every trajectory's advantage; return the value head's targets (N, C), if it is to learn."""
        rewards, config, targets = batch.rewards, self.config, None
        penalty = None
        if config.kl_coef and config.kl_in == "reward" and readings.old is not None:
            penalty = config.kl_coef * (readings.old - _needed(readings.reference)) * mask  # k1 per token
        if method == "gae":
            per_token = at_the_end(rewards, mask) - (0.0 if penalty is None else penalty)
            head = config.value or ValueOptions()
            values, targets = gae(per_token, _needed(readings.values), mask, gamma=head.gamma, lam=head.lam)
            values = whiten(values, mask) if head.whiten else values
        elif method in ("none", "ema", "rloo", "group"):
            rewards = rewards if penalty is None else rewards - penalty.sum(1)
            groups = updates.group_numbers(batch)
            baseline: Any = method
            values = advantages(
                rewards, groups, baseline=baseline, scale=config.effective_scale, ema=self.ema
            )
        else:
            values = _custom(method, rewards, penalty, batch, mask)
        self.ema.update(batch.rewards)
        for trajectory, value in zip(batch, values, strict=True):
            trajectory.advantage = value[: len(trajectory.tokens)].tolist() if value.ndim else float(value)
        return targets

    def _rows_that_matter(self, batch: TrajectoryBatch, mask: Array, method: str) -> Array:
        """Return the rows of which some token has a gradient; the others only count in the normaliser."""
        always = self.config.entropy_coef > 0 or (self.config.kl_coef > 0 and self.config.kl_in == "loss")
        return np.flatnonzero(mask.any(1) & (has_advantage(batch) | always | (method == "gae")))

    def _skip(self, batch: TrajectoryBatch, client: PolicyClient) -> FutureHandle[UpdateResult]:
        cut = bool(has_advantage(batch).any())
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
            notes=updates.notes_on(batch),
        )
        return completed(result, operation="update", training_client_id=client.training_client_id)


class REINFORCE(PolicyGradient[REINFORCEConfig]):
    """Policy gradient with a baseline (Williams 1992): one optimiser step per batch.

    Args:
        config: The options, or a preset ("reinforce", "rloo", "reinforce_pp"); or give its fields by name.

    Example:
        >>> algo = REINFORCE(REINFORCEConfig(baseline="rloo"))
        >>> result = algo.update(batch, training_client)  # a handle, at once
        >>> result.param_delta_norm > 0
        True
    """

    options = REINFORCEConfig


class PPO(PolicyGradient[PPOConfig]):
    """Proximal policy optimisation (Schulman et al. 2017) with group or value-head advantages; GRPO and its kin.

    Args:
        config: The options, or a preset ("grpo", "dr_grpo", "cispo", "gspo", "ppo_value"); or its fields by name.

    Example:
        >>> algo = PPO("grpo", ppo_epochs=2, target_kl=0.01)
        >>> result = algo.update(batch, training_client)
        >>> result.epochs_run
        2
    """

    options = PPOConfig


@dataclass(slots=True)
class _Job:
    """One update on its way: passes over minibatches of whole prompt groups."""

    config: PolicyConfig
    batch: TrajectoryBatch
    mask: Array
    readings: _Readings
    returns: Array | None
    client: PolicyClient
    number: int

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
        return updates.pack(chosen, {name: v for name, v in extras.items() if v is not None}, numbers=rows)

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


def has_advantage(batch: TrajectoryBatch) -> Array:
    """Return (N,) whether a rollout has an advantage other than 0."""
    return np.array([bool(np.any(trajectory.advantage)) for trajectory in batch])


def _custom(name: str, rewards: Array, penalty: Array | None, batch: TrajectoryBatch, mask: Array) -> Array:
    given = rewards if penalty is None else at_the_end(rewards, mask) - penalty
    values = np.array(resolve_advantage(name)(given, updates.group_numbers(batch), mask), dtype=np.float64)
    if values.shape[:1] == (len(batch),):
        values[~np.isfinite(batch.rewards)] = 0.0
    if values.shape not in ((len(batch),), mask.shape) or not np.isfinite(values).all():
        raise ValidationError(
            f"The advantage {name!r} returned shape {values.shape} for {len(batch)} rollouts: return one finite number "
            f"per rollout, ({len(batch)},), or per token, {mask.shape}."
        )
    return values


def _advantage_rows(trajectories: Sequence[Any], width: int) -> Array:
    found = np.zeros((len(trajectories), width))
    for row, trajectory in enumerate(trajectories):
        found[row, : len(trajectory.tokens)] = trajectory.advantage
    return found


def _needed(values: Array | None) -> Array:
    assert values is not None, "read before it is used"
    return values


def _rows(values: Array | None, rows: Array) -> Array | None:
    return None if values is None else values[rows]
