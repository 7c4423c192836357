"""Products with frozen matrices: by the library that is quicker on this processor, MKL (torch's own choice) or oneDNN.

On AMD processors with AVX-512, oneDNN's float32 kernels are some 5 to 20 % ahead of MKL's; with AVX2 neither is, and on
Intel's MKL is at home. Both add in float32, in another order.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

AT_LEAST = (
    2**16
)  # numbers of a matrix: for smaller ones, oneDNN's first call at each shape costs more than it saves


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + c of (rows, in) and a frozen W, (out, in); no gradient is recorded."""
    if by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)


def transposed(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W of (rows, out) and a frozen W, (out, in); no gradient is recorded."""
    if by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight.t(), None, "none", [], None)  # type: ignore[no-any-return]
    return x @ weight


class FrozenLinear(torch.autograd.Function):
    """x Wᵀ + c of (…, in) and frozen W and c: the head, above all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        slopes = transposed(gradient.reshape(-1, gradient.shape[-1]), ctx.weight)
        return slopes.view(*gradient.shape[:-1], slopes.shape[-1]), None, None


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies these."""
    plain = x.dtype is torch.float32 and weight.dtype is torch.float32 and x.device.type == "cpu"
    return plain and weight.numel() >= AT_LEAST and x.shape[0] > 1 and onednn_is_quicker()


@cache
def onednn_is_quicker() -> bool:
    """Whether this is a processor of AMD's on which torch uses AVX-512; as torch tells."""
    told = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    there = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and wide and str(told.get("cpu_name", "")).startswith("AMD")
