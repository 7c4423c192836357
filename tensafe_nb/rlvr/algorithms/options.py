"""The options of REINFORCE and PPO, what may go together, and what follows for an update."""

import warnings
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, Self

import pydantic

from tensafe_nb.config import Config, Positive
from tensafe_nb.display import as_given
from tensafe_nb.rlvr.algorithms.advantages import Aggregation, Baseline, Scale, resolve_advantage
from tensafe_nb.rlvr.rollouts.trajectories import TrajectoryBatch

NonNegative = pydantic.NonNegativeFloat


class PolicyConfig(Config):
    """What `REINFORCEConfig` and `PPOConfig` have in common.

    Args:
        scale: Divide advantages by the standard deviation of the "group", of the "batch", or by nothing.
        aggregation: How tokens are weighed: "token_mean", "seq_mean", "const" (every rollout by the longest
            length there could have been: no bias towards short or long answers), or "sum".
        entropy_coef: Weight of the entropy bonus, on the exact entropy.
        kl_coef: Weight of the KL divergence to the reference policy; 0 loads and computes none.
        kl_in: "reward" subtracts k1 from the reward (true reverse-KL gradient); "loss" adds a penalty per token.
        kl_estimator: In the loss: "k2" (reverse KL), or "k3" (its gradient descends the forward KL).
        tis_cap: Truncated importance sampling: multiply by min(π_old / π_sampler, cap).
        mask_truncated: Leave rollouts that ran into the token limit out of the loss; their reward still
            counts in the baseline.
        ema_decay: Weight of the past in the "ema" baseline.
        resample_zero_signal: How often `RLVRTrainer` replaces prompts without signal before an update, at most, as
            DAPO does: its `prompt_policy` becomes a `DynamicSampling`. An update by hand samples nothing.
        overlong: Share of `max_new_tokens` over which `RLVRTrainer` adds DAPO's soft punishment to the reward: 0 up to
            (1 − overlong) · max_new_tokens, from there falling to −1. 0 adds none.
    """

    scale: Scale | None = None
    aggregation: Aggregation = "const"
    entropy_coef: NonNegative = 0.0
    kl_coef: NonNegative = 0.0
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    tis_cap: pydantic.PositiveFloat | None = None
    mask_truncated: bool = True
    ema_decay: float = pydantic.Field(default=0.9, ge=0.0, lt=1.0)
    resample_zero_signal: pydantic.NonNegativeInt = 0
    overlong: float = pydantic.Field(default=0.0, ge=0.0, lt=1.0)

    @pydantic.model_validator(mode="after")
    def _kl_has_a_gradient(self) -> Self:
        # k1 = log π − log π_ref: its gradient is ∇log π, whose mean under π is 0.
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "k1 as a loss has no gradient in expectation: use kl_estimator='k2', or kl_in='reward'"
            )
        if self.kl_in == "reward" and self.kl_estimator in ("k2", "k3"):
            raise ValueError(f"kl_in='reward' takes k1; for {self.kl_estimator} use kl_in='loss'")
        # E[∇k3] = E[(1 − π_ref/π) ∇log π] is the gradient of KL(π_ref ‖ π), and E[∇k2] that of KL(π ‖ π_ref).
        if self.kl_estimator == "k3":
            warnings.warn(
                "k3 in the loss descends the forward KL(reference ‖ policy), as TRL's GRPO does; 'k2' the reverse one.",
                stacklevel=4,
            )
        return self

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Show what differs from the defaults."""
        fields = type(self).model_fields
        return ((name, value) for name, value in self if value != fields[name].default)

    @property
    def effective_scale(self) -> Scale:
        """`scale`, or "none"."""
        return self.scale or "none"

    @abstractmethod
    def method(self, batch: TrajectoryBatch, capabilities: frozenset[str]) -> str:
        """Return how advantages are computed for a batch: a baseline, "gae", or a registered name."""

    @property
    @abstractmethod
    def loss_terms(self) -> tuple[str, dict[str, Any]]:
        """The name of the loss, and its keywords."""

    @property
    def _shared_terms(self) -> dict[str, Any]:
        terms: dict[str, Any] = {} if self.tis_cap is None else {"tis_cap": self.tis_cap}
        if self.kl_coef and self.kl_in == "loss":
            terms["kl"] = {"coef": self.kl_coef, "estimator": self.kl_estimator or "k2"}
        return terms

    # what only PPO varies

    @property
    def passes(self) -> int:
        """Passes over a batch."""
        return 1

    @property
    def minibatch_count(self) -> int:
        """Minibatches per pass."""
        return 1

    @property
    def kl_limit(self) -> float | None:
        """KL(old ‖ new) above which no further pass begins."""
        return None

    @property
    def value(self) -> "ValueOptions | None":
        """How the value head is used and trained; None without one."""
        return None

    @property
    def reads_old(self) -> bool:
        """Whether the log-probabilities before the update have to be read: one pass knows its own."""
        return self.passes * self.minibatch_count > 1 or bool(self.kl_coef and self.kl_in == "reward")

    @property
    def idle_options(self) -> tuple[str, ...]:
        """Options that are set and cannot act in such a run."""
        return ()


class ValueOptions(Config):
    """The value head of PPO with advantage="gae": a scalar on detached hidden states.

    Args:
        gamma: Discount of a reward per token.
        lam: λ of the generalised advantage estimate; 1 is unbiased.
        coef: Weight of the value loss.
        clip: How far an estimate may move from the one before the update; None does not clip.
        warmup: First updates in which the value head learns alone.
        whiten: Give the advantages mean 0 and variance 1 over the batch.
    """

    gamma: float = pydantic.Field(default=1.0, gt=0.0, le=1.0)
    lam: float = pydantic.Field(default=1.0, ge=0.0, le=1.0)
    coef: pydantic.PositiveFloat = 0.5
    clip: pydantic.PositiveFloat | None = 0.2
    warmup: pydantic.NonNegativeInt = 5
    whiten: bool = True


class REINFORCEConfig(PolicyConfig):
    """Options of REINFORCE (Williams 1992): one pass over fresh rollouts, gradient A · ∇log π.

    Args:
        baseline: What a reward is compared with: "rloo" the mean of the prompt's other rollouts, "group" the
            mean of all of them, "ema" a running mean of earlier batches, "none". Unset: rloo where every
            prompt has two rollouts or more, else ema.
        use_baseline: False is baseline="none".
        normalize_advantages: True is scale="batch".
        advantage: A registered advantage instead of baseline and scale, such as "reinforce_pp".
        scale: Divide advantages by the standard deviation of the "group", of the "batch", or by nothing.
        aggregation: How tokens are weighed: "token_mean", "seq_mean", "const" (every rollout by the longest
            length there could have been: no bias towards short or long answers), or "sum".
        entropy_coef: Weight of the entropy bonus, on the exact entropy.
        kl_coef: Weight of the KL divergence to the reference policy; 0 loads and computes none.
        kl_in: "reward" (k1) or "loss".
        kl_estimator: In the loss: "k2", or "k3".
        tis_cap: Bound of π_old / π_sampler, which the loss is then multiplied by.
        mask_truncated: Leave rollouts that ran into the token limit out of the loss; their reward still
            counts in the baseline.
        ema_decay: Weight of the past in the "ema" baseline.
        resample_zero_signal: How often `RLVRTrainer` replaces prompts without signal before an update, at most.
        overlong: Share of `max_new_tokens` over which `RLVRTrainer` punishes long answers softly; of an environment's
            conversations, long turns.
    """

    baseline: Baseline | None = None
    use_baseline: bool = True
    normalize_advantages: bool = False
    advantage: str | None = None

    @pydantic.model_validator(mode="after")
    def _options_agree(self) -> Self:
        if not self.use_baseline and self.baseline not in (None, "none"):
            raise ValueError(
                f"use_baseline=False contradicts baseline={as_given(self.baseline)}: leave one out"
            )
        if self.normalize_advantages and self.scale not in (None, "batch"):
            raise ValueError(
                f"normalize_advantages=True is scale='batch', not {as_given(self.scale)}: leave one out"
            )
        if self.advantage is not None:
            _check_advantage(self.advantage, self.baseline, self.effective_scale)
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

    def method(self, batch: TrajectoryBatch, capabilities: frozenset[str]) -> str:
        return self.advantage or self.effective_baseline(smallest_group(batch))

    @property
    def loss_terms(self) -> tuple[str, dict[str, Any]]:
        return "policy_reinforce", self._shared_terms


class PPOConfig(PolicyConfig):
    """Options of PPO (Schulman et al. 2017, arXiv:1707.06347), and of GRPO and its kin.

    Args:
        advantage: "group" (rewards against the mean of their prompt's), "rloo", "gae" (with a value head), or a
            registered name. "auto": group where every prompt has two rollouts or more, else gae where the client has
            a value head, else a running mean.
        loss: "clip", or "cispo".
        ratio: Of new to old probabilities: per "token", or of the whole "sequence" (GSPO).
        clip_range: How far the ratio counts: a number for both sides, or (below, above); for cispo the smallest and
            the largest factor. None is (0.2, 0.28), for cispo (0, 5).
        dual_clip: Bound of the loss where the advantage is negative; None has no bound.
        ppo_epochs: Passes over a batch.
        minibatches: Parts of a pass, of whole prompt groups; one optimiser step each.
        target_kl: No further pass begins once KL(old ‖ new) per token is above 1.5 times this.
        value_head: How the value head is used and trained, with advantage="gae".
        scale: Divide advantages by the standard deviation of the "group", of the "batch", or by nothing.
        aggregation: How tokens are weighed: "token_mean", "seq_mean", "const", or "sum".
        entropy_coef: Weight of the entropy bonus, on the exact entropy.
        kl_coef: Weight of the KL divergence to the reference policy; 0 loads and computes none.
        kl_in: "reward" (k1) or "loss".
        kl_estimator: In the loss: "k2", or "k3".
        tis_cap: Bound of π_old / π_sampler, which the loss is then multiplied by.
        mask_truncated: Leave rollouts that ran into the token limit out of the loss.
        ema_decay: Weight of the past in the "ema" baseline.
        resample_zero_signal: How often `RLVRTrainer` replaces prompts without signal before an update, at most.
        overlong: Share of `max_new_tokens` over which `RLVRTrainer` punishes long answers softly; of an environment's
            conversations, long turns.
    """

    advantage: str = "auto"
    loss: Literal["clip", "cispo"] = "clip"
    ratio: Literal["token", "sequence"] = "token"
    clip_range: NonNegative | tuple[NonNegative, NonNegative] | None = None
    dual_clip: float | None = pydantic.Field(default=3.0, gt=1.0)
    ppo_epochs: Positive = 1
    minibatches: Positive = 1
    target_kl: pydantic.PositiveFloat | None = None
    value_head: ValueOptions = ValueOptions()

    @pydantic.model_validator(mode="after")
    def _options_agree(self) -> Self:
        if self.ratio == "sequence" and (self.advantage == "gae" or self.loss == "cispo"):
            raise ValueError(
                "ratio='sequence' needs advantages per rollout and loss='clip': not gae, not cispo"
            )
        if self.advantage == "gae" and self.effective_scale != "none":
            raise ValueError(
                f"scale={as_given(self.scale)} with advantage='gae': gae whitens by itself, leave scale out"
            )
        if self.loss == "cispo" and isinstance(self.clip_range, float):
            raise ValueError("loss='cispo' takes both bounds: clip_range=(smallest, largest), such as (0, 5)")
        low, high = self.bounds
        if self.loss == "cispo" and low >= high:
            raise ValueError(f"clip_range={self.clip_range}: the smallest factor must be below the largest")
        if self.loss == "clip" and low >= 1:
            raise ValueError(
                f"clip_range={self.clip_range}: the ratio cannot fall by {low}; below must be under 1"
            )
        if self.advantage not in ("auto", "group", "rloo", "gae", "ema", "none"):
            _check_advantage(self.advantage, None, self.effective_scale)
        return self

    def method(self, batch: TrajectoryBatch, capabilities: frozenset[str]) -> str:
        if self.advantage != "auto":
            return self.advantage
        if smallest_group(batch) >= 2:
            return "group"
        return "gae" if "value_head" in capabilities else "ema"

    @property
    def bounds(self) -> tuple[float, float]:
        """The clip range as two numbers."""
        if self.clip_range is None:  # "clip higher" (DAPO, arXiv:2503.14476); CISPO's own (arXiv:2506.13585)
            return (0.2, 0.28) if self.loss == "clip" else (0.0, 5.0)
        return self.clip_range if isinstance(self.clip_range, tuple) else (self.clip_range, self.clip_range)

    @property
    def loss_terms(self) -> tuple[str, dict[str, Any]]:
        low, high = self.bounds  # 1 − low ≤ ratio ≤ 1 + high; for cispo low ≤ ratio ≤ high
        if self.loss == "cispo":
            return "policy_cispo", {"ratio_min": low, "ratio_max": high, **self._shared_terms}
        clip = {"clip_low": low, "clip_high": high, "dual_clip": self.dual_clip, "ratio": self.ratio}
        return "policy_clip", clip | self._shared_terms

    @property
    def passes(self) -> int:
        return self.ppo_epochs

    @property
    def minibatch_count(self) -> int:
        return self.minibatches

    @property
    def kl_limit(self) -> float | None:
        return self.target_kl

    @property
    def value(self) -> ValueOptions:
        return self.value_head

    @property
    def idle_options(self) -> tuple[str, ...]:
        """In one pass over fresh data the ratio is 1: nothing clips, and no pass is left to stop before."""
        if self.passes * self.minibatch_count > 1:
            return ()
        can_act_later = ("clip_range", "ratio", "dual_clip", "target_kl")
        fields = type(self).model_fields
        return tuple(name for name in can_act_later if getattr(self, name) != fields[name].default)


def smallest_group(batch: TrajectoryBatch) -> int:
    """Return the number of rollouts of the prompt that has the fewest."""
    return min((len(group.rollouts) for group in batch.groups), default=0)


def _check_advantage(name: str, baseline: Baseline | None, scale: Scale) -> None:
    resolve_advantage(name)
    if baseline is not None or scale != "none":
        raise ValueError(f"advantage={as_given(name)} is computed as a whole: leave baseline and scale out")
