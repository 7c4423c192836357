"""A canary audit of DP-SGD: does what was released let one tell who was in it, better than the accounting allows?

White box, one training run: m canaries, each in by a coin, each with a gradient of its own, clipped to C, so that the
score of a canary (how far the weights moved along it) is N(0, σ²T) if it was out and N(T, σ²T) if it was in, in units
of C / L. The measured distance of the two, in standard deviations, is mu; the accounting claims √T / σ (Dong, Roth and
Su 2022, arXiv:1905.02383). Measuring more means that the noise is too small, the clip does not hold, or units count
twice. Measuring no more proves nothing: batch-level clipping and coupled losses move no orthogonal canary.
"""

import math
from dataclasses import dataclass

import numpy as np

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.batch import Array
from tensafe_nb.protocol.codec import tagged

INK = "#787878"  # reads on the white and on the black of a notebook
STANDARD_ERRORS = 3.5  # a false alarm comes less than 3 times in 10,000 audits


@tagged("privacy_audit")
@dataclass(frozen=True, slots=True, eq=False)
class PrivacyAudit:
    """What an audit measured.

    Attributes:
        mu: Distance of the scores of canaries that were in from those that were out, in standard deviations.
        standard_error: Of mu.
        claimed_mu: √T / σ: the largest that the accounting allows.
        canaries: How many there were.
        steps: T.
        noise_multiplier: σ.
        scores_in: Scores of the canaries that were in.
        scores_out: Scores of those that were out.
    """

    mu: float
    standard_error: float
    claimed_mu: float
    canaries: int
    steps: int
    noise_multiplier: float
    scores_in: Array
    scores_out: Array

    @property
    def violated(self) -> bool:
        """Whether more was measured than the accounting allows."""
        return self.mu - STANDARD_ERRORS * self.standard_error > self.claimed_mu

    @property
    def verdict(self) -> str:
        """What this says, in a sentence."""
        if self.violated:
            return (
                f"VIOLATION: mu {self.mu:.2f} ± {self.standard_error:.2f}, and no more than {self.claimed_mu:.2f} "
                f"was claimed. The epsilon of this client means nothing; please report it."
            )
        return (
            f"No violation found: mu {self.mu:.2f} ± {self.standard_error:.2f}, {self.claimed_mu:.2f} is allowed. "
            f"That is evidence, not proof."
        )

    def __repr__(self) -> str:
        return f"<PrivacyAudit of {self.canaries} canaries over {self.steps} steps: {self.verdict}>"

    def plot(self) -> object:
        """Return a figure of both distributions of scores (matplotlib)."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.2, 3.0), dpi=100, layout="constrained", facecolor="none")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(facecolor="none")
        both = np.concatenate([self.scores_in, self.scores_out])
        bins = np.histogram_bin_edges(both, 40).tolist()
        for scores, name, color in (
            (self.scores_out, "canary was out", "#2a7de1"),
            (self.scores_in, "canary was in", "#c9661a"),
        ):
            axes.hist(scores, bins, alpha=0.6, label=f"{name} ({len(scores)})", color=color)
        axes.set_title(self.verdict, fontsize=8, loc="left", color=INK)
        axes.set_xlabel(
            "score: how far the weights moved along the canary, in units of C / L", fontsize=8, color=INK
        )
        axes.tick_params(labelsize=8, colors=INK)
        for spine in axes.spines.values():
            spine.set_color(INK)
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)
        return figure

    def _repr_png_(self) -> bytes:
        import io

        target = io.BytesIO()
        self.plot().savefig(target, format="png")  # type: ignore[attr-defined]
        return target.getvalue()


def audit_of(scores: Array, included: Array, *, steps: int, noise_multiplier: float) -> PrivacyAudit:
    """Return what the scores of some canaries say.

    Args:
        scores: (m,) how far the weights moved along each canary, in units of C / L.
        included: (m,) whether it was in.
        steps: T.
        noise_multiplier: σ.
    """
    inside, outside = scores[included], scores[~included]
    # N(0, σ²T) and N(T, σ²T) are T / (σ√T) = √T / σ apart; the spread is taken where no signal can be
    mu = float((inside.mean() - outside.mean()) / outside.std(ddof=1))
    # of two means and, by the delta method, of the standard deviation that divides them
    error = math.sqrt(1 / len(inside) + 1 / len(outside) + mu**2 / (2 * len(outside)))
    return PrivacyAudit(
        mu, error, math.sqrt(steps) / noise_multiplier, len(scores), steps, noise_multiplier, inside, outside
    )


def check_audit(canaries: int, steps: int, noise_multiplier: float) -> None:
    """Refuse an audit that could say nothing.

    Raises:
        ValidationError: Too few canaries, no step, or no noise to audit.
    """
    for name, value in (("canaries", canaries), ("steps", steps)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValidationError(f"privacy_audit: {name}={as_given(value)} must be a whole number.")
    if not 100 <= canaries <= 10_000:
        raise ValidationError(f"privacy_audit: canaries={canaries} must be between 100 and 10,000.")
    if not 1 <= steps <= 1_000:
        raise ValidationError(f"privacy_audit: steps={steps} must be between 1 and 1,000.")
    if noise_multiplier <= 0:
        raise ValidationError("privacy_audit: with noise_multiplier=0 there is no guarantee to audit.")
