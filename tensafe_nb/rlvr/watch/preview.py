"""Look at a reward before it trains anything: how it scores a batch, what it likes best, where it fails."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tensafe_nb.checks import checked
from tensafe_nb.display import as_given, escaped
from tensafe_nb.rlvr.environments.replay import scorer_of
from tensafe_nb.rlvr.rollouts.trajectories import Trajectory, TrajectoryBatch
from tensafe_nb.rlvr.scoring.scorer import ScoreReport, unscored

BINS = 10
EXAMPLES = 3
WIDTH = 24  # of the longest bar, in characters
TEXT = 60  # characters of a response that are shown
TRUE_ENOUGH = 0.5  # a rollout whose true score is no higher has missed the aim


@dataclass(frozen=True, slots=True, repr=False)
class RewardPreview:
    """How a reward scored a batch, as a picture.

    Attributes:
        name: The reward's.
        report: Counts, means and spreads.
        counts: Rollouts in each bin of the histogram.
        edges: Bounds of the bins, one more than there are bins.
        best: The rollouts with the highest rewards.
        worst: Those with the lowest.
        suspects: High reward, but not above 0.5 by the part marked `true`: how it may be gamed.
        errors: What went wrong, and how often, most frequent first.
        groups_with_signal: Share of the prompts whose rewards differ: those a step can learn from.
        rollouts: All rollouts, scored.
    """

    name: str
    report: ScoreReport
    counts: tuple[int, ...]
    edges: tuple[float, ...]
    best: list[Trajectory]
    worst: list[Trajectory]
    suspects: list[Trajectory]
    errors: dict[str, int]
    groups_with_signal: float
    rollouts: TrajectoryBatch = field(compare=False)

    def __repr__(self) -> str:
        top = max(self.counts, default=0)
        bars = [f"{low:>8.3g} {'█' * round(WIDTH * n / top)} {n}" for low, n in self._bars()]
        examples = [
            f"{title}: {t.reward:.3g}  {_short(t.prompt)!r} → {_short(t.response)!r}"
            for title, chosen in self._chosen()
            for t in chosen
        ]
        errors = [f"{count} × {text}" for text, count in self.errors.items()]
        return "\n".join([self._summary(), *bars, *examples, *errors])

    def _repr_html_(self) -> str:
        top = max(self.counts, default=0)
        bars = "".join(
            f"<tr><td style='text-align:right'>{low:.3g}</td><td style='text-align:left'>"
            f"<span style='display:inline-block;height:.8em;background:currentColor;opacity:.5;"
            f"width:{12 * n / top:.2f}em'></span> {n}</td></tr>"
            for low, n in self._bars()
        )
        examples = "".join(
            f"<tr><td>{title}</td><td>{t.reward:.3g}</td><td style='text-align:left'>{escaped(_short(t.prompt))}</td>"
            f"<td style='text-align:left'>{escaped(_short(t.response))}</td></tr>"
            for title, chosen in self._chosen()
            for t in chosen
        )
        errors = "".join(f"<li>{count} × {escaped(text)}</li>" for text, count in self.errors.items())
        return (
            f"<p>{escaped(self._summary())}</p><table>{bars}</table><table>{examples}</table>"
            + f"<ul>{errors}</ul>" * bool(errors)
        )

    def _summary(self) -> str:
        report = self.report
        return (
            f"Reward {as_given(self.name)} on {len(self.rollouts)} rollouts: mean {self.rollouts.mean_reward:.3g}, "
            f"{report.scored} scored, {report.abstained} abstained, {report.errors} errors "
            f"({report.timeouts} timeouts); rewards differ within {self.groups_with_signal:.0%} of the prompts"
        )

    def _bars(self) -> list[tuple[float, int]]:
        return list(zip(self.edges, self.counts, strict=False))

    def _chosen(self) -> list[tuple[str, list[Trajectory]]]:
        return [("best", self.best), ("worst", self.worst), ("suspect", self.suspects)]


@checked
def preview_reward(reward: Any, batch: TrajectoryBatch, *, timeout: float | None = 5.0) -> RewardPreview:
    """Score a batch to see what a reward does, before a step is taken with it. The batch stays as it is.

    Args:
        reward: A name, a function, a resolved reward, or an environment, which is played over what was said.
        batch: For instance 32 samples of the base model: `PolicySampler(tc).generate_trajectories(prompts)`.
        timeout: Seconds a call may take; None calls everything here, without a limit.

    Example:
        >>> preview_reward("exact_match", sampler.generate_trajectories(prompts))
    """
    rollouts = unscored(batch)
    with scorer_of(reward, timeout) as scorer:
        report = scorer.score(rollouts)
        name = scorer.reward.name
    distinct = {(t.prompt, t.response): t for t in rollouts if t.reward is not None}
    ranked = sorted(distinct.values(), key=_reward, reverse=True)
    counts, edges = histogram(rollouts.rewards)
    signal = [group.has_signal for group in rollouts.groups]
    return RewardPreview(
        name=name,
        report=report,
        counts=counts,
        edges=edges,
        best=ranked[:EXAMPLES],
        worst=ranked[: -EXAMPLES - 1 : -1],
        suspects=suspects_of(ranked, report.true),
        errors=dict(Counter(t.reward_error for t in rollouts if t.reward_error is not None).most_common()),
        groups_with_signal=float(np.mean(signal)) if signal else 0.0,
        rollouts=rollouts,
    )


def _reward(trajectory: Trajectory) -> float:
    assert trajectory.reward is not None
    return trajectory.reward


def histogram(rewards: "np.ndarray[Any, np.dtype[np.float64]]") -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return counts and edges: one bin for each value while there are few, ten bins beyond."""
    scored = rewards[np.isfinite(rewards)]
    values = np.unique(scored)
    if not values.size:
        return (), ()
    edges = values if values.size <= BINS else np.histogram_bin_edges(scored, BINS)[:-1]
    counts = np.bincount(np.searchsorted(edges, scored, side="right") - 1, minlength=edges.size)
    return tuple(counts.tolist()), tuple(edges.tolist())


def suspects_of(ranked: Sequence[Trajectory], true: str | None) -> list[Trajectory]:
    """Return rollouts that are paid above the mean and miss the true aim."""
    if true is None or not ranked:
        return []
    usual = float(np.mean([_reward(trajectory) for trajectory in ranked]))
    paid = [trajectory for trajectory in ranked if _reward(trajectory) > usual]
    return [t for t in paid if (t.reward_parts or {}).get(true, 1.0) <= TRUE_ENOUGH][:EXAMPLES]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TEXT else line[: TEXT - 1] + "…"
