"""A LoRA layer whose forward and backward passes are one node of autograd's graph: PEFT's formula, fewer passes.

PEFT's layer is a chain of five operations, two of which write a tensor as large as the layer's output (the scaled
update, the sum) and, in bfloat16, convert its input to float32 and back. Here the update is added in place by the
matrix product itself, in both directions. PEFT makes the layers, saves and loads them: only `forward` is ours.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tensafe_nb.engine.sampling import native
from tensafe_nb.privacy.per_example import GradientRecord


class FusedLinear(lora.Linear):  # type: ignore[misc]
    """PEFT's adapted `nn.Linear`; what is not the plain case of one adapter without dropout is left to PEFT.

    Attributes:
        compiled: Whether products with the frozen weight are those of `native`, where it has quicker ones.
        record: Takes what the gradients of its parameters are made of, in their place; None when nobody asks for units.
    """

    compiled = False
    record: GradientRecord | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self.active_adapters
        if args or kwargs or self.disable_adapters or self.merged or len(names) != 1:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        (name,), base = names, self.base_layer
        plain = type(base) is nn.Linear and not base.weight.requires_grad and not self.lora_variant
        if not plain or (self.training and not isinstance(self.lora_dropout[name], nn.Identity)):
            return super().forward(x)  # type: ignore[no-any-return]
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        if not torch.is_grad_enabled():  # a node that nobody asks takes as long as a small layer
            return adapted(x, base.weight, base.bias, a, b, self.scaling[name], self.compiled)[0]
        return LoRAFunction.apply(  # type: ignore[no-any-return, no-untyped-call]
            x, base.weight, base.bias, a, b, self.scaling[name], self.record, self.compiled
        )


def adapted(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, compiled: bool
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return x Wᵀ + c + s (x Aᵀ) Bᵀ, and what its gradient is made of: x, s x Aᵀ, A and B in the type of W."""
    kind = weight.dtype  # x: (B, T, in), W: (out, in), A: (r, in), B: (out, r)
    rows, a, b = x.reshape(-1, x.shape[-1]).to(kind), a.to(kind), b.to(kind)
    low = (rows @ a.T).mul_(scaling)  # (B·T, r)
    if compiled and native.trains(len(rows)):
        y = native.product((rows, weight), (low, b), transposed=True)
        if bias is not None:
            y += bias
    else:
        y = F.linear(rows, weight, None if bias is None else bias.to(kind)).addmm_(low, b.T)
    return y.view(*x.shape[:-1], y.shape[-1]), (rows, low, a, b)


class FrozenLinear(torch.autograd.Function):
    """x Wᵀ + c of a layer that is not trained, by the products of `native`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        y = native.product((x.reshape(-1, x.shape[-1]), weight), transposed=True)
        return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        slopes = gradient.reshape(-1, gradient.shape[-1])
        return (
            native.product((slopes, ctx.weight), transposed=False).view(*gradient.shape[:-1], -1),
            None,
            None,
        )


class LoRAFunction(torch.autograd.Function):
    """x Wᵀ + c + s (x Aᵀ) Bᵀ (Hu et al. 2021, arXiv:2106.09685), computed in the type of the frozen W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        record: GradientRecord | None,
        compiled: bool,
    ) -> Tensor:
        ctx.weight, ctx.scaling, ctx.record, ctx.trained = weight, scaling, record, (bias, a, b)
        ctx.compiled = compiled
        y, (rows, low, a, b) = adapted(x, weight, bias, a, b, scaling, compiled)
        learns_a = ctx.needs_input_grad[3]  # only ∂A takes the rows: without it they need not be kept
        ctx.save_for_backward(rows if learns_a else None, low, a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, a, b = ctx.saved_tensors
        slopes = gradient.reshape(-1, gradient.shape[-1])  # ∂y: (B·T, out)
        low_slopes = (slopes @ b).mul_(ctx.scaling)  # (B·T, r)
        to_x = to_bias = None
        if ctx.needs_input_grad[0]:
            # ∂x = ∂y W + s ∂y B A, the update added in place by the second product
            if ctx.compiled and native.trains(len(slopes)):
                to_x = native.product((slopes, ctx.weight), (low_slopes, a), transposed=False)
            else:
                to_x = (slopes @ ctx.weight).addmm_(low_slopes, a)
            to_x = to_x.view(*gradient.shape[:-1], a.shape[1])
        if ctx.record is not None:
            hand_over(ctx, len(gradient), slopes, low_slopes, rows, low)
            return to_x, *[None] * 7
        if ctx.needs_input_grad[2]:
            to_bias = slopes.sum(0)
        # ∂A = s (∂y B)ᵀ x and ∂B = s ∂yᵀ (x Aᵀ); s is in both factors already
        to_a = None if rows is None else low_slopes.T @ rows
        return to_x, None, to_bias, to_a, (low.T @ slopes).T, None, None, None


def hand_over(
    ctx: Any, count: int, slopes: Tensor, low_slopes: Tensor, rows: Tensor | None, low: Tensor
) -> None:
    """Give the record what the gradients of bias, A and B of a batch's rows are made of."""

    def apart(flat: Tensor) -> Tensor:
        return flat.view(count, -1, flat.shape[-1])  # (B, T, …)

    bias, a, b = ctx.trained
    if bias is not None and bias.requires_grad:
        ctx.record.rows(bias, apart(slopes).sum(1, dtype=torch.float32))
    if rows is not None:
        ctx.record.factors(a, apart(low_slopes), apart(rows))
    ctx.record.factors(b, apart(slopes), apart(low))
