"""The subsampled Gaussian mechanism when one unit is replaced by another, which costs more than its removal.

With probability q the unit's clipped gradient is in the sum; replaced, it may point the other way. In units of C:

    P = (1-q) N(0, sigma²) + q N(+1, sigma²)        Q = (1-q) N(0, sigma²) + q N(-1, sigma²)

Mirrored at 0, P is Q: one direction is both.
"""

import numpy as np
import scipy
from numpy.typing import NDArray

LEAST_SIGMA = 0.05  # below, the bound for q = 1 is used: at no noise to speak of, sampling hides nothing
GRID = 32  # points per sigma: the trapezoidal rule is exact to rounding on what falls off like a Gaussian


def replace_one_log_moment(order: float, sigma: float, q: float) -> float:
    """Return log of the integral of P^alpha Q^(1-alpha), or a bound of it: (alpha - 1) · RDP(alpha)."""
    if sigma < LEAST_SIGMA:
        return float(order * (order - 1) * 2 / sigma / sigma) if sigma > 1e-100 else np.inf
    # the integrand's peaks lie within [-1, 2 alpha - 1], and are as wide as P's
    reach = 2 * order + 12 * sigma
    points = int((reach + 1 + 12 * sigma) / sigma * GRID)
    x, width = np.linspace(-1 - 12 * sigma, reach, points, retstep=True)
    integrand = order * _log_mixture(x, sigma, q) + (1 - order) * _log_mixture(-x, sigma, q)
    return float(scipy.special.logsumexp(integrand) + np.log(width))


def _log_mixture(x: NDArray[np.float64], sigma: float, q: float) -> NDArray[np.float64]:
    """Return log P(x); log Q(x) is log P(-x)."""
    normal = -np.log(sigma * np.sqrt(2 * np.pi))
    zero, one = np.log1p(-q) - (x / sigma) ** 2 / 2, np.log(q) - ((x - 1) / sigma) ** 2 / 2
    return np.asarray(np.logaddexp(zero, one) + normal)


class ReplaceOnePRV:
    """The privacy loss log P/Q under P, as `opacus.accountants.analysis.prv` composes it."""

    def __init__(self, sample_rate: float, noise_multiplier: float) -> None:
        self._q, self._sigma = sample_rate, noise_multiplier

    def cdf(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the probability under P that the loss is at most t: the loss grows with x, so x(t) decides."""
        x = self._where_loss_is(np.asarray(t, dtype=np.float64))
        outside, inside = scipy.special.ndtr(x / self._sigma), scipy.special.ndtr((x - 1) / self._sigma)
        return np.asarray((1 - self._q) * outside + self._q * inside)

    def _where_loss_is(self, t: NDArray[np.float64]) -> NDArray[np.float64]:
        """Solve log P(x)/Q(x) = t, a quadratic in y = e^(x/sigma²): c y² - (1-q)(e^|t| - 1) y - e^|t| c = 0."""
        sigma, q, size = self._sigma, self._q, np.abs(t)
        log_c = np.log(q) - 1 / (2 * sigma**2)
        half = (1 - q) * -np.expm1(-size) / 2  # everything divided by e^|t|
        log_root = (
            np.logaddexp(np.log(half, where=half > 0, out=np.full_like(half, -np.inf)) * 2, 2 * log_c - size)
            / 2
        )
        log_y = np.log(half + np.exp(log_root)) + size - log_c
        return np.asarray(np.sign(t) * log_y * sigma**2)
