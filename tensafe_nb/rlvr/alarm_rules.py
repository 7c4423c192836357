"""What tends to go wrong with a run: for each trouble a rule that knows its signs, its cause and what helps.

A rule looks at the newest row and rollouts, and at a short memory of those before. The thresholds of entropy and
signal were replayed on published logs: rules that count single steps fire in healthy runs too, hence windows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from tensafe_nb.rlvr.metrics import Row, Signal, signal_of
from tensafe_nb.rlvr.rollouts import Trajectory, TrajectoryBatch, mean

Level: TypeAlias = Literal["amber", "red"]

GROUPS = 24  # whose signal is looked at together: single steps are too few to tell
STEPS = 5  # whose entropies are averaged
SHOWN = 32  # rollouts that an alarm names at most
FP32_GAP, BF16_GAP = (
    1e-3,
    2e-2,
)  # mean |log p of the sampler − log p of the training path| that precision explains


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule has to say about a step."""

    name: str
    level: Level
    message: str
    remedy: str
    rollouts: tuple[int, ...] = ()


@dataclass(slots=True)
class Memory:
    """What the rules remember of the steps before: plain data, so that a checkpoint holds it."""

    clipped: list[float] = field(default_factory=list)  # of the last two steps
    signals: list[Signal] = field(default_factory=list)  # of the last groups, newest last
    first_entropies: list[float] = field(default_factory=list)
    last_entropies: list[float] = field(default_factory=list)
    last_rewards: list[float] = field(default_factory=list)
    lowest: float | None = None  # reward of any rollout so far
    highest: float | None = None

    def take(self, row: Row, batch: TrajectoryBatch) -> None:
        """Take in a step."""
        self.clipped = [*self.clipped, batch.clipped_ratio][-2:]
        signals = [signal for group in batch.groups if (signal := signal_of(group)) is not None]
        self.signals = [*self.signals, *signals][-max(GROUPS, len(signals)) :]
        self._take_entropy(row)
        if math.isfinite(row.get("reward", math.nan)):
            scored = batch.rewards[np.isfinite(batch.rewards)]
            self.last_rewards = [*self.last_rewards, row["reward"]][-STEPS:]
            self.lowest = min(float(scored.min()), math.inf if self.lowest is None else self.lowest)
            self.highest = max(float(scored.max()), -math.inf if self.highest is None else self.highest)

    def _take_entropy(self, row: Row) -> None:
        entropy = row.get("entropy", math.nan)
        if math.isfinite(entropy):
            self.first_entropies = [*self.first_entropies, entropy][:STEPS]
            self.last_entropies = [*self.last_entropies, entropy][-STEPS:]

    @property
    def at_the_ceiling(self) -> bool:
        """Whether the mean reward is within 5 % of the best single one, as far as rewards have ever differed."""
        if self.lowest is None or self.highest is None or not self.last_rewards:
            return False
        return mean(np.array(self.last_rewards)) >= self.highest - 0.05 * (self.highest - self.lowest)


Rule: TypeAlias = Callable[[Memory, Row, TrajectoryBatch], Finding | None]


def truncation(memory: Memory, row: Row, batch: TrajectoryBatch) -> Finding | None:
    """Answers that ran into the token limit: more than half of them twice running, or all of them once."""
    share = memory.clipped[-1]
    if share < 1 and not (len(memory.clipped) == 2 and min(memory.clipped) > 0.5):
        return None
    limit = batch.sampling.max_new_tokens
    ended = [len(t.tokens) for t in batch if not t.truncated]
    usual = (
        f" 95 % of those that ended took up to {math.ceil(np.percentile(ended, 95))} tokens." if ended else ""
    )
    return Finding(
        "truncation",
        "red" if share == 1 else "amber",
        f"{share:.0%} of the answers were cut at max_new_tokens={limit}. They are left out of the loss, and a reward "
        f"that looks for an ending never sees one.{usual}",
        f"Raise max_new_tokens, to {2 * limit} for a start; or ask for short answers, or give stop strings.",
        _where(batch, lambda trajectory: trajectory.truncated),
    )


def no_signal(memory: Memory, row: Row, batch: TrajectoryBatch) -> Finding | None:
    """Prompts whose answers all score the same: more than 80 % of the last 24, or of a larger step."""
    signals = memory.signals
    without = len(signals) - signals.count("mixed")
    if len(signals) < GROUPS or without <= 0.8 * len(signals):
        return None
    good, bad = signals.count("all_good"), signals.count("all_bad")
    solved, hopeless, quiet = good == without, bad == without, _quiet(batch)
    remedy = (
        "The prompts are solved: take harder ones, or stop."
        if solved
        else "Take easier prompts, reward parts of an answer, raise group_size, or show examples first (fit)."
        if hopeless
        else "Take prompts that are solved sometimes (20 to 80 %), raise group_size, or reward parts of an answer."
    )
    return Finding(
        "no_signal",
        "red" if without == len(signals) else "amber",
        f"For {without} of the last {len(signals)} prompts all answers scored the same ({good} all good, {bad} all "
        f"bad). They teach nothing.",
        remedy,
        _where(batch, lambda trajectory: id(trajectory) in quiet),
    )


def no_learning(memory: Memory, row: Row, batch: TrajectoryBatch) -> Finding | None:
    """Rewards differ within a group, and yet no weight has moved."""
    idle = row.get("grad_norm") == 0 or row.get("param_delta_norm") == 0
    if not idle or not any(group.has_signal for group in batch.groups):
        return None
    if batch.clipped_ratio > 0 and all(t.truncated or not _has_advantage(t) for t in batch):
        reason, remedy = (
            "every answer that could teach something was cut",
            "raise max_new_tokens, or pass mask_truncated=False to the algorithm",
        )
    elif row.get("grad_norm") == 0:
        reason, remedy = (
            "the gradient is 0",
            "look at the advantages (trajectory.advantage) and at which weights are trained (lora_config)",
        )
    else:
        reason, remedy = (
            "the gradient is not 0, but the optimiser's step is",
            "look at the learning rate: its schedule may have come to its end",
        )
    return Finding(
        "no_learning",
        "red",
        f"Rewards differ, but no weight has moved: {reason}.",
        f"{remedy[0].upper()}{remedy[1:]}.",
        _where(batch, _has_advantage),
    )


def entropy(memory: Memory, row: Row, batch: TrajectoryBatch) -> Finding | None:
    """The policy dissolves (three times the entropy it began with), or commits itself too early (a tenth)."""
    if len(memory.first_entropies) < STEPS:
        return None
    start, now = mean(np.array(memory.first_entropies)), mean(np.array(memory.last_entropies))
    if now > 3 * start:
        return Finding(
            "entropy",
            "red",
            f"The entropy has grown from {start:.3g} to {now:.3g}: the answers turn into noise.",
            "Go back to a checkpoint and lower the learning rate; lower entropy_coef, or add a KL penalty (kl_coef).",
        )
    if now < 0.1 * start and not memory.at_the_ceiling:
        return Finding(
            "entropy",
            "amber",
            f"The entropy has fallen from {start:.3g} to {now:.3g} while rewards could still rise: the policy repeats "
            f"itself and tries little that is new.",
            "Healthy runs do this too. If the reward stands still: lower the learning rate, raise entropy_coef or "
            "clip_range's upper end.",
        )
    return None


def sampler_mismatch(gap: float) -> Rule:
    """Return the rule that the sampler and the training path agree on the logprobs, up to `gap` on average."""

    def rule(memory: Memory, row: Row, batch: TrajectoryBatch) -> Finding | None:
        kl = row.get("sampling/mismatch_kl", 0.0)
        difference = row.get("sampling/sampling_logp_difference/mean", 0.0)
        if kl <= 0.01 and difference <= gap:
            return None
        return Finding(
            "sampler_mismatch",
            "red" if kl > 0.01 else "amber",
            f"Sampler and training disagree on the probability of the sampled tokens: by {difference:.2g} on average, "
            f"KL {kl:.2g}. The update then trains on what this policy would not have said.",
            "Sample at temperature=1 with top_p=1 and top_k=0, set the adapter's dropout to 0, use dtype='float32'; "
            "tis_cap=2 corrects for small differences.",
        )

    return rule


def policy_kl(memory: Memory, row: Row, batch: TrajectoryBatch) -> Finding | None:
    """An update that moved the policy far: KL(old ‖ new) above 0.1, or a single log-ratio above 5."""
    kl, ratio = row.get("policy/approx_kl", 0.0), row.get("policy/log_ratio_max", 0.0)
    if kl <= 0.1 and ratio <= 5:
        return None
    far = f", and single tokens by a factor of e^{ratio:.1f}" if ratio > 5 else ""
    return Finding(
        "kl",
        "red" if ratio > 5 else "amber",
        f"One update moved the policy by a KL of {kl:.2g}{far}: the rollouts no longer describe what it trains.",
        "Lower the learning rate or ppo_epochs, or set target_kl.",
    )


def reward_errors(memory: Memory, row: Row, batch: TrajectoryBatch) -> Finding | None:
    """Rewards that raised, hung or returned no number: more than 5 %, or more than half."""
    failed = [t for t in batch if _unscored_by_error(t)]
    share = len(failed) / len(batch)
    if share <= 0.05:
        return None
    mend = "Mend the function and give it to trainer.set_reward(…)"
    return Finding(
        "reward_errors",
        "red" if share > 0.5 else "amber",
        f"The reward failed on {len(failed)} of {len(batch)} answers. They are left out, never scored 0. The first "
        f"error: {failed[0].reward_error}",
        f"{mend}, try it with trainer.rescore(), then run.resume()." if share > 0.5 else f"{mend}.",
        _where(batch, _unscored_by_error),
    )


def _unscored_by_error(trajectory: Trajectory) -> bool:
    """Whether an error took the reward away; a failed part of weight 0 does not."""
    return trajectory.reward is None and trajectory.reward_error is not None


def not_finite(batch: TrajectoryBatch, error: Exception) -> Finding:
    """Return the finding for an update that the core refused, since its loss or gradient was no number."""
    return Finding(
        "nan",
        "red",
        f"No step was taken, and no weight has moved: {error}",
        "Look at these rollouts for rewards that are huge; go back to the last checkpoint with a lower learning rate.",
        _where(batch, _has_advantage),
    )


def _where(batch: TrajectoryBatch, which: Callable[[Trajectory], bool]) -> tuple[int, ...]:
    """Return the numbers of the rollouts in question, the first few of them."""
    return tuple(number for number, trajectory in enumerate(batch) if which(trajectory))[:SHOWN]


def _quiet(batch: TrajectoryBatch) -> set[int]:
    """Return the ids of the rollouts in groups without signal."""
    return {
        id(t) for group in batch.groups if signal_of(group) in ("all_good", "all_bad") for t in group.rollouts
    }


def _has_advantage(trajectory: Trajectory) -> bool:
    return trajectory.advantage is not None and bool(np.any(trajectory.advantage))
