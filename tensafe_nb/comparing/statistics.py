"""What a handful of seeds can say: intervals of means and of paired differences, and when an arm is given up.

The seeds are the sample: each gives one value for each arm. Under the hypothesis that two arms do not differ, the two
values of a seed can be exchanged, so their difference is symmetric about 0 whatever the distribution of the values is,
and Student's t of the differences keeps its level closely from three seeds on (heavy tails make it cautious, not bold).
Rank and sign-flip tests need six seeds before they can call anything at 5 %. `scripts/null_comparisons.py` measures all
of this.

Student (1908), "The Probable Error of a Mean"; Agarwal et al. (2021), "Deep RL at the Edge of the Statistical
Precipice", on reporting intervals over few seeds; Haybittle (1971) and Peto et al. (1976) for the looks in between.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy  # its parts load when they are first used

from tensafe_nb.protocol.batch import Array

LEVEL = 0.95
FEWEST = 3  # seeds of an interval: of two, t with one degree of freedom spans everything
LOOKS = (0.25, 0.5, 0.75)  # of the planned steps: when arms may be given up
GIVEN_UP = 0.001  # Haybittle and Peto: so small that the test at the end keeps its 5 %


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds, and where the true one may lie.

    Attributes:
        mean: Of the seeds that have a value; None without one.
        low: The interval's lower end; None where there is none to be had.
        high: Its upper end.
        seeds: How many have a value.
        p: Of the hypothesis that the true mean is 0, before it is adjusted for the number of comparisons.
        constant: Whether all seeds gave the very same value, so that t has nothing to go by.
    """

    mean: float | None
    low: float | None
    high: float | None
    seeds: int
    p: float | None = None
    constant: bool = False

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside: a difference is seen."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def interval_of(values: Array, family: int = 1) -> Interval:
    """Return the mean of what seeds gave, with Student's interval.

    Args:
        values: One of each seed, (seeds,); NaN where it has none, which is no value and not 0.
        family: In how many comparisons at once the level is to hold (Bonferroni).
    """
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    n = len(known)
    if n == 0:
        return Interval(None, None, None, 0)
    mean = float(known.mean())
    if n < FEWEST:
        return Interval(mean, None, None, n)
    error = float(known.std(ddof=1)) / math.sqrt(n)
    if error <= 1e-12 * max(1e-300, float(np.abs(known).max())):
        return _constant(mean, n, family)
    alpha = (1 - LEVEL) / family
    reach = float(scipy.special.stdtrit(n - 1, 1 - alpha / 2)) * error
    p = 2 * float(scipy.special.stdtr(n - 1, -abs(mean) / error))
    return Interval(mean, mean - reach, mean + reach, n, p)


def paired(one: Array, other: Array, family: int = 1) -> Interval:
    """Return how far one arm is above another, from the seeds in which both have a value.

    Args:
        one: Of each seed, (seeds,), in the order of the seeds; NaN where there is none.
        other: The same of the other arm.
        family: As for `interval_of`.
    """
    return interval_of(np.asarray(one, dtype=float) - np.asarray(other, dtype=float), family)


def _constant(mean: float, n: int, family: int) -> Interval:
    """All seeds agree to the last digit, as coarse measures do: only their signs are left to count."""
    if mean == 0:
        return Interval(0.0, 0.0, 0.0, n, 1.0, constant=True)
    p = 2.0 ** (1 - n)  # of n fair coins that all show the same side
    sure = p < (1 - LEVEL) / family
    return Interval(mean, mean if sure else None, mean if sure else None, n, p, constant=True)


def cannot_win(deficit: Array, before: Array, family: int) -> bool:
    """Whether an arm is given up: far behind at two looks in a row, and not catching up.

    "Far" is p < 0.001 in the paired test, divided by the number of comparisons. That is no proof that the arm would not
    have overtaken later, as slow learners do: hence the second look, and hence no arm is given up that has come nearer
    in between.

    Args:
        deficit: By how much it is behind the leader now, seed by seed, (seeds,); NaN where unknown.
        before: The same at the look before.
        family: As for `interval_of`.
    """
    now, then = interval_of(deficit), interval_of(before)
    far = GIVEN_UP / family
    for seen in (now, then):
        if seen.p is None or seen.constant or not seen.p < far or not (seen.mean or 0.0) > 0:
            return False
    return (now.mean or 0.0) >= (then.mean or 0.0)
