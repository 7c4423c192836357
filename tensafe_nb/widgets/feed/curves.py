"""Curves of a panel: those that were measured, and those made of others (time and tokens up to a step, tokens/s)."""

from array import array
from collections.abc import Sequence

import numpy as np

from tensafe_nb.history.branches import CLOCK, Span
from tensafe_nb.history.log import TIMED, RunHistory
from tensafe_nb.protocol.batch import Array
from tensafe_nb.widgets.feed.feed import Feed

TIME, TOKENS, RATE = "~time", "~tokens", "tokens/s"
SPARSE = ("policy/approx_kl",)  # measured now and then: there, "not a number" says that it was not
SUPERVISED = (
    "loss", "eval/loss", "accuracy", "eval/accuracy", "reward_margin", "eval/reward_margin", "grad_norm",
)  # fmt: skip
REWARDED = (
    "reward", "group/reward_std", "eval/reward", "rewards/true", "resample/reward",
    "by_group/frac_all_good", "by_group/frac_mixed", "by_group/frac_all_bad",
    "resample/groups", "completions/mean_length", "completions/clipped_ratio", "entropy", "policy/approx_kl",
    "grad_norm", "param_delta_norm",
)  # fmt: skip


def names_of(feed: Feed, *, all_curves: bool) -> list[str]:
    """Return the curves to send of a training client: the one to watch with its held-out twin, or all there are."""
    curve = feed.curve
    kept: tuple[str, ...]
    if not all_curves:
        kept = (curve, f"eval/{curve}", "group/reward_std") if curve == "reward" else (curve, f"eval/{curve}")
    else:
        kept = REWARDED if curve == "reward" else (curve, f"eval/{curve}", *SUPERVISED[2:])
    found = [name for name in kept if name in feed.history]
    timed = TIMED in feed.history
    return (
        found
        + [TIME] * bool(found)
        + [TOKENS] * timed
        + [RATE] * (timed and all_curves and curve != "reward")
    )


class Curves:
    """The curves of one training client, or of several side by side: those of the second begin with "1:".

    Args:
        feeds: The training clients.
    """

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds = feeds
        self._tokens = [array("d") for _ in feeds]  # trained on by each step, added up

    def series(self, name: str, start: int = 0) -> tuple[Array, Array]:
        """Return (steps, values) of a curve, from point number `start` on; both are (points,)."""
        which, own = place_of(name)
        history = self._feeds[which].history
        if own == TIME:
            return history.clock(start)
        if own == TOKENS:
            steps, _ = history.series(TIMED, start)
            return steps, self.tokens_so_far(which)[start : start + len(steps)]
        if own == RATE:
            return rate(history, start)
        if own in SPARSE:
            steps, values = history.series(own)
            measured = ~np.isnan(values)
            return steps[measured][start:], values[measured][start:]
        return history.series(own, start)

    def spans(self, names: Sequence[str]) -> dict[str, list[Span]]:
        """Return which points of these curves led to the weights as they are; those of which all did are left out."""
        found = {name: self._spans(*place_of(name)) for name in names}
        return {name: spans for name, spans in found.items() if spans != [(0, None)]}

    def _spans(self, which: int, own: str) -> list[Span]:
        history = self._feeds[which].history
        spans = history.spans({TIME: CLOCK, TOKENS: TIMED, RATE: TIMED}.get(own, own))
        if own == RATE:  # the first step has no rate
            return [(max(start - 1, 0), None if end is None else max(end - 1, 0)) for start, end in spans]
        if own in SPARSE:
            measured = np.concatenate([[0], np.cumsum(~np.isnan(history.series(own)[1]))])
            return [
                (int(measured[start]), None if end is None else int(measured[end])) for start, end in spans
            ]
        return spans

    def tokens_so_far(self, which: int) -> Array:
        """Return how many tokens a client had trained on by each step; adds up only what is new."""
        total = self._tokens[which]
        for tokens in self._feeds[which].history.series(TIMED, len(total))[1].tolist():
            total.append(tokens + (total[-1] if total else 0.0))
        return np.array(total, dtype=np.float64)


def place_of(name: str) -> tuple[int, str]:
    """Return whose curve a name means, and its own name: "1:loss" is the loss of the second."""
    number, _, own = name.rpartition(":")
    return int(number or 0), own


def rate(history: RunHistory, start: int = 0) -> tuple[Array, Array]:
    """Return (steps, tokens per second): tokens of a step by the seconds since the step before it."""
    steps, tokens = history.series(TIMED, start)
    moments = history.moments(start)
    count = max(0, min(len(steps), len(moments)) - 1)  # the first step has none before it
    seconds = np.maximum(np.diff(moments[: count + 1]), 1e-6)  # two steps may bear the same time
    return steps[1 : count + 1], tokens[1 : count + 1] / seconds if count else tokens[:0]
