"""Privacy accounting: pure functions from what was done to epsilon. Nothing here remembers anything.

One DP-SGD step on a Poisson draw of rate q with noise multiplier sigma is the subsampled Gaussian mechanism.

- RDP (Mironov et al. 2019, arXiv:1908.10530): a vector over ORDERS, which adds up over steps; to epsilon by Balle et
  al. 2020 (arXiv:1905.09982, Theorem 21): eps = min over alpha of RDP(alpha) + conv(alpha), with
  conv(alpha) = log(1 - 1/alpha) - (log delta + log alpha) / (alpha - 1).
- PRV (Gopi et al. 2021, arXiv:2106.02848): numerical composition; the upper end of its error bound is what counts.
- Gaussian (Balle and Wang 2018, arXiv:1805.06530), exact, where nothing is subsampled: at q = 1, and for one unit
  that took part m_t times in step t: mu² = sum of (m_t / sigma_t)².

Every function returns an upper bound, or what its name says is exact. The central-limit Gaussian approximation for
subsampled noise and hand-made moments bounds are not offered: both report less than is spent.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from importlib import metadata
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy  # its parts load when they are first used
from numpy.typing import NDArray

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.privacy.replace_one import ReplaceOnePRV, replace_one_log_moment

Array = NDArray[np.float64]
Step = tuple[float, float, int]  # noise multiplier, sample rate, how many such steps
Adjacency = Literal["add_remove", "replace_one"]

SENSITIVITY: dict[Adjacency, int] = {
    "add_remove": 1,
    "replace_one": 2,
}  # in units of C: a replaced gradient may turn

ORDERS: Array = (
    np.array(  # dense where a large epsilon has its minimum, and up to where that of a small one lies
        [1 + x / 10 for x in range(1, 100)]
        + [float(x) for x in (*range(12, 64), 72, 96, 128, 192, 256, 512, 1024)]
    )
)
CONVERSION: Array = np.log1p(-1 / ORDERS) - np.log(ORDERS) / (ORDERS - 1)  # conv(alpha), but for its delta
# added to a log moment: sums of thousands of terms are off by 1e-12, and may not make a step cheaper
ROUNDING = 1e-10
PRV_ERROR = 0.01  # the half-width of PRV's error bound on epsilon
PRV_POINTS = 4e6  # of a grid; where more would be needed, the error bound is widened instead,
PRV_WIDEST = 0.016  # up to here; then the grid grows again,
PRV_MOST = 16e6  # up to here: some 10 seconds and 1 GB, for 100,000 steps at an epsilon of dozens
PRV_STALLS = 100.0  # above this epsilon PRV takes for ever, and RDP is reported
REFUSED = {
    "moments": 'hand-made moments bounds report less than is spent, or 0 at a small sampling rate; use "rdp"',
    "gdp": "the central-limit accountant reports less than is spent (2.5 times less at sigma 0.6, q 0.01, 100 steps); "
    'use "rdp" or "prv"',
}


class Epsilon(NamedTuple):
    """A claimed epsilon.

    Attributes:
        value: Epsilon at the delta it was asked for.
        by: The accountant whose bound it is: "rdp", "prv" or "gaussian".
    """

    value: float
    by: str


def check_accountant(name: str) -> None:
    """Refuse an accountant that is not offered, with the reason.

    Raises:
        ValidationError: It is neither "rdp" nor "prv".
    """
    if name not in ("rdp", "prv"):
        reason = REFUSED.get(name, 'there are "rdp", and "prv", which is tighter and slower')
        raise ValidationError(f"accountant_type={as_given(name)} is not offered: {reason}.")


@lru_cache(maxsize=1)
def accountant_version() -> str:
    """Return whose RDP and PRV these are, with its version."""
    return f"opacus {metadata.version('opacus')}"


def sample_rate(expected_batch_size: int, dataset_size: int) -> float:
    """Return q = min(1, L/N), of the two public numbers that were declared."""
    both = (expected_batch_size, dataset_size)
    if any(isinstance(one, bool) or not isinstance(one, int | np.integer) or one < 1 for one in both):
        raise ValidationError(
            f"expected_batch_size and dataset_size are whole numbers of privacy units, from 1; they are "
            f"{as_given(expected_batch_size)} and {as_given(dataset_size)}."
        )
    return min(1.0, expected_batch_size / dataset_size)


# Rényi differential privacy


def rdp_of_step(sigma: float, q: float, adjacency: Adjacency = "add_remove") -> Array:
    """Return the RDP of one step at every order: (len(ORDERS),), kept for the next call, not to be written to.

    Args:
        sigma: Noise multiplier; 0 gives infinity at every order.
        q: Probability with which a unit is in the draw; 0 gives 0, 1 the Gaussian mechanism's alpha / (2 sigma²).
        adjacency: "add_remove" of one unit, or "replace_one" unit by another.
    """
    _check_step(sigma, q)
    return _rdp_of_step(float(sigma), float(q), adjacency)


@lru_cache(maxsize=256)
def _rdp_of_step(sigma: float, q: float, adjacency: Adjacency) -> Array:
    if q == 0:
        rdp = np.zeros_like(ORDERS)
    elif sigma == 0:
        rdp = np.full_like(ORDERS, math.inf)
    elif q == 1:
        rdp = rdp_of_mu_squared(_square(SENSITIVITY[adjacency] / sigma))
    else:
        log_moment = add_remove_log_moment if adjacency == "add_remove" else replace_one_log_moment
        moments = np.array([log_moment(order, sigma, q) for order in ORDERS])
        moments = np.where(np.isnan(moments), math.inf, np.maximum(moments, 0.0))
        # RDP grows with its order: an order that rounding took below a smaller one is lifted
        rdp = np.maximum.accumulate((moments + ROUNDING) / (ORDERS - 1))
    rdp.flags.writeable = False  # it is handed out again and again
    return rdp


def add_remove_log_moment(order: float, sigma: float, q: float) -> float:
    """Return (alpha - 1) · RDP(alpha) = log E[((1-q) + q e^((2z-1) / (2 sigma²)))^alpha], z from N(0, sigma²)."""
    from opacus.accountants.analysis.rdp import compute_rdp

    try:
        rdp = compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=float(order))
    except (ValueError, ArithmeticError):  # its logarithms left the range of numbers: this order says nothing
        return math.inf
    return float(rdp) * (float(order) - 1)


def rdp_of_mu_squared(mu_squared: float) -> Array:
    """Return the RDP of Gaussian mechanisms whose (sensitivity / noise)² add up to `mu_squared`."""
    return np.asarray(ORDERS * (mu_squared / 2))


def rdp_of_history(history: Iterable[Step], adjacency: Adjacency = "add_remove") -> Array:
    """Return the RDP of many steps, in whatever order they were taken."""
    total = np.zeros_like(ORDERS)
    for sigma, q, steps in merged(history):
        total = total + steps * rdp_of_step(sigma, q, adjacency)
    return total


def merged(history: Iterable[Step]) -> tuple[Step, ...]:
    """Return a history with equal steps counted together, and in one order: the same for every order of taking them.

    Raises:
        ValidationError: A step of it is none.
    """
    counts: dict[tuple[float, float], int] = {}
    for sigma, q, steps in history:
        _check_step(sigma, q)
        _check_count("steps", steps)
        counts[float(sigma), float(q)] = counts.get((float(sigma), float(q)), 0) + steps
    return tuple((sigma, q, steps) for (sigma, q), steps in sorted(counts.items()) if steps and q > 0)


def epsilon_of_rdp(rdp: Array, delta: float) -> float:
    """Return epsilon of an RDP vector over ORDERS: 0 where nothing was spent, never less."""
    _check_delta(delta)
    if not rdp.any():
        return 0.0
    return max(0.0, float(np.min(rdp + _conversion(delta))))


def epsilon_rdp(sigma: float, q: float, steps: int, delta: float) -> float:
    """Return epsilon of equal steps, by RDP.

    Example:
        >>> round(epsilon_rdp(1.0, 0.01, 1000, 1e-5), 3)
        2.101
    """
    return epsilon_of_rdp(rdp_of_history([(sigma, q, steps)]), delta)


def _conversion(delta: float) -> Array:
    return np.asarray(CONVERSION - math.log(delta) / (ORDERS - 1))


# The Gaussian mechanism, exactly


def epsilon_gaussian(mu: float, delta: float) -> float:
    """Return epsilon of the Gaussian mechanism with sensitivity / noise = mu, exactly.

    Solves delta = Phi(-eps/mu + mu/2) - e^eps Phi(-eps/mu - mu/2).
    """
    _check_delta(delta)
    if math.isnan(mu) or mu < 0:
        raise ValidationError(f"mu is a ratio of sensitivity to noise, from 0; it is {as_given(mu)}.")
    if mu == 0 or gaussian_log_delta(0.0, mu) <= math.log(delta):
        return 0.0
    # delta <= Phi(-eps/mu + mu/2) and Phi(-x) <= e^(-x²/2) / 2, so that epsilon is not above this
    above = mu * mu / 2 + mu * math.sqrt(-2 * math.log(delta))
    if math.isinf(above):
        return math.inf
    root = scipy.optimize.brentq(
        lambda epsilon: gaussian_log_delta(epsilon, mu) - math.log(delta), 0.0, above, xtol=1e-12, rtol=1e-14
    )
    return float(root) * (1 + 1e-12) + 1e-12  # rounded up: a bound is never below what it bounds


def mu_of_epsilon(epsilon: float, delta: float) -> float:
    """Return the largest mu whose exact Gaussian epsilon is not above the given one."""
    _check_delta(delta)
    if not 0 < epsilon < math.inf:
        raise ValidationError(f"epsilon is a positive number here; it is {as_given(epsilon)}.")
    above = 1.0
    while gaussian_log_delta(epsilon, above) < math.log(delta):
        above *= 2
    root = scipy.optimize.brentq(
        lambda mu: gaussian_log_delta(epsilon, mu) - math.log(delta),
        above * 1e-12,
        above,
        xtol=1e-14,
        rtol=1e-14,
    )
    return float(root) * (1 - 1e-12)


def gaussian_log_delta(epsilon: float, mu: float) -> float:
    """Return log delta of the Gaussian mechanism, with the ratio of its two terms as one of Mills ratios.

    e^eps Phi(-far) / Phi(-near) = erfcx(far / √2) / erfcx(near / √2), so that nothing overflows.
    """
    near, far = epsilon / mu - mu / 2, epsilon / mu + mu / 2
    ratio = scipy.special.erfcx(far / math.sqrt(2)) / scipy.special.erfcx(near / math.sqrt(2))
    return float(scipy.special.log_ndtr(-near)) + (math.log1p(-ratio) if ratio < 1 else -math.inf)


def mu_squared_of(multiplicity: int, sigma: float) -> float:
    """Return what one step adds to mu² of a unit that takes part in it `multiplicity` times."""
    _check_step(sigma, 1.0)
    _check_count("multiplicity", multiplicity)
    if multiplicity == 0:
        return 0.0
    return _square(multiplicity / sigma) if sigma else math.inf


def mu_of_participation(participation: Iterable[tuple[int, float]]) -> float:
    """Return mu of one unit from (multiplicity, sigma) of the steps that held it: mu² = sum of (m / sigma)²."""
    return math.sqrt(math.fsum(mu_squared_of(m, sigma) for m, sigma in participation))


# Privacy loss random variables


def epsilon_prv(history: Iterable[Step], delta: float, adjacency: Adjacency = "add_remove") -> float:
    """Return epsilon of many steps: the lesser of PRV's upper bound and RDP's; exact where every q is 1.

    Args:
        history: (sigma, q, steps), in any order.
        delta: Of the guarantee.
        adjacency: "add_remove" of one unit, or "replace_one" unit by another.
    """
    _check_delta(delta)
    return _epsilon_prv(merged(history), float(delta), adjacency)


@lru_cache(maxsize=256)
def _epsilon_prv(history: tuple[Step, ...], delta: float, adjacency: Adjacency) -> float:
    by_rdp = epsilon_of_rdp(rdp_of_history(history, adjacency), delta)
    if by_rdp == 0 or math.isinf(by_rdp):
        return by_rdp
    sampled = tuple(step for step in history if step[1] < 1)
    # Gaussian mechanisms, the steps with q = 1, compose to one: mu² = sum of (sensitivity / sigma)²
    mu_squared = math.fsum(n * _square(SENSITIVITY[adjacency] / sigma) for sigma, q, n in history if q == 1)
    if not sampled:
        return epsilon_gaussian(math.sqrt(mu_squared), delta)
    if by_rdp > PRV_STALLS:
        return by_rdp
    try:
        return min(by_rdp, max(0.0, composed_epsilon(sampled, mu_squared, delta, adjacency)))
    except (ValueError, RuntimeError):
        return by_rdp  # the grid is too coarse for this delta, and PRV says so: RDP's bound holds


def composed_epsilon(
    sampled: tuple[Step, ...], mu_squared: float, delta: float, adjacency: Adjacency
) -> float:
    """Return epsilon of composed privacy loss random variables, as Opacus's PRVAccountant has it, on a bounded grid.

    The mesh follows Gopi et al. 2021, theorem 5.5: h = eps_error / √(k/2 · log(12 / delta_error)) for k steps.

    Args:
        sampled: The steps with q < 1.
        mu_squared: Of all steps with q = 1, as one Gaussian mechanism.
        delta: Of the guarantee.
        adjacency: Of the variables.

    Raises:
        ValueError: The grid is too coarse for delta.
        RuntimeError: As well.
    """
    from opacus.accountants.analysis import prv

    delta_error = delta / 1000
    steps = sum(count for _, _, count in sampled) + (mu_squared > 0)
    reach = truncation_of(sampled, mu_squared, delta_error, adjacency)
    spread = math.sqrt(steps * math.log(12 / delta_error) / 2)  # mesh = error / spread
    span = 2 * reach * spread
    error = max(PRV_ERROR, min(span / PRV_POINTS, max(PRV_WIDEST, span / PRV_MOST)))
    domain = prv.Domain.create_aligned(-reach, reach, error / spread)
    variable: Any = prv.PoissonSubsampledGaussianPRV if adjacency == "add_remove" else ReplaceOnePRV
    variables = [(variable(q, sigma), count) for sigma, q, count in sampled]
    if mu_squared:
        variables.append((GaussianPRV(math.sqrt(mu_squared)), 1))
    parts = [
        prv.discretize(prv.TruncatedPrivacyRandomVariable(one, domain.t_min, domain.t_max), domain)
        for one, _ in variables
    ]
    composed = prv.compose_heterogeneous(parts, [count for _, count in variables])
    _lower, _estimate, upper = composed.compute_epsilon(delta, delta_error, error)
    return float(upper)


class GaussianPRV:
    """The privacy loss of the Gaussian mechanism, N(mu²/2, mu²), as `opacus.accountants.analysis.prv` composes it."""

    def __init__(self, mu: float) -> None:
        self._mu = mu

    def cdf(self, t: Array) -> Array:
        """Return the probability that the loss is at most t."""
        return np.asarray(scipy.special.ndtr(np.asarray(t) / self._mu - self._mu / 2))


def truncation_of(
    sampled: tuple[Step, ...], mu_squared: float, delta_error: float, adjacency: Adjacency
) -> float:
    """Return beyond which privacy loss the composition may be cut off (Gopi et al. 2021, remark 5.6)."""
    steps = sum(count for _, _, count in sampled) + (mu_squared > 0)
    singles = [rdp_of_step(sigma, q, adjacency) for sigma, q, _ in sampled]
    whole = rdp_of_history(sampled, adjacency)
    if mu_squared:
        singles.append(rdp_of_mu_squared(mu_squared))
        whole = whole + singles[-1]
    largest = max(epsilon_of_rdp(single, delta_error / (8 * steps)) for single in singles)
    return max(epsilon_of_rdp(whole, delta_error / 4), PRV_ERROR, largest) + 3


# A whole account


def epsilon_of_account(
    history: Iterable[Step],
    mu_squared: float,
    delta: float,
    accountant_type: str = "rdp",
    adjacency: Adjacency = "add_remove",
) -> Epsilon:
    """Return epsilon of an account, and by which accountant.

    Args:
        history: Its Poisson steps (sigma, q, count).
        mu_squared: The largest mu² of a unit over its worst-case steps.
        delta: Of the guarantee.
        accountant_type: "rdp", or "prv" for the lesser of both.
        adjacency: "add_remove" of one unit (its zeroing-out, for worst-case steps), or "replace_one".
    """
    check_accountant(accountant_type)
    return _epsilon_of_account(merged(history), mu_squared, delta, accountant_type, adjacency)


@lru_cache(maxsize=64)  # a step asks ten times about two accounts: as it was before, and as it is after it
def _epsilon_of_account(
    steps: tuple[Step, ...], mu_squared: float, delta: float, accountant_type: str, adjacency: Adjacency
) -> Epsilon:
    if not steps and mu_squared:
        mu = SENSITIVITY[adjacency] * math.sqrt(mu_squared)
        return Epsilon(epsilon_gaussian(mu, delta), "gaussian")
    if math.isinf(mu_squared):
        return Epsilon(math.inf, "rdp")
    if mu_squared:  # all worst-case steps together are one Gaussian mechanism, which every unit is in
        steps = merged([*steps, (1 / math.sqrt(mu_squared), 1.0, 1)])
    by_rdp = epsilon_of_rdp(rdp_of_history(steps, adjacency), delta)
    by_prv = math.inf if accountant_type == "rdp" else epsilon_prv(steps, delta, adjacency)
    return Epsilon(by_prv, "prv") if by_prv < by_rdp else Epsilon(by_rdp, "rdp")


# Forecasts


def projected_steps(target_epsilon: float, delta: float, past_rdp: Array, step_rdp: Array) -> int | None:
    """Return how many more such steps the target pays for, by RDP; None if there is no end.

    T* = max over alpha of floor((target - conv(alpha) - RDP_past(alpha)) / RDP_step(alpha)).
    """
    _check_delta(delta)
    if not step_rdp.any():
        return None
    left = target_epsilon - _conversion(delta) - past_rdp
    usable = np.isfinite(step_rdp) & (step_rdp > 0) & (left > 0)  # the orders at which any step fits
    if not usable.any():
        return 0
    steps = int(np.max(np.floor(left[usable] / step_rdp[usable])))
    while steps and epsilon_of_rdp(past_rdp + steps * step_rdp, delta) > target_epsilon:
        steps -= 1  # rounding
    return steps


def projected_participations(
    target_epsilon: float,
    delta: float,
    mu_squared: float,
    step_mu_squared: float,
    past_rdp: Array | None = None,
) -> int | None:
    """Return how many more worst-case steps the target pays for, if each adds so much to the largest mu².

    Args:
        target_epsilon: The budget.
        delta: Of the guarantee.
        mu_squared: The largest mu² of a unit so far.
        step_mu_squared: What a step adds to it.
        past_rdp: Of Poisson steps in the same account: then both compose in RDP.
    """
    if past_rdp is not None and past_rdp.any():
        past = past_rdp + rdp_of_mu_squared(mu_squared)
        return projected_steps(target_epsilon, delta, past, rdp_of_mu_squared(step_mu_squared))
    if step_mu_squared == 0:
        return None
    left = _square(mu_of_epsilon(target_epsilon, delta)) * (1 + 1e-9) - mu_squared
    steps = max(0, math.floor(left / step_mu_squared))
    while steps and epsilon_gaussian(math.sqrt(mu_squared + steps * step_mu_squared), delta) > target_epsilon:
        steps -= 1
    return steps


def solve_noise_multiplier(
    target_epsilon: float, delta: float, sample_rate: float, steps: int, accountant_type: str = "rdp"
) -> float:
    """Return the least noise multiplier, to 1 in 10,000, with which so many steps cost no more than the target.

    Args:
        target_epsilon: What may be spent.
        delta: Of the guarantee.
        sample_rate: q = L/N.
        steps: Planned optimiser steps.
        accountant_type: "rdp" or "prv".

    Raises:
        ValidationError: An argument does not fit, or no noise multiplier up to 10,000 reaches the target.
    """
    _check_step(1.0, sample_rate)
    _check_count("steps", steps)
    if not 0 < target_epsilon < math.inf:
        raise ValidationError(f"target_epsilon is a positive number; it is {as_given(target_epsilon)}.")
    if not steps or not sample_rate:
        raise ValidationError(
            "No noise is needed where nothing is released: give steps and a sample_rate above 0."
        )

    def spends(sigma: float) -> float:
        return epsilon_of_account([(sigma, sample_rate, steps)], 0.0, delta, accountant_type).value

    # epsilon falls as sigma grows: doubling brackets the least sigma, halving finds it
    low, high = 0.0, 1.0
    while spends(high) > target_epsilon:
        low, high = high, high * 2
        if high > 1e4:
            raise ValidationError(
                f"No noise multiplier up to 10,000 keeps epsilon at {target_epsilon:g}. Plan fewer steps, a smaller "
                f"sample rate, a larger target_epsilon or a larger delta."
            )
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if spends(middle) <= target_epsilon else (middle, high)
    return high


# Checks


def _square(value: float) -> float:
    return value * value  # `**` raises where this gives infinity


def _check_step(sigma: float, q: float) -> None:
    if not 0 <= sigma < math.inf:
        raise ValidationError(f"noise_multiplier is a number from 0; it is {as_given(sigma)}.")
    if not 0 <= q <= 1:
        raise ValidationError(f"The sample rate q is a probability: L/N, from 0 to 1; it is {as_given(q)}.")


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise ValidationError(f"{name} is a whole number from 0; it is {as_given(value)}.")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValidationError(f"delta is a probability above 0 and below 1; it is {as_given(delta)}.")
