"""Per-example gradients: one backward pass through a batch, kept apart for each of its rows.

Two ways, one contract. `LinearGradients` does book-keeping inside the linear layers themselves (Bu et al. 2022,
arXiv:2210.00038): the backward pass that would add a weight's gradient up over rows keeps it apart instead, at the
same cost. `HookedGradients` is Opacus, for layers of any other kind. Neither touches the model outside `recording()`:
a stray forward pass, in whatever mode, leaves nothing behind.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tensafe_nb.errors import PrivacyUnitError

Sink = Callable[[nn.Parameter, Tensor], None]


class PerExampleGradients(Protocol):
    """A way to see a batch's gradients row by row."""

    name: str

    def recording(self) -> contextlib.AbstractContextManager[None]:
        """Watch one forward and one backward pass of the sum of the rows' losses."""

    def collect(self, rows: int) -> list[Tensor]:
        """Return, and forget, what was seen: for each parameter (rows, *shape), in float32.

        Raises:
            PrivacyUnitError: A layer saw other rows than the batch has.
        """


def way_for(model: nn.Module, parameters: Sequence[nn.Parameter]) -> PerExampleGradients | None:
    """Return a way that may do for a model's trained parameters; None where there is none."""
    trained = set(map(id, parameters))
    owners = [m for m in model.modules() if any(id(p) in trained for p in m.parameters(recurse=False))]
    if all(type(module) is nn.Linear for module in owners):
        return LinearGradients(model, owners, parameters)  # type: ignore[arg-type]
    if any(list(module.buffers(recurse=False)) for module in owners):
        return None  # Opacus refuses these
    return HookedGradients(model, owners, parameters)


class LinearGradients:
    """For models whose trained parameters all belong to `nn.Linear` layers: LoRA, above all.

    A module with a `sink`, such as the engine's LoRA layer, does it for the layers within it.

    Args:
        model: The model.
        layers: The layers.
        parameters: Their trained parameters, in the order in which gradients are returned.
    """

    name = "book-keeping"

    def __init__(
        self, model: nn.Module, layers: Sequence[nn.Linear], parameters: Sequence[nn.Parameter]
    ) -> None:
        self._fused = _with("sink", model)
        self._layers, self._parameters = layers, parameters
        self._seen: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        self._seen.clear()
        for layer in self._layers:
            layer.forward = partial(rowwise_linear, layer, self._take)  # type: ignore[method-assign]
        for module in self._fused:
            module.sink = self._take
        try:
            yield
        finally:
            for module in self._fused:
                module.sink = None
            for layer in self._layers:
                del layer.forward

    def collect(self, rows: int) -> list[Tensor]:
        seen, self._seen = self._seen, {}
        return [_rows_of(seen.get(id(p)), p, rows) for p in self._parameters]

    def _take(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        before = self._seen.get(id(parameter))
        if before is not None and before.shape != gradients.shape:
            raise PrivacyUnitError("A layer that is used twice saw different rows each time.")
        # a layer that the forward pass uses twice, such as tied weights: their gradients add up, row by row
        self._seen[id(parameter)] = gradients if before is None else before + gradients


def _with(attribute: str, model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(type(module), attribute)]


def rowwise_linear(layer: nn.Linear, sink: Sink, inputs: Tensor) -> Tensor:
    """Return what a layer makes of its inputs; the backward pass tells `sink` the gradients of each row."""
    return RowwiseLinear.apply(inputs, layer.weight, layer.bias, sink)  # type: ignore[no-any-return, no-untyped-call]


class RowwiseLinear(torch.autograd.Function):
    """x Wᵀ + b, whose backward pass hands over the gradients of W and b of each row instead of their sum."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, sink: Sink
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.weight, ctx.bias, ctx.sink = weight, bias, sink
        return F.linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        (inputs,), weight, bias = ctx.saved_tensors, ctx.weight, ctx.bias
        rows = gradient.shape[0]
        backprops = gradient.reshape(rows, -1, gradient.shape[-1])  # (B, T, out)
        if weight.requires_grad:
            activations = inputs.reshape(rows, -1, inputs.shape[-1]).to(gradient.dtype)  # (B, T, in)
            # the gradient of W for row b is Σ_t backprop[b, t] activation[b, t]ᵀ, and autograd would add over b, too
            ctx.sink(weight, torch.bmm(backprops.transpose(1, 2), activations).float())
        if bias is not None and bias.requires_grad:
            ctx.sink(bias, backprops.sum(1, dtype=torch.float32))
        needed = ctx.needs_input_grad[0]
        return (gradient @ weight.to(gradient.dtype)).to(inputs.dtype) if needed else None, None, None, None


class HookedGradients:
    """Opacus's hooks (Yousefpour et al. 2021, arXiv:2109.12298), put on for one pass and taken off after it.

    Args:
        model: The model.
        owners: Its modules that have trained parameters of their own.
        parameters: Its trained parameters, in the order in which gradients are returned.
    """

    name = "opacus hooks"

    def __init__(
        self, model: nn.Module, owners: Sequence[nn.Module], parameters: Sequence[nn.Parameter]
    ) -> None:
        self._model, self._owners, self._parameters = model, owners, parameters
        self._fused = _with("in_parts", model)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        from opacus.grad_sample import GradSampleHooks

        hooks = GradSampleHooks(self._model, loss_reduction="sum")
        before = [module.training for module in self._owners]
        for module in self._owners:  # the hooks look away from others; dropout is no owner
            module.training = True
        for module in self._fused:
            module.in_parts = True
        try:
            with warnings.catch_warnings():  # of hooks on embeddings, whose inputs are numbers of tokens
                warnings.filterwarnings("ignore", "Full backward hook is firing")
                yield
        finally:
            hooks.remove_hooks()
            for module in self._fused:
                module.in_parts = False
            for module, training in zip(self._owners, before, strict=True):
                module.training = training
                module.__dict__.pop("activations", None)
                module.__dict__.pop("max_batch_len", None)

    def collect(self, rows: int) -> list[Tensor]:
        found = [getattr(p, "grad_sample", None) for p in self._parameters]
        for parameter in self._parameters:
            for left in ("grad_sample", "_current_grad_sample", "_forward_counter"):
                parameter.__dict__.pop(left, None)
        return [_rows_of(seen, p, rows) for seen, p in zip(found, self._parameters, strict=True)]


def _rows_of(seen: Any, parameter: nn.Parameter, rows: int) -> Tensor:
    """Return (rows, *shape); zeros for a parameter that the loss does not depend on."""
    if seen is None:
        return parameter.new_zeros((rows, *parameter.shape), dtype=torch.float32)
    if not isinstance(seen, Tensor) or seen.shape != (rows, *parameter.shape):
        shape = tuple(seen.shape) if isinstance(seen, Tensor) else "several"
        raise PrivacyUnitError(
            f"A layer of this model mixes the rows of a batch: for {rows} rows it gives gradients of shape {shape}."
        )
    return seen.float()
