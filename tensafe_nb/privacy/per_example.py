"""The gradient of each privacy unit by one backward pass: book-keeping (Bu et al. 2022, arXiv:2210.00038).

A weight's gradient for a unit is a sum over the unit's tokens, Σ_t l_t r_tᵀ, of what came back to the layer (l) and
what had gone in (r). The backward pass that would add it up over all tokens of the batch hands both over instead. Where
that takes fewer numbers the gradient is written out for each unit, as it is for LoRA's A and B. Else they are kept:

    ‖g_u‖² = Σ_{t,s} (l_t · l_s)(r_t · r_s)        Σ_u f_u g_u = Σ_t f_{u(t)} l_t r_tᵀ

so that the norm takes no gradient (ghost clipping: Goodfellow 2015, arXiv:1510.01799; Li et al. 2022,
arXiv:2110.05679), and the clipped sum one product over all tokens. A weight that is used twice, such as a head tied to
its embedding, has the products of both uses, and its norm the terms between them. Nothing touches the model outside
`recording()`: a stray forward pass, in whatever mode, leaves nothing behind.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tensafe_nb.errors import PrivacyUnitError

CANCELS = 2e-4  # a norm² below this part of what its terms could add up to is computed again, in float64


class PerUnit(Protocol):
    """The gradients of one parameter for each of some units."""

    def squares(self) -> Tensor:
        """Return (units,) of each the norm, squared."""

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        """Add Σ_u f_u g_u to a float32 tensor in the parameter's shape; `factors`: (units,)."""

    def only(self, counts: Tensor) -> "PerUnit":
        """Return them with zeros for the units that do not count, whatever theirs are; `counts`: (units,)."""

    def written_out(self) -> Tensor:
        """Return (units, *shape)."""


class WrittenOut(NamedTuple):
    """Gradients as they are, or column by column in memory."""

    values: Tensor  # (units, *shape)

    def squares(self) -> Tensor:
        # a sum by halves: torch's own norm of 3e7 numbers is off by a thousandth
        return self.values.square().sum(tuple(range(1, self.values.ndim)))

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        if len(factors) == 1:
            total.add_(self.values[0] * factors[0])
        elif self.values.is_contiguous():
            total.view(-1).addmv_(self.values.flatten(1).t(), factors)
        else:
            columns = self.values.transpose(1, 2)  # (units, in, out)
            total.add_((factors @ columns.flatten(1)).view(columns.shape[1:]).t())

    def only(self, counts: Tensor) -> "WrittenOut":
        return WrittenOut(_zero_where_not(counts, self.values))  # NaN · 0 is NaN

    def written_out(self) -> Tensor:
        return self.values


class Use(NamedTuple):
    """What came back to one use of a weight and what had gone in, for K tokens of each unit."""

    left: Tensor  # (units, K, out); or (units, K) numbers of the rows of the weight, each a one-hot vector
    right: Tensor  # (units, K, in)


class Factored(NamedTuple):
    """Gradients as products that nobody has multiplied: Σ_t l_t r_tᵀ, added up over uses of the weight."""

    uses: Sequence[Use]
    shape: torch.Size  # of the parameter: (out, in)

    def squares(self) -> Tensor:
        found, most = self._squares(lambda values: values.float())
        # terms that cancel leave their rounding, some 1e-7 of `most`, in what is left
        if bool((found < CANCELS * most).any()):
            found, _ = self._squares(lambda values: values.double())
        return found.clamp(min=0).float()

    def _squares(self, precise: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return (units,) the norms squared, and what they would be if all terms pointed the same way."""
        uses = [(left if left.ndim == 2 else precise(left), precise(right)) for left, right in self.uses]
        found = lengths = uses[0][1].new_zeros(len(uses[0][1]))
        for i, (left, right) in enumerate(uses):
            for other_left, other_right in uses[:i]:  # l_t r_tᵀ of one use with those of another
                cross = gram(left, other_left) * gram(right, other_right)
                found = found + 2 * cross.sum((1, 2))
            terms = gram(left, left) * gram(right, right)  # (units, K, K)
            found = found + terms.sum((1, 2))
            lengths = lengths + terms.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().sum(1)  # Σ_t |l_t| |r_t|
        return found, lengths.square()

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        for left, right in self.uses:
            weighted = (right.float() * factors[:, None, None]).flatten(0, 1)
            if left.ndim == 2:
                total.index_add_(0, left.flatten(), weighted)
            else:
                total.addmm_(left.float().flatten(0, 1).t(), weighted)

    def only(self, counts: Tensor) -> "Factored":
        return Factored([Use(*(_zero_where_not(counts, f) for f in use)) for use in self.uses], self.shape)

    def written_out(self) -> Tensor:
        found: Tensor | None = None
        for left, right in self.uses:
            if left.ndim == 2:
                one = torch.zeros((len(right), *self.shape), device=right.device)
                one.scatter_add_(1, left.unsqueeze(2).expand_as(right), right.float())
            elif left.shape[2] <= right.shape[2]:
                one = torch.bmm(left.transpose(1, 2), right)
            else:  # a product of a narrow matrix with a wide one takes a quarter of the time of the other way round
                one = torch.bmm(right.transpose(1, 2), left).transpose(1, 2)
            found = one.float() if found is None else found.add_(one)
        assert found is not None
        return found


def gram(one: Tensor, other: Tensor) -> Tensor:
    """Return (units, K, K') the inner products of vectors (units, K, D), or of one-hot ones by number, (units, K)."""
    if one.ndim == 2 and other.ndim == 2:
        return one.unsqueeze(2) == other.unsqueeze(1)
    if one.ndim == 2:
        return gram(other, one).transpose(1, 2)
    if other.ndim == 2:
        return one.gather(2, other.unsqueeze(1).expand(-1, one.shape[1], -1))
    return torch.bmm(one, other.transpose(1, 2))


def _zero_where_not(counts: Tensor, values: Tensor) -> Tensor:
    return torch.where(counts.view(-1, *[1] * (values.ndim - 1)), values, 0)


class GradientRecord(Protocol):
    """Whom layers tell, in the backward pass, in place of adding to a parameter's gradient."""

    def factors(self, parameter: nn.Parameter, left: Tensor, right: Tensor) -> None:
        """Take what came back, (B, T, out) or rows of the parameter (B, T), and what had gone in, (B, T, in)."""

    def rows(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        """Take the gradient of each of the batch's rows, (B, *shape)."""


class BookKeeping:
    """Tells the gradients of units apart in models whose trained parameters all belong to layers that it knows.

    A module with a `record`, such as the engine's LoRA layer, does it for the layers within it.

    Args:
        model: The model.
        layers: The modules with trained parameters, and what each computes while it is recorded.
        parameters: The trained parameters, in the order in which gradients are returned.
    """

    name = "book-keeping"

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[nn.Module, "Recorded"],
        parameters: Sequence[nn.Parameter],
    ) -> None:
        self._telling: list[Any] = [module for module in model.modules() if hasattr(type(module), "record")]
        self._layers, self._parameters = layers, parameters
        self._seen: dict[int, PerUnit] = {}
        self._sizes: list[int] = []

    def held(self, tokens: int) -> int:
        """Return how many numbers are kept of a row of so many tokens."""
        return sum(min(p.numel(), tokens * sum(p.shape)) for p in self._parameters)

    @contextlib.contextmanager
    def recording(self, sizes: Sequence[int]) -> Iterator[None]:
        """Watch one forward and one backward pass of the sum of the rows' losses.

        Args:
            sizes: How many rows each unit has; its rows follow each other.
        """
        self._seen, self._sizes = {}, list(sizes)
        # straight into their dictionaries: a module looks through its tables at each name that is set
        for layer, forward in self._layers.items():
            layer.__dict__["forward"] = partial(forward, layer, self)
        for module in self._telling:
            module.__dict__["record"] = self
        try:
            yield
        finally:
            for module in self._telling:
                del module.__dict__["record"]
            for layer in self._layers:
                del layer.__dict__["forward"]

    def collect(self) -> list[PerUnit]:
        """Return, and forget, what was seen, for each parameter; zeros where the loss does not depend on it."""
        seen, self._seen = self._seen, {}
        units = len(self._sizes)
        return [
            seen[id(p)] if id(p) in seen else WrittenOut(p.new_zeros((units, *p.shape), dtype=torch.float32))
            for p in self._parameters
        ]

    def factors(self, parameter: nn.Parameter, left: Tensor, right: Tensor) -> None:
        kept = Factored([Use(self._by_unit(left), self._by_unit(right))], parameter.shape)
        fewer = kept.uses[0].left.shape[1] * sum(parameter.shape) < parameter.numel()
        self._add(parameter, kept if fewer else WrittenOut(kept.written_out()))

    def rows(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        self._add(parameter, WrittenOut(self._by_unit(gradients.unsqueeze(1)).sum(1, dtype=torch.float32)))

    def _add(self, parameter: nn.Parameter, new: PerUnit) -> None:
        before = self._seen.get(id(parameter))
        if before is None:
            self._seen[id(parameter)] = new
        elif isinstance(before, Factored) and isinstance(new, Factored):
            self._seen[id(parameter)] = Factored([*before.uses, *new.uses], new.shape)
        else:  # a layer that is used twice, such as tied weights
            self._seen[id(parameter)] = WrittenOut(before.written_out() + new.written_out())

    def _by_unit(self, rows: Tensor) -> Tensor:
        """Return (units, K, …) of (B, T, …): the tokens of all rows of a unit, and zeros up to the most of any.

        Raises:
            PrivacyUnitError: A layer saw other rows than the batch has.
        """
        sizes, rows = self._sizes, rows.detach()
        if rows.shape[0] != sum(sizes):
            raise PrivacyUnitError(
                f"A layer of this model mixes the rows of a batch: for {sum(sizes)} rows it gives gradients of shape "
                f"{tuple(rows.shape)}."
            )
        if len(sizes) == rows.shape[0]:
            return rows
        if sizes.count(sizes[0]) == len(sizes):
            return rows.reshape(len(sizes), -1, *rows.shape[2:])
        units = nn.utils.rnn.pad_sequence(list(torch.split(rows, sizes)), batch_first=True)
        return units.flatten(1, 2)


Recorded = Callable[[Any, GradientRecord, Tensor], Tensor]


def way_for(model: nn.Module, parameters: Sequence[nn.Parameter]) -> BookKeeping | None:
    """Return a way that may do for a model's trained parameters; None where a layer is not known."""
    trained = set(map(id, parameters))
    owners = [m for m in model.modules() if any(id(p) in trained for p in m.parameters(recurse=False))]
    layers = {module: recorded(module) for module in owners}
    known = {module: forward for module, forward in layers.items() if forward is not None}
    return BookKeeping(model, known, parameters) if len(known) == len(layers) else None


def recorded(module: Any) -> Recorded | None:
    """Return what a layer computes while it is recorded; None for one of another kind."""
    kind = type(module)
    if kind is nn.Linear:
        return recorded_linear
    if kind is nn.Embedding:
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return recorded_embedding if plain else None
    if kind is nn.LayerNorm:
        return recorded_layer_norm if module.weight is not None and module.weight.ndim == 1 else None
    if kind.__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return recorded_rms_norm
    if kind.__name__ == "Conv1D":  # what transformers calls GPT-2's linear layers
        return recorded_transposed
    return None


def recorded_linear(layer: nn.Linear, record: GradientRecord, inputs: Tensor) -> Tensor:
    return RecordedLinear.apply(inputs, layer.weight, layer.bias, record, False)  # type: ignore[no-any-return, no-untyped-call]


def recorded_transposed(layer: Any, record: GradientRecord, inputs: Tensor) -> Tensor:
    return RecordedLinear.apply(inputs, layer.weight, layer.bias, record, True)  # type: ignore[no-any-return, no-untyped-call]


def recorded_embedding(layer: nn.Embedding, record: GradientRecord, inputs: Tensor) -> Tensor:
    return RecordedEmbedding.apply(inputs, layer.weight, layer.padding_idx, record)  # type: ignore[no-any-return, no-untyped-call]


def recorded_layer_norm(norm: nn.LayerNorm, record: GradientRecord, inputs: Tensor) -> Tensor:
    normal = F.layer_norm(inputs, norm.normalized_shape, eps=norm.eps)
    return RecordedScale.apply(normal, norm.weight, norm.bias, record)  # type: ignore[no-any-return, no-untyped-call]


def recorded_rms_norm(norm: Any, record: GradientRecord, inputs: Tensor) -> Tensor:
    normal = F.rms_norm(inputs.float(), norm.weight.shape, eps=norm.variance_epsilon).to(inputs.dtype)
    return RecordedScale.apply(normal, norm.weight, None, record)  # type: ignore[no-any-return, no-untyped-call]


class RecordedLinear(torch.autograd.Function):
    """x Wᵀ + b, or x W + b, whose backward pass hands over what W's gradient is made of."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        record: GradientRecord,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.weight, ctx.bias, ctx.record, ctx.transposed = weight, bias, record, transposed
        return F.linear(inputs, weight.t() if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,), weight, bias = ctx.saved_tensors, ctx.weight, ctx.bias
        rows = len(gradient)
        backprops = gradient.reshape(rows, -1, gradient.shape[-1])  # (B, T, out)
        if weight.requires_grad:
            activations = inputs.reshape(rows, -1, inputs.shape[-1]).to(gradient.dtype)  # (B, T, in)
            pair = (activations, backprops) if ctx.transposed else (backprops, activations)
            ctx.record.factors(weight, *pair)
        if bias is not None and bias.requires_grad:
            ctx.record.rows(bias, backprops.sum(1, dtype=torch.float32))
        to_inputs = None
        if ctx.needs_input_grad[0]:
            matrix = weight.t() if ctx.transposed else weight
            to_inputs = (gradient @ matrix.to(gradient.dtype)).to(inputs.dtype)
        return to_inputs, None, None, None, None


class RecordedEmbedding(torch.autograd.Function):
    """Rows of W by their numbers; the backward pass hands over the numbers, and what came back to each."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: nn.Parameter, padding: int | None, record: GradientRecord
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.weight, ctx.padding, ctx.record = weight, padding, record
        return F.embedding(inputs, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        (inputs,), rows = ctx.saved_tensors, len(gradient)
        if ctx.padding is not None:  # whose row torch does not train either
            gradient = gradient.masked_fill((inputs == ctx.padding).unsqueeze(-1), 0)
        ctx.record.factors(
            ctx.weight, inputs.reshape(rows, -1), gradient.reshape(rows, -1, gradient.shape[-1])
        )
        return None, None, None, None


class RecordedScale(torch.autograd.Function):
    """n · w + b of normalised n; the backward pass hands over the gradients of w and b of each row."""

    @staticmethod
    def forward(
        ctx: Any, normal: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, record: GradientRecord
    ) -> Tensor:
        ctx.save_for_backward(normal)
        ctx.weight, ctx.bias, ctx.record = weight, bias, record
        scaled = normal * weight
        return scaled if bias is None else scaled + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (normal,), rows, width = ctx.saved_tensors, len(gradient), gradient.shape[-1]
        if ctx.weight.requires_grad:
            ctx.record.rows(
                ctx.weight, (gradient * normal).reshape(rows, -1, width).sum(1, dtype=torch.float32)
            )
        if ctx.bias is not None and ctx.bias.requires_grad:
            ctx.record.rows(ctx.bias, gradient.reshape(rows, -1, width).sum(1, dtype=torch.float32))
        return (gradient * ctx.weight).to(normal.dtype), None, None, None
