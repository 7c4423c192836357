"""Rules over the steps of an RL run: for each trouble one that knows its signs, its cause and what helps.

A rule looks at the newest row and rollouts, and at a short memory of those before. The thresholds of entropy and
signal were replayed on published logs: rules that count single steps fire in healthy runs too, so each sees several.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from tensafe_nb.config import TrainingConfig
from tensafe_nb.rlvr.rollouts.trajectories import (
    RolloutGroup,
    Trajectory,
    TrajectoryBatch,
    has_advantage,
    mean,
)
from tensafe_nb.rlvr.watch.metrics import Goal, Row, Signal, signal_of
from tensafe_nb.runs.alarm_log import Finding

GROUPS = 24  # whose signal is looked at together: single steps are too few to tell
TEN = 10  # updates whose rewards are compared
STEPS = 5  # whose entropies, and KLs, are averaged
KL_ONCE, KL_USUALLY, RATIO = (
    0.5,
    0.2,
    8.0,
)  # one-pass runs that learn well stay below .24, .16, 5.2 (tests/soak)
SHOWN = 32  # rollouts that an alarm names at most
FP32_GAP, BF16_GAP = 1e-3, 2e-2  # mean |log p of the sampler − log p of the training path| by precision alone


@dataclass(slots=True)
class Memory:
    """What the rules remember of the steps before: plain data, so that a checkpoint holds it."""

    clipped: list[float] = field(default_factory=list)  # of the last two steps
    signals: list[Signal] = field(default_factory=list)  # of the last groups, newest last
    first_entropies: list[float] = field(default_factory=list)
    last_entropies: list[float] = field(default_factory=list)
    moves: list[float] = field(default_factory=list)  # KL(old ‖ new) of the last updates that were measured
    furthest: float = 0.0  # log-ratio of a single token, in the last of them
    last_rewards: list[float] = field(default_factory=list)
    lowest: float | None = None  # reward of any rollout so far
    highest: float | None = None
    fell: bool = False  # whether the last ten updates were found to be worse than the first, and still are
    tenth: list[float] = field(default_factory=list)  # rewards of the updates since the last ten were full
    tens: list[list[float]] = field(
        default_factory=list
    )  # (mean, variance, lag-1 product, square) of each ten

    def take(self, row: Row, batch: TrajectoryBatch, goal: Goal | None = None) -> None:
        """Take in a step."""
        self.clipped = [*self.clipped, batch.clipped_ratio][-2:]
        signals = [signal for group in batch.groups if (signal := _taught(group, goal)) is not None]
        self.signals = [*self.signals, *signals][-max(GROUPS, len(signals)) :]
        entropy = row.get("entropy", math.nan)
        if math.isfinite(entropy):
            self.first_entropies = [*self.first_entropies, entropy][:STEPS]
            self.last_entropies = [*self.last_entropies, entropy][-STEPS:]
        if "policy/approx_kl" in row:
            self.moves = [*self.moves, row["policy/approx_kl"]][-STEPS:]
        if {"policy/approx_kl", "policy/log_ratio_max"} & set(row):
            self.furthest = row.get("policy/log_ratio_max", 0.0)
        if math.isfinite(row.get("reward", math.nan)):
            scored = batch.rewards[np.isfinite(batch.rewards)]
            self.take_reward(row["reward"])
            self.lowest = min(float(scored.min()), math.inf if self.lowest is None else self.lowest)
            self.highest = max(float(scored.max()), -math.inf if self.highest is None else self.highest)

    def forget_reward(self) -> None:
        """Forget what another reward said; lengths and entropies are the policy's own."""
        self.signals, self.last_rewards, self.tenth, self.tens, self.fell = [], [], [], [], False
        self.lowest = self.highest = None

    def take_reward(self, reward: float) -> None:
        """Take in an update's mean reward; of every ten of them, four sums are kept."""
        self.last_rewards = [*self.last_rewards, reward][-STEPS:]
        self.tenth = [*([] if len(self.tenth) == TEN else self.tenth), reward]
        if len(self.tenth) == TEN:
            values = np.array(self.tenth)  # (10,)
            apart = values - values.mean()
            products, squares = (apart[1:] * apart[:-1]).sum(), (apart**2).sum()
            ten = [values.mean(), values.var(ddof=1), products, squares]
            self.tens.append([float(value) for value in ten])

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
    ended = [t.length for t in batch if not t.truncated]
    usual = (
        f" 95 % of those that ended took up to {math.ceil(np.percentile(ended, 95))} tokens." if ended else ""
    )
    masked = "They are left out of the loss, and a" if _cut_are_masked(row) else "A"
    return Finding(
        "truncation",
        "red" if share == 1 else "amber",
        f"{share:.0%} of the answers were cut at max_new_tokens={limit}. {masked} reward that looks for an ending "
        f"never sees one.{usual}",
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
    solved, hopeless = good == without, bad == without
    silent = [group for group in batch.groups if _taught(group) in ("all_good", "all_bad")]
    quiet = {id(trajectory) for group in silent for trajectory in group.rollouts}
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
    if row.get("learning_rate") == 0:
        return None  # which has an alarm of its own
    if not idle or not any(group.has_signal for group in batch.groups):
        return None
    if _cut_are_masked(row) and all(t.truncated or not has_advantage(t) for t in batch):
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
            "look at the learning rate: a step too small for the precision of the weights moves none",
        )
    return Finding(
        "no_learning",
        "red",
        f"Rewards differ, but no weight has moved: {reason}.",
        f"{remedy[0].upper()}{remedy[1:]}.",
        _where(batch, has_advantage),
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
            "Healthy runs do this too. If the reward stands still: lower the learning rate, raise entropy_coef, or "
            "with several passes clip_range's upper end.",
        )
    return None


def reward_fell(memory: Memory, row: Row, batch: TrajectoryBatch) -> Finding | None:
    """The last ten updates are rewarded less than the first ten: by a fifth, and by more than chance would do.

    Looked at after every ten updates, for as long as a run lasts, so that three standard errors are the least that is
    asked for. Their number grows with the number of looks, and the standard error is that of rewards which depend on
    the one before (a first-order autoregression, its coefficient measured within the tens) and which wander from ten
    to ten. Of runs that do not learn, up to an autocorrelation of 0.5, fewer than 1 in 100 raise it, at any length
    (tests/unit/rlvr/watch/test_alarms.py simulates them).
    """
    if len(memory.tens) < 2:
        return None
    first, last = memory.tens[0][0], memory.tens[-1][0]
    memory.fell = first - last > (0.1 * abs(first) if memory.fell else certain_fall(memory.tens))
    if not memory.fell:
        return None
    return Finding(
        "reward_fell",
        "amber",
        f"The reward has fallen from {first:.3g} in the first ten updates to {last:.3g} in the last ten.",
        "Go back to the best checkpoint (run.rollback) and lower the learning rate. If prompts became harder, compare "
        "eval/reward instead, which is measured on the same prompts.",
    )


def certain_fall(tens: Sequence[Sequence[float]]) -> float:
    """Return by how much the last ten must lie below the first to be said to have fallen.

    The standard error of a mean of n values that follow an AR(1) with coefficient ρ is σ √((1 + ρ) / (n (1 − ρ))), and
    ρ estimated within n of them is biased towards 0 (Marriott and Pope 1954).

    Args:
        tens: (tens, 4), as `Memory.tens`.
    """
    means, variances, products, squares = np.array(tens, dtype=float).T
    plain = math.sqrt((variances[0] + variances[-1]) / TEN)
    kept = np.argsort(squares)[: max(2, len(squares) - 1)]  # without the ten in which it fell
    total = float(squares[kept].sum())
    # ten values estimate ρ (1 − 1/n) − (1 + 3ρ)/n instead of ρ
    measured = float(products[kept].sum()) / total if total else 0.0
    rho = min(max((measured + 1 / TEN) / (1 - 4 / TEN), 0.0), 0.9)
    variance = max(float(variances[kept].mean()), float(variances[0] + variances[-1]) / 2)
    error = math.sqrt(2 * variance / TEN * (1 + rho) / (1 - rho))
    if len(means) >= STEPS:
        changes = np.diff(means)  # from ten to ten; a steady fall is no wandering
        error = max(error, 1.5 * 1.4826 * float(np.median(np.abs(changes - np.median(changes)))))
    looks = 4.3 + 0.6 * math.log(len(means) - 1)
    return max(0.2 * abs(float(means[0])), 3 * plain, looks * error)


def logprob_gap(config: TrainingConfig) -> float:
    """Return by how much logprobs of sampler and training may differ on average, as far as precision goes."""
    exact = config.dtype == "float32" or config.model_ref.startswith("builtin:")
    return FP32_GAP if exact and config.dtype != "bfloat16" else BF16_GAP


def sampler_mismatch(gap: float) -> Rule:
    """Return the rule that the sampler and the training path agree on the logprobs, up to `gap` on average."""

    def rule(memory: Memory, row: Row, batch: TrajectoryBatch) -> Finding | None:
        kl = row.get("sampling/mismatch_kl", 0.0)
        difference = row.get("sampling/sampling_logp_difference/mean", 0.0)
        stale = row.get("staleness/max", 0.0) > 0  # which has a cause of its own
        fast = not batch.sampling.is_exact  # then they differ, and the update corrects for it
        if stale or (kl <= 0.01 and (fast or difference <= gap)):
            return None
        return Finding(
            "sampler_mismatch",
            "red" if kl > 0.01 else "amber",
            f"Sampler and training disagree on the probability of the sampled tokens: by {difference:.2g} on average, "
            f"KL {kl:.2g}. The update then trains on what this policy would not have said.",
            "Sample with precision='exact', or in bfloat16 in place of int8."
            if fast
            else "Sample at temperature=1 with top_p=1 and top_k=0, set the adapter's dropout to 0, use "
            "dtype='float32'; tis_cap=2 corrects for small differences.",
        )

    return rule


def policy_kl(memory: Memory, row: Row, batch: TrajectoryBatch) -> Finding | None:
    """Updates that move the policy far: KL(old ‖ new) of one, or of five on average; or a single log-ratio.

    Small updates are not all measured: between two that are, what was found of the former holds.
    """
    kl, ratio = memory.moves[-1] if memory.moves else 0.0, memory.furthest
    usual = mean(np.array(memory.moves)) if len(memory.moves) == STEPS else 0.0
    if kl < KL_ONCE and usual <= KL_USUALLY and ratio <= RATIO:
        return None
    far = f", and single tokens by a factor of e^{ratio:.1f}" if ratio > RATIO else ""
    often = f", the last {STEPS} measured by {usual:.2g} on average" if usual > KL_USUALLY else ""
    which = "This update" if "policy/approx_kl" in row else "The last update that was measured"
    passes = row.get("policy/epochs_run", 1.0) > 1
    return Finding(
        "kl",
        "red" if ratio > RATIO else "amber",
        f"{which} moved the policy by a KL of {kl:.2g}{often}{far}: "
        + (
            "the rollouts no longer describe what it trains."
            if passes
            else "it may leave behind what it could do."
        ),
        "Lower the learning rate or ppo_epochs, or set target_kl."
        if passes
        else "Lower the learning rate, warm it up (warmup_steps), or take more prompts per step.",
    )


def stale(memory: Memory, row: Row, batch: TrajectoryBatch) -> Finding | None:
    """Rollouts that another version of the policy wrote: the update takes them for its own."""
    if row.get("staleness/max", 0.0) == 0:
        return None
    mean_age, oldest = row["staleness/mean"], row["staleness/max"]
    return Finding(
        "stale",
        "amber",
        f"The rollouts are {mean_age:.3g} policy versions old on average, {oldest:.0f} at most: the gradient is not "
        f"that of the policy they are taken for.",
        "Sample after each update, from the weights it left; or correct for the difference with tis_cap=2.",
        _where(batch, lambda t: isinstance(t.policy_version, int)),
    )


def low_precision(row: Row) -> Finding:
    """Return the finding that a policy computes in bfloat16 on a CPU, with what its first step cost."""
    difference, kl = "sampling/sampling_logp_difference/mean", "sampling/mismatch_kl"
    measured = (
        f" In this step by {row[difference]:.2g} nats per token, a KL of {row[kl]:.2g}."
        if difference in row and kl in row
        else ""
    )
    return Finding(
        "low_precision",
        "amber",
        "The policy computes in bfloat16 on a CPU. Its logits depend on what shares a batch with them, so that the "
        f"sampler and the update disagree on the probability of the same tokens.{measured} In float32 they agree to "
        "1e-4.",
        'Make the client with create_training_client(…, dtype="float32"), if the speed allows.',
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
        _where(batch, has_advantage),
    )


def not_kept(error: Exception) -> Finding:
    """Return the finding that the disk refuses the rollouts of a step, whose update goes on without them."""
    return Finding(
        "rollouts_not_kept",
        "amber",
        f"The run goes on, and the texts of this step cannot be looked at later: {error}",
        "Free some of the disk: later steps are kept as soon as they can be.",
    )


def _cut_are_masked(row: Row) -> bool:
    """Whether the update says that it left out rollouts because they were cut."""
    return row.get("completions/masked_ratio", 0.0) > 0


def _where(batch: TrajectoryBatch, which: Callable[[Trajectory], bool]) -> tuple[int, ...]:
    """Return the numbers of the rollouts in question, the first few of them."""
    return tuple(number for number, trajectory in enumerate(batch) if which(trajectory))[:SHOWN]


def _taught(group: RolloutGroup, goal: Goal | None = None) -> Signal | None:
    """Return the signal of a group; answers that all score the same teach as well where others' are their baseline."""
    signal = signal_of(group, goal)
    return "mixed" if signal is not None and any(map(has_advantage, group.rollouts)) else signal
