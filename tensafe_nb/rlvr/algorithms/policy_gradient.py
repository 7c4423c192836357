"""From a scored batch to optimiser steps: read → advantages → weights → a batch with a named loss → step.

`REINFORCE` and `PPO` are one driver with other options. With one pass over fresh rollouts their gradients are equal.
"""

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.futures import FutureHandle, completed
from tensafe_nb.protocol.batch import Array
from tensafe_nb.rlvr.algorithms import private
from tensafe_nb.rlvr.algorithms.advantages import (
    EMABaseline,
    advantages,
    at_the_end,
    by_turn,
    gae,
    resolve_advantage,
    whiten,
)
from tensafe_nb.rlvr.algorithms.measurement import Pace
from tensafe_nb.rlvr.algorithms.options import (
    PolicyConfig,
    PPOConfig,
    REINFORCEConfig,
    ValueOptions,
)
from tensafe_nb.rlvr.algorithms.packing import entropy_of, group_numbers, loss_mask, tokenize_mock
from tensafe_nb.rlvr.algorithms.passes import Passes, left_out
from tensafe_nb.rlvr.algorithms.presets import options_of, preset
from tensafe_nb.rlvr.algorithms.readings import Readings, check_batch
from tensafe_nb.rlvr.algorithms.result import UpdateResult, mock_notes
from tensafe_nb.rlvr.policy import PRIVATE, PolicyClient
from tensafe_nb.rlvr.rollouts.trajectories import TrajectoryBatch, has_advantage

C = TypeVar("C", bound=PolicyConfig)


class Algorithm(Protocol):
    """What turns a scored batch into optimiser steps."""

    def update(self, batch: TrajectoryBatch, training_client: PolicyClient) -> FutureHandle[UpdateResult]: ...
    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


AlgorithmSpec: TypeAlias = Algorithm | PolicyConfig | str


@runtime_checkable
class RemembersRewards(Protocol):
    """An algorithm that learned something of the rewards it has seen, and can let go of it."""

    def forget_reward(self) -> None: ...


class PolicyGradient(Generic[C]):
    """The driver of an update; `REINFORCE` and `PPO` say what its options are.

    Args:
        config: The options, or the name of a preset; or give its fields by name.
    """

    options: ClassVar[type[PolicyConfig]]

    def __init__(self, config: C | str | None = None, **fields: Any) -> None:
        chosen: Any = self.options() if config is None else config
        if isinstance(config, str):
            chosen = preset(config, self.options)
        if not isinstance(chosen, self.options):
            raise ValidationError(
                f"{type(self).__name__} takes a {self.options.__name__}, a preset's name, or fields; not "
                f"{as_given(config)}."
            )
        settled: Any = chosen.replace(**fields) if fields else chosen
        self.config: C = settled
        self.ema = EMABaseline(self.config.ema_decay)
        self.pace = Pace()
        self.updates = 0
        self.head_updates = 0  # since the value head began on the present reward
        # The client whose reference is settled; "" after a resume: the next one.
        self._reference_of: str | None = None

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
        if not isinstance(batch, TrajectoryBatch):
            raise ValidationError(f"update: batch is a TrajectoryBatch, not {as_given(batch)}.")
        if not hasattr(training_client, "policy_version"):
            raise ValidationError(
                f"update: training_client={as_given(training_client)} must be a training client: "
                f"service.create_training_client(…) makes one."
            )
        config, method = self.config, self.config.method(batch, training_client.capabilities)
        check_batch(config, batch, method)
        is_private = PRIVATE in training_client.capabilities
        if is_private:
            private.check_options(config, method, training_client.capabilities)
        tokenize_mock(batch, training_client)
        mask = loss_mask(batch, config.mask_truncated)  # (N, C)
        if config.kl_coef:
            self._settle_reference(training_client)
        readings = Readings.of(config, batch, method, training_client)
        returns = assign_advantages(config, batch, method, mask, readings, self.ema)
        rows = np.arange(len(batch))
        if not is_private:  # rows without a gradient only count in the normaliser
            always = config.entropy_coef > 0 or (config.kl_coef > 0 and config.kl_in == "loss")
            rows = np.flatnonzero(mask.any(1) & (have_advantage(batch) | always | (method == "gae")))
        if not rows.size:
            return skipped_update(batch, training_client, config)
        job = Passes(config, batch, mask, readings, returns, training_client, self.updates, is_private)
        head = config.value if returns is not None else None
        handle = job.run(rows, self.pace, value_only=head is not None and self.head_updates < head.warmup)
        self.updates += 1
        self.head_updates += 1
        return handle

    def forget_reward(self) -> None:
        """Let go of what another reward has taught: the running baseline; a value head warms up anew."""
        self.ema = EMABaseline(self.config.ema_decay)
        self.head_updates = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what it remembers from batch to batch, as plain data: the running baseline, the number of updates."""
        return {
            "total": self.ema.total,
            "ema_updates": self.ema.updates,
            "updates": self.updates,
            "head_updates": self.head_updates,
            "has_reference": self._reference_of is not None,
            "unmeasured": [self.pace.tokens, self.pace.updates],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self.ema.total, self.ema.updates = float(state["total"]), int(state["ema_updates"])
        self.updates, self._reference_of = int(state["updates"]), "" if state["has_reference"] else None
        # Older checkpoints have one count for both, and none of what was not measured.
        self.head_updates = int(state.get("head_updates", self.updates))
        self.pace = Pace(*map(int, state["unmeasured"])) if "unmeasured" in state else Pace()

    def _settle_reference(self, client: PolicyClient) -> None:
        """Freeze the policy as it is before the first update; an adapter that is still at zero has its base."""
        if self._reference_of == client.training_client_id:
            return
        fresh = client.step == 0 and "base_reference" in client.capabilities
        if self._reference_of != "" and not fresh:
            client.freeze_reference()
        self._reference_of = client.training_client_id


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
        config: The options, or a preset ("grpo", "dr_grpo", "dapo", "cispo", "gspo", "ppo_value"); or fields by name.

    Example:
        >>> algo = PPO("grpo", ppo_epochs=2, target_kl=0.01)
        >>> result = algo.update(batch, training_client)
        >>> result.epochs_run
        2
    """

    options = PPOConfig


def algorithm_of(spec: AlgorithmSpec | None) -> Algorithm:
    """Return the algorithm that a name, options or the algorithm itself stand for; REINFORCE for None.

    Raises:
        ValidationError: An unknown name, or something else.
    """
    options = options_of(spec) if isinstance(spec, str) else spec
    match options:
        case None:
            return REINFORCE()
        case PPOConfig():
            return PPO(options)
        case REINFORCEConfig():
            return REINFORCE(options)
    if isinstance(options, type | PolicyConfig | Mapping) or not hasattr(options, "update"):
        raise ValidationError(
            f"RLVRTrainer: algo is an algorithm such as REINFORCE(), PPO(…), or a name such as 'grpo', not "
            f"{as_given(spec)}."
        )
    return options


def assign_advantages(
    config: PolicyConfig,
    batch: TrajectoryBatch,
    method: str,
    mask: Array,
    readings: Readings,
    ema: EMABaseline,
) -> Array | None:
    """Set every trajectory's advantage; return the value head's targets (N, C), if it is to learn."""
    rewards, penalty, targets = batch.rewards, None, None  # (N,)
    if config.kl_coef and config.kl_in == "reward" and readings.old is not None:
        penalty = readings.penalty(config.kl_coef, mask)  # (N, C)
    if method == "gae":
        assert readings.values is not None, "read before it is used"
        per_token = by_turn(rewards, batch, mask) - (0.0 if penalty is None else penalty)
        head = config.value or ValueOptions()
        values, targets = gae(per_token, readings.values, mask, gamma=head.gamma, lam=head.lam)
        values = whiten(values, mask) if head.whiten else values  # (N, C)
    elif method in ("none", "ema", "rloo", "group"):
        rewards = rewards if penalty is None else rewards - penalty.sum(1)
        baseline: Any = method
        values = advantages(
            rewards, group_numbers(batch), baseline=baseline, scale=config.effective_scale, ema=ema
        )
    else:
        given = rewards if penalty is None else at_the_end(rewards, mask) - penalty
        values = registered_advantages(method, given, batch, mask)
    # With the penalty inside, if there is one: it is what the next batches are compared with.
    ema.update(rewards)
    for trajectory, value in zip(batch, values, strict=True):
        trajectory.advantage = value[: len(trajectory.tokens)].tolist() if value.ndim else float(value)
    return targets


def registered_advantages(name: str, rewards: Array, batch: TrajectoryBatch, mask: Array) -> Array:
    """Return what a registered function makes of rewards (N,) or (N, C); unscored rollouts get 0.

    Raises:
        ValidationError: It returned another shape, or what is no number.
    """
    values = np.array(resolve_advantage(name)(rewards, group_numbers(batch), mask), dtype=np.float64)
    if values.shape[:1] == (len(batch),):
        values[~np.isfinite(batch.rewards)] = 0.0
    if values.shape not in ((len(batch),), mask.shape) or not np.isfinite(values).all():
        raise ValidationError(
            f"The advantage {as_given(name)} returned shape {values.shape} for {len(batch)} rollouts: return one "
            f"finite number per rollout, ({len(batch)},), or per token, {mask.shape}."
        )
    return values


def have_advantage(batch: TrajectoryBatch) -> Array:
    """Return (N,) whether a rollout has an advantage other than 0."""
    return np.array(list(map(has_advantage, batch)))


def skipped_update(
    batch: TrajectoryBatch, client: PolicyClient, config: PolicyConfig
) -> FutureHandle[UpdateResult]:
    """Return the result of an update that took no step, since nothing in the batch teaches."""
    cut = bool(have_advantage(batch).any())
    if cut:
        warnings.warn(
            f"Every rollout that could teach something was cut at max_new_tokens={batch.sampling.max_new_tokens}: no "
            f"step was taken. Raise it, or pass mask_truncated=False.",
            stacklevel=3,
        )
    result = UpdateResult(
        client.step,
        client.policy_version,
        batch.mean_reward,
        entropy=entropy_of(batch),
        skipped="all truncated" if cut else "no signal",
        notes=mock_notes(batch),
        metrics=left_out(batch, config),
    )
    return completed(result, operation="update", training_client_id=client.training_client_id)
