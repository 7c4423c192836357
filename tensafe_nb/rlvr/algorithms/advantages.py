"""From rewards to advantages, and from masks to weights. NumPy only: it runs beside a remote core as well.

Rewards are (N,) float64, NaN where unscored; `groups` (N,) says which prompt a rollout belongs to. An
unscored rollout has advantage 0 and is left out of every mean and standard deviation.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from tensafe_nb.checks import checked
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.batch import Array, array_of
from tensafe_nb.registry import Registry
from tensafe_nb.rlvr.rollouts.trajectories import NO_SIGNAL, Trajectory, bessel_std

AdvantageFunction: TypeAlias = Callable[..., Array]
Baseline: TypeAlias = Literal["none", "ema", "rloo", "group"]
Scale: TypeAlias = Literal["none", "group", "batch"]
Aggregation: TypeAlias = Literal["token_mean", "seq_mean", "const", "sum"]
STD_EPS = 1e-4  # TRL's; verl adds 1e-6, OpenRLHF 1e-9


_ADVANTAGES: Registry[AdvantageFunction] = Registry("advantage")


def register_advantage(
    name: str, *, overwrite: bool = False
) -> Callable[[AdvantageFunction], AdvantageFunction]:
    """Return a decorator that registers `fn(rewards, groups, mask)` as a way to compute advantages.

    `rewards` (N,) is NaN where unscored, `groups` (N,) numbers the prompts, `mask` (N, T) marks completion tokens.
    It returns one advantage per rollout (N,), or one per token (N, T).

    Args:
        name: What `REINFORCEConfig(advantage=…)` and `PPOConfig(advantage=…)` know it by.
        overwrite: Replace a different function of this name. Running a cell again needs no overwrite.

    Raises:
        ValidationError: The name is taken by a different function.

    Example:
        >>> @register_advantage("max_rl")
        ... def max_rl(rewards, groups, mask):
        ...     return (rewards - np.nanmean(rewards)) / np.nanmean(rewards)
    """
    return _ADVANTAGES.register(name, overwrite=overwrite)


def get_registered_advantages() -> list[str]:
    """Return the names of all registered advantages."""
    return list(_ADVANTAGES)


def resolve_advantage(name: str) -> AdvantageFunction:
    """Return a registered advantage function.

    Raises:
        ValidationError: There is none of this name.
    """
    return _ADVANTAGES.resolve(name)


def centre(rewards: Array, groups: Array) -> Array:
    """Return r_i − mean of the group (Dr. GRPO, arXiv:2503.20783); exactly 0 where all rewards are equal."""
    return _per_group(rewards, groups, _centre)


def rloo(rewards: Array, groups: Array) -> Array:
    """Return r_i − mean of the *others* in the group (Ahmadian et al. 2024, arXiv:2402.14740).

    The same as G/(G−1) · `centre`, and exactly unbiased; 0 where there are no others.
    """
    return _per_group(
        rewards, groups, lambda scored: _centre(scored) * (scored.size / max(scored.size - 1, 1))
    )


def scale_by_group(advantages: Array, rewards: Array, groups: Array, eps: float = STD_EPS) -> Array:
    """Divide by the Bessel std of the group's rewards + eps: with `centre`, GRPO (arXiv:2402.03300)."""
    return advantages / _per_group(
        rewards, groups, lambda scored: np.full(scored.size, _divisor(scored, eps)), elsewhere=1.0
    )


def scale_by_batch(advantages: Array, rewards: Array, eps: float = STD_EPS) -> Array:
    """Divide by the Bessel std of all rewards + eps (Lite PPO, arXiv:2508.08221)."""
    return advantages / _divisor(rewards[np.isfinite(rewards)], eps)


class EMABaseline:
    """A running mean of the rewards of earlier batches, corrected for its start at 0.

    The first batch is compared with the mean of its own other rollouts.

    Args:
        decay: Weight of the past.
    """

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self.total = 0.0
        self.updates = 0

    @property
    def value(self) -> float | None:
        """The baseline; None before the first batch."""
        return self.total / (1 - self.decay**self.updates) if self.updates else None

    def advantages(self, rewards: Array) -> Array:
        """Return r − b, with b from earlier batches only."""
        scored = np.isfinite(rewards)
        if self.value is None and scored.sum() > 1:
            return rloo(rewards, np.zeros(len(rewards)))
        apart = rewards - (self.value or 0.0)
        return np.where(scored & (np.abs(apart) > NO_SIGNAL), apart, 0.0)  # not the rounding error of a mean

    def update(self, rewards: Array) -> None:
        """Take in the mean of a batch."""
        scored = rewards[np.isfinite(rewards)]
        if scored.size:
            self.total = self.decay * self.total + (1 - self.decay) * float(scored.mean())
            self.updates += 1


def advantages(
    rewards: Array,
    groups: Array,
    *,
    baseline: Baseline,
    scale: Scale = "none",
    ema: EMABaseline | None = None,
) -> Array:
    """Return one advantage per rollout, (N,).

    Args:
        rewards: (N,), NaN where unscored.
        groups: (N,) group numbers.
        baseline: What a reward is compared with.
        scale: What the difference is divided by.
        ema: State of the "ema" baseline; read, not updated.
    """
    match baseline:
        case "none":
            values = np.where(np.isfinite(rewards), rewards, 0.0)
        case "ema":
            values = (ema or EMABaseline()).advantages(rewards)
        case "rloo":
            values = rloo(rewards, groups)
        case "group":
            values = centre(rewards, groups)
    if scale == "group":
        return scale_by_group(values, rewards, groups)
    return scale_by_batch(values, rewards) if scale == "batch" else values


def gae(
    rewards: Array, values: Array, mask: Array, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Array, Array]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438), over the tokens of the mask only.

    δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γλ A_{t+1}; behind the last token V is 0. With γ = λ = 1 and one reward
    at the end, A = r − V. Positions outside the mask are passed over as if they were not there.

    Args:
        rewards: (N, T) per token.
        values: (N, T) estimates before each token.
        mask: (N, T), 1 for the tokens that count.
        gamma: Discount.
        lam: 1 is unbiased, 0 trusts the value head.

    Returns:
        Advantages and returns A + V, both (N, T), 0 outside the mask.
    """
    advantage = np.zeros_like(values)  # (N, T)
    # A_{t+1} and V_{t+1}, each (N,): of the next token that counts, 0 behind the last.
    following, following_value = np.zeros(len(values)), np.zeros(len(values))
    for t in range(values.shape[1] - 1, -1, -1):
        counts = mask[:, t] > 0  # (N,)
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        advantage[:, t] = np.where(counts, delta + gamma * lam * following, 0.0)
        following = np.where(counts, advantage[:, t], following)
        following_value = np.where(counts, values[:, t], following_value)
    return advantage, np.where(mask > 0, advantage + values, 0.0)


def whiten(values: Array, mask: Array) -> Array:
    """Return values (N, T) with mean 0 and variance 1 over the mask: (x − mean) / √(var + 1e-8); 0 outside."""
    inside = values[mask > 0]
    if inside.size < 2 or np.ptp(inside) <= NO_SIGNAL:
        return np.zeros_like(values)
    whitened = (values - inside.mean()) / np.sqrt(inside.var(ddof=1) + 1e-8)
    return np.where(mask > 0, whitened, 0.0)


def at_the_end(rewards: Array, mask: Array) -> Array:
    """Return (N, T) with each rollout's reward (N,) on its last token of the mask; unscored ones have none."""
    placed = np.zeros(mask.shape)
    rows = np.flatnonzero(mask.any(1) & np.isfinite(rewards))
    last = mask.shape[1] - 1 - np.argmax(mask[rows, ::-1] > 0, axis=1)  # (rows,) the first from the right
    placed[rows, last] = rewards[rows]
    return placed


def by_turn(rewards: Array, batch: Sequence[Trajectory], mask: Array) -> Array:
    """Return (N, T) with what an environment gave for a turn on that turn's last token, the rest on the rollout's last.

    Args:
        rewards: (N,) whole rewards, those of the turns included; NaN where unscored.
        batch: The N rollouts.
        mask: (N, T).
    """
    placed, rest = np.zeros(mask.shape), rewards.astype(np.float64)
    for row, trajectory in enumerate(batch):
        for turn in trajectory.turns or ():
            seen = turn.start + np.flatnonzero(mask[row, turn.start : turn.stop])
            if turn.reward is not None and seen.size:
                placed[row, seen[-1]] += turn.reward
                rest[row] -= turn.reward
    return placed + at_the_end(rest, mask)


@register_advantage("reinforce_pp")
def reinforce_pp(rewards: Array, groups: Array, mask: Array) -> Array:
    """REINFORCE++ (Hu 2025, arXiv:2501.03262): the return of every token, whitened over the whole batch.

    Args:
        rewards: (N,) per rollout, or (N, T) per token (with a KL penalty inside).
        groups: Not read.
        mask: (N, T).
    """
    per_token = rewards if rewards.ndim == 2 else at_the_end(rewards, mask)
    # With V = 0 and γ = λ = 1 an advantage is the sum of all rewards from its token on.
    returns, _ = gae(per_token, np.zeros(mask.shape), mask)
    scored = mask * (np.isfinite(rewards)[:, None] if rewards.ndim == 1 else 1)
    return whiten(returns, scored)


@register_advantage("reinforce_pp_baseline")
def reinforce_pp_baseline(rewards: Array, groups: Array, mask: Array) -> Array:
    """REINFORCE++-baseline (Hu 2025, arXiv:2501.03262): r − mean of the group, then as `reinforce_pp`.

    The group gives the centre, the whole batch the spread: a group that nearly always succeeds is not blown up.

    Args:
        rewards: (N,) per rollout, or (N, T) per token (with a KL penalty inside).
        groups: (N,) group numbers.
        mask: (N, T).
    """
    if rewards.ndim == 1:
        return reinforce_pp(np.where(np.isfinite(rewards), centre(rewards, groups), np.nan), groups, mask)
    # (N,) of what the loss sees: unscored rollouts have no tokens.
    totals = np.where(mask.any(1), rewards.sum(1), np.nan)
    return reinforce_pp(rewards + at_the_end(centre(totals, groups) - totals, mask), groups, mask)


@checked
def token_weights(
    mask: Array, aggregation: Aggregation, max_tokens: int, rollouts: int | None = None
) -> Array:
    """Return the weight of every token in the loss, (N, T): the whole normaliser of an update.

    The choices are those of DAPO (arXiv:2503.14476, eq. 12: token_mean), GRPO (arXiv:2402.03300, eq. 3: seq_mean) and
    Dr. GRPO (arXiv:2503.20783: const). What is left out of the loss still counts in `rollouts`.

    Args:
        mask: (N, T), 1 for the tokens in the loss.
        aggregation: "token_mean" m/Σm, "seq_mean" m/(|y|·N), "const" m/(N·max_tokens) or "sum" m.
        max_tokens: The longest completion there could have been.
        rollouts: N, the rollouts that count: the scored ones; all rows when None.

    Raises:
        ValidationError: A mask that is not (N, T), or a length below 1.
    """
    mask = array_of(mask, "mask")
    if mask.ndim != 2 or mask.dtype.kind not in "biuf" or max_tokens < 1:
        raise ValidationError(
            f"token_weights: mask has shape {mask.shape} and type {mask.dtype}, max_tokens is {max_tokens}: numbers "
            f"(N, T), and a length of at least 1, are expected."
        )
    divisor: Any = 1.0  # a number, or (N, 1)
    count = len(mask) if rollouts is None else max(rollouts, 1)
    match aggregation:
        case "token_mean":
            divisor = max(mask.sum(), 1.0)
        case "seq_mean":
            divisor = np.maximum(mask.sum(1, keepdims=True), 1.0) * count
        case "const":
            divisor = count * max_tokens
    weights: Array = mask / divisor
    return weights


def _per_group(
    rewards: Array, groups: Array, function: Callable[[Array], Array], elsewhere: float = 0.0
) -> Array:
    """Apply `function` to the scored rewards of each group."""
    values = np.full(len(rewards), elsewhere)
    scored = np.isfinite(rewards)
    for group in np.unique(groups[scored]):
        members = scored & (groups == group)
        values[members] = function(rewards[members])
    return values


def _centre(rewards: Array) -> Array:
    if np.ptp(rewards) <= NO_SIGNAL:  # exactly 0, not the rounding error of a mean
        return np.zeros_like(rewards)
    centred: Array = rewards - rewards.mean()
    return centred


def _divisor(rewards: Array, eps: float) -> float:
    """Return std + eps; 1 where the rewards do not differ: dividing by eps alone would blow rounding up."""
    std = bessel_std(rewards)
    return std + eps if std >= NO_SIGNAL else 1.0
