"""Copies of a Llama-shaped model's weights, laid out as a processor multiplies them quickest.

**Exact** ones hold the adapter merged in, W + BA, in float32, the matrices that read one input together, packed by
oneDNN: a few rows take two thirds of the time. **Rough** ones hold the frozen W in int8 (a scale for each output), a
quarter of the bytes, with the adapter beside them: what they say next is a guess, which the exact ones check. They are
of frozen weights alone, so that they are made once, and kept for as long as those are.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tensafe_nb.engine.models import memory
from tensafe_nb.engine.models.load import LoadedModel
from tensafe_nb.engine.sampling import llama
from tensafe_nb.engine.sampling.llama import Layer, Map, Weights

PAYS_FROM_TOKENS = 16  # fewer new tokens do not win back the time that the copies take
GUESSES_PAY_FROM_TOKENS = 64  # of a single row, whose weights in int8 are made once
PAYS_FROM_NUMBERS = 8_000_000  # of the layers: those of a small model are quick anyway
SHARE = 0.25  # of the available memory that the copies may take
IN_INT8 = 0.25  # of the bytes in float32
PACKED_FOR = 16  # rows, about; what is packed takes any number
_rough = WeakTensorKeyDictionary()  # by the first of the weights that lie together: packed in int8


@dataclass(frozen=True, slots=True)
class Copies:
    """What to decode with.

    Attributes:
        exact: Says what the model says, but for rounding.
        rough: Says about the same in a fraction of the time; None where it would not pay.
    """

    exact: Weights
    rough: Weights | None


@dataclass(slots=True)
class KeptCopies:
    """Copies that the next call may use again, as long as the weights are of this version."""

    version: int
    copies: Copies | None = None


def copies_of(model: LoadedModel, new_tokens: int, rows: int, made: Copies | None = None) -> Copies | None:
    """Return copies of a model's weights; None where they would not pay, not fit, or not be the same.

    Args:
        model: In evaluation mode, used by nobody else meanwhile.
        new_tokens: How many it is going to decode, one after the other.
        rows: Of how many completions, together.
        made: Those that were made of the same weights before.
    """
    if made is not None and (made.rough is not None or rows > 1):
        return made
    if (
        new_tokens < PAYS_FROM_TOKENS
        or model.device.type != "cpu"
        or model.compute_dtype is not torch.float32
    ):
        return None
    if not model.split or type(model.body).__name__ not in llama.SHAPED_LIKE_LLAMA:
        return None
    body: Any = model.body
    matrices = [matrix for layer in body.layers for group in _groups(layer) for matrix in group]
    if not all(map(_is_plain, [*matrices, model.head])) or not (works(_packed, 1e-4) and llama.fits(model)):
        return None
    weights = [_base(matrix).weight for matrix in matrices]
    if sum(weight.numel() for weight in weights) < PAYS_FROM_NUMBERS:
        return None
    weights.append(_base(model.head).weight)
    there, size = memory.available(model.device), memory.size_of(weights)
    if there is None or (made is None and size > SHARE * there):
        return None
    guesses = rows == 1
    if guesses:  # by itself it is quicker by columns, see `merged`
        enough = (
            new_tokens >= GUESSES_PAY_FROM_TOKENS and size * (made is None) + size * IN_INT8 <= SHARE * there
        )
        parts = [part for matrix in [*matrices, model.head] for part in _base(matrix).parameters()]
        frozen = not any(part.requires_grad for part in parts)
        if not (enough and frozen and sums_int8() and works(_int8, 0.5)):
            return None
    exact = _weights(model, _exact) if made is None else made.exact
    return Copies(exact, _weights(model, _roughly) if guesses else None)


@cache
def works(of: Callable[[Tensor, Tensor | None], Map], within: float) -> bool:
    """Try once whether this torch and this processor multiply so, and it is what a matrix product says."""
    weight, x = torch.linspace(-1, 1, 64 * 32).view(64, 32), torch.linspace(-1, 1, 96).view(3, 32)
    try:
        found = of(weight, None)(x)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return bool((found - x @ weight.T).abs().max() <= within)


def _weights(model: LoadedModel, of: Any) -> Weights:
    body: Any = model.body
    norm = _norm if of is _roughly else _itself
    return Weights([_layer(layer, of, norm) for layer in body.layers], norm(body.norm), of([model.head]))


def _layer(layer: Any, of: Any, norm: Any) -> Layer:
    qkv, out, gate_up, down = (of(group) for group in _groups(layer))
    activation = layer.mlp.act_fn

    def mlp(h: Tensor) -> Tensor:
        gate, up = gate_up(h).chunk(2, -1)
        return down(activation(gate) * up)  # type: ignore[no-any-return]

    return Layer(norm(layer.input_layernorm), qkv, out, norm(layer.post_attention_layernorm), mlp)


def _itself(norm: Any) -> Map:
    return norm  # type: ignore[no-any-return]


def _norm(norm: Any) -> Map:
    """Return a root mean square norm in one call."""
    return lambda x: F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _groups(layer: Any) -> list[list[Any]]:
    """Return the matrices of a layer, those together that read one input."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    ]


def _is_plain(matrix: Any) -> bool:
    """Whether a matrix is W, or W with an adapter BA in use and nothing else."""
    from peft.tuners.lora import Linear

    if type(matrix) is nn.Linear:
        return True
    return (
        isinstance(matrix, Linear)
        and type(matrix.get_base_layer()) is nn.Linear
        and matrix.active_adapters == ["default"]
        and not (matrix.disable_adapters or matrix.lora_variant)
    )


def _base(matrix: Any) -> Any:
    return matrix if type(matrix) is nn.Linear else matrix.get_base_layer()


def _adapter(matrix: Any) -> tuple[Tensor, Tensor, float] | None:
    """Return A, B and the scale of a matrix's adapter."""
    if type(matrix) is nn.Linear:
        return None
    a, b = matrix.lora_A["default"].weight, matrix.lora_B["default"].weight
    return a.detach(), b.detach(), matrix.scaling["default"]


def _exact(group: Sequence[Any]) -> Map:
    whole = torch.cat([_base(matrix).weight.detach() for matrix in group])  # a copy
    for matrix, part in zip(group, torch.split(whole, [_base(m).out_features for m in group]), strict=True):
        adapter = _adapter(matrix)
        if adapter is not None:
            a, b, scale = adapter
            part.addmm_(b, a, alpha=scale)
    return _packed(whole, _bias(group))


def _roughly(group: Sequence[Any]) -> Map:
    first = _base(group[0]).weight
    if first not in _rough:
        whole = torch.cat([_base(matrix).weight.detach() for matrix in group])
        _rough[first] = _int8(whole, _bias(group))
    frozen, adapters = _rough[first], [_adapter(matrix) for matrix in group]
    found = [adapter for adapter in adapters if adapter is not None]
    if not found:
        return frozen  # type: ignore[no-any-return]
    a = torch.cat([a for a, _, _ in found])
    b, row, column = a.new_zeros(sum(_base(m).out_features for m in group), len(a)), 0, 0
    for matrix, adapter in zip(group, adapters, strict=True):
        if adapter is not None:
            width = len(adapter[0])
            b[row : row + _base(matrix).out_features, column : column + width] = adapter[1] * adapter[2]
            column += width
        row += _base(matrix).out_features
    return lambda h: frozen(h).view(-1).addmv_(b, a.mv(h.view(-1))).view(1, -1)  # of a single row


def _bias(group: Sequence[Any]) -> Tensor | None:
    found = [_base(matrix).bias for matrix in group]
    if all(bias is None for bias in found):
        return None
    zeros = [_base(matrix).weight.new_zeros(_base(matrix).out_features) for matrix in group]
    return torch.cat(
        [zero if bias is None else bias.detach() for bias, zero in zip(found, zeros, strict=True)]
    )


def _packed(weight: Tensor, bias: Tensor | None) -> Map:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)

    def product(h: Tensor) -> Tensor:
        more = rows_more(len(h))
        whole = F.pad(h, (0, 0) * (h.dim() - 1) + (0, more)) if more else h
        y: Tensor = torch.ops.mkldnn._linear_pointwise(whole, packed, bias, "none", [], "")
        return y[: len(h)]

    return product


def rows_more(rows: int) -> int:
    """Return how many rows of zeros to multiply beside some, so that few numbers of rows ever occur.

    For each of them oneDNN makes a program of its own for each matrix, and keeps it: 0.6 MB and more.
    """
    step = 1 << max(0, (rows - 1).bit_length() - 3)
    return -rows % step


def _int8(weight: Tensor, bias: Tensor | None) -> Map:
    scales = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    whole = (weight / scales[:, None]).round_().to(torch.int8)
    points = torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a later torch will do without: then there is no rough copy
        quantised = torch._make_per_channel_quantized_tensor(whole, scales.double(), points, 0)
    packed, narrow = torch.ops.quantized.linear_prepack(quantised, bias), not sums_int8()
    return lambda h: torch.ops.quantized.linear_dynamic(h, packed, narrow)


def sums_int8() -> bool:
    """Whether a processor adds up products of int8 in 32 bits: in the 16 of plain AVX2, few guesses come true."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_vnni", False))
