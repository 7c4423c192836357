"""DP-SGD (Abadi et al. 2016, arXiv:1607.00133): clip each unit's gradient, add up, add noise once, divide by L.

    g'_u = g_u · min(1, C / (‖g_u‖ + 1e-6))        G = Σ_u g'_u + N(0, (σC)² I)        step with G / L

The norm runs over all trained parameters together. L is a public constant, never the number of units that came.
Sum, noise and division are float64; the quotient is rounded once, into the type of the weights (see `noise`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tensafe_nb.privacy.noise import NoiseSource
from tensafe_nb.privacy.per_example import PerUnit

EPSILON = 1e-6  # in the clip factor, as Opacus has it


@dataclass(frozen=True, slots=True)
class Norms:
    """The units of a step so far, for the operator: no noise covers these.

    Attributes:
        units: How many.
        before: Sum of their norms.
        after: Sum of min(norm, C).
        clipped: How many had a norm above C.
    """

    units: int = 0
    before: float = 0.0
    after: float = 0.0
    clipped: int = 0

    def __add__(self, other: "Norms") -> "Norms":
        return Norms(
            self.units + other.units,
            self.before + other.before,
            self.after + other.after,
            self.clipped + other.clipped,
        )

    @property
    def means(self) -> tuple[float, float]:
        """Mean norm before and after clipping; 0 without units."""
        count = max(self.units, 1)
        return self.before / count, self.after / count


class ClippedSum:
    """The sum of clipped gradients of one logical step.

    Args:
        parameters: What is trained, all of one type in one place; a unit's norm runs over all of it.
        max_grad_norm: C.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], max_grad_norm: float) -> None:
        self._parameters, self._limit = parameters, max_grad_norm
        self._sizes = [parameter.numel() for parameter in parameters]
        self.clear()

    def clear(self) -> None:
        """Forget the sum: nothing of it was released."""
        self._sum: Tensor | None = None  # of all parameters, one behind the other
        self._parts: list[Tensor] = []  # of it, each parameter's
        self.norms = Norms()

    def add(self, gradients: Sequence[PerUnit]) -> None:
        """Clip and add the gradients of some units, for each parameter.

        A unit with a value that is NaN or infinite counts as zero: to leave the step out for it would tell of it.
        """
        factors = self._factors(gradients)  # (units,)
        counts = factors > 0
        finite = bool(counts.all())
        for total, gradient in zip(self._totals(), gradients, strict=True):
            (gradient if finite else gradient.only(counts)).add_to(total, factors)

    def release(self, noise_multiplier: float, expected_units: float, noise: NoiseSource) -> list[Tensor]:
        """Return (sum + noise) / L for each parameter, and forget the sum; without units it is noise alone.

        Computed in float64 and rounded once, into each parameter's type: what an optimiser, its moments included, gets
        to see.
        """
        total, of = self._whole(), self._parameters[0]
        if total.device.type == "mps":  # Apple's devices have no float64
            total = total.cpu()
        self.clear()
        if noise_multiplier:
            like = torch.empty_like(total, dtype=torch.float64)  # filled by nobody
            (exact,) = noise([like], noise_multiplier * self._limit)  # N(0, (σC)² I), once for the whole step
            exact.add_(total)
        else:
            exact = total.double()
        # rounded where float64 is, then moved
        return self._apart(exact.div_(expected_units).to(of.dtype).to(of.device))

    @property
    def norm(self) -> float:
        """Norm of the sum, before noise."""
        return 0.0 if self._sum is None else float(nn.utils.get_total_norm(self._totals()))

    def _whole(self) -> Tensor:
        if self._sum is None:
            self._sum = torch.zeros(sum(self._sizes), dtype=torch.float32, device=self._parameters[0].device)
            self._parts = self._apart(self._sum)
        return self._sum

    def _totals(self) -> list[Tensor]:
        self._whole()
        return self._parts

    def _apart(self, whole: Tensor) -> list[Tensor]:
        """Return each parameter's part of what stands one behind the other."""
        parts = torch.split(whole, self._sizes)
        return [part.view(p.shape) for part, p in zip(parts, self._parameters, strict=True)]

    def _factors(self, gradients: Sequence[PerUnit]) -> Tensor:
        """Return (units,) what each unit's gradient is multiplied by; 0 for one that is not finite."""
        # (layers, units); ‖g_u‖² runs over all parameters together: a bound per layer would be another mechanism
        squares = torch.stack([gradient.squares() for gradient in gradients])
        norms = squares.sum(0).sqrt()
        finite = norms.isfinite()
        shown = torch.where(finite, norms, 0)
        self.norms += Norms(
            len(norms),
            float(shown.sum()),
            float(shown.clamp(max=self._limit).sum()),
            int((shown > self._limit).sum()),
        )
        return torch.where(finite, (self._limit / (norms + EPSILON)).clamp(max=1.0), 0)
