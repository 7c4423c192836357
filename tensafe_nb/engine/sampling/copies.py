"""Copies of a Llama-shaped model's weights, laid out as a processor multiplies them quickest.

**Exact** ones hold the adapter merged in, W + BA, in float32, the matrices that read one input together: a few rows
take half of the time, or two thirds where there is no compiler. **Fast** ones hold the frozen W in bfloat16 or int8,
with the adapter beside them in float32. Where `SamplingConfig.precision` asks for them, tokens are drawn from what they
say; else the int8 ones guess what comes next of a single row, and the exact ones check it. Of frozen weights they are
made once, and kept for as long as those are: a step of training changes the adapter alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tensafe_nb.engine.models import memory
from tensafe_nb.engine.models.load import LoadedModel, multiplies_bf16
from tensafe_nb.engine.sampling import llama, native
from tensafe_nb.engine.sampling.llama import Layer, Map, Weights
from tensafe_nb.engine.sampling.products import (
    Packing,
    beside,
    in_bfloat16,
    in_float32,
    in_int8,
    sums_int8,
    works,
)
from tensafe_nb.errors import ValidationError

PAYS_FROM_TOKENS = 16  # fewer new tokens do not win back the time that the copies take
GUESSES_PAY_FROM_TOKENS = 64  # of a single row, whose weights in int8 are made once
PAYS_FROM_NUMBERS = 8_000_000  # of the layers: those of a small model are quick anyway
FEW_ROWS = 4  # up to which int8 is the quickest: then bytes count, and beyond it arithmetic
SHARE = 0.25  # of the available memory that the copies may take
BYTES = {"exact": 1.0, "bfloat16": 0.5, "int8": 0.25}  # in those of float32
FAST: dict[str, tuple[Packing, float]] = {"bfloat16": (in_bfloat16, 0.1), "int8": (in_int8, 0.5)}
Making: TypeAlias = Callable[[Sequence[Any]], Map]  # of matrices that read one input
_frozen: dict[str, WeakTensorKeyDictionary] = {name: WeakTensorKeyDictionary() for name in FAST}


@dataclass(frozen=True, slots=True)
class Copies:
    """What to decode with.

    Attributes:
        weights: Tokens are drawn from what they say.
        rough: Say about the same in a fraction of the time; None where it would not pay.
        precision: Of `weights`: "exact" say what the model says, but for rounding; or "bfloat16", or "int8".
    """

    weights: Weights
    rough: Weights | None = None
    precision: str = "exact"

    @property
    def read_prompts(self) -> bool:
        """Whether prompts are read with them, too; with int8, what is said of answers would be off twice as far."""
        return self.precision != "int8"


@dataclass(slots=True)
class KeptCopies:
    """Copies that the next call may use again, as long as the weights are of this version."""

    version: int
    copies: Copies | None = None


def precision_of(model: LoadedModel, asked: str, rows: int) -> str:
    """Return in which precision a model's tokens are drawn where one asks for this: "auto" takes the quickest.

    Args:
        model: In evaluation mode, used by nobody else meanwhile.
        asked: As `SamplingConfig.precision`.
        rows: Of how many completions.

    Raises:
        ValidationError: It is not possible here; says why.
    """
    if asked == "exact":
        return asked
    unlike = _unlike(model)
    if asked != "auto":
        hindrance = unlike or _hindrance(model, asked)
        if hindrance:
            raise ValidationError(
                f"precision={asked!r} cannot be had here: {hindrance}. precision='auto' takes the fastest that can, "
                f"and the result says which; 'exact' always can."
            )
        return asked
    if unlike or not pay(model):
        return "exact"
    order = ("int8", "bfloat16") if rows <= FEW_ROWS else ("bfloat16", "int8")
    return next((name for name in order if _is_quick(name) and not _hindrance(model, name)), "exact")


def _is_quick(precision: str) -> bool:
    """Whether a precision gains time; int8 in the arithmetic of plain AVX2 has not been measured."""
    return precision != "int8" or sums_int8()


def _hindrance(model: LoadedModel, precision: str) -> str:
    """Return why the weights of a Llama-shaped model cannot be copied in a precision; nothing if they can."""
    packing, within = FAST[precision]
    if precision == "bfloat16" and not multiplies_bf16(model.device):
        return "this processor has no products of bfloat16"
    if not works(packing, within):
        return f"this torch has no products of {precision}"
    there = memory.available(model.device)
    size = memory.size_of([_weight(matrix) for matrix in [*_matrices(model), model.head]]) * BYTES[precision]
    made = _weight(_matrices(model)[0]) in _frozen[precision]
    if not made and there is not None and size > SHARE * there:
        return f"the copies would take {size / 2**20:.0f} MiB, more than a quarter of the memory that is available"
    return ""


def _unlike(model: LoadedModel) -> str:
    """Return what keeps a model from being decoded with copies of its weights; nothing if they say what it says."""
    if model.device.type != "cpu":
        return f"this model computes on {model.device.type}, and the copies are for a CPU"
    if model.compute_dtype is not torch.float32:
        return (
            f"this model computes in {model.precision}, and the copies take one that computes in float32 "
            f'(create_training_client(…, dtype="float32"))'
        )
    if not model.split or type(model.body).__name__ not in llama.SHAPED_LIKE_LLAMA:
        return f"a {type(model.causal).__name__} has not the shape of Llama"
    if not all(map(_is_plain, [*_matrices(model), model.head])):
        return "its matrices are not plain, or have another adapter than LoRA's in use"
    if not llama.fits(model):
        return "our decoding steps do not say what transformers says of it"
    return ""


def copies_of(
    model: LoadedModel,
    new_tokens: int,
    rows: int,
    made: Copies | None = None,
    precision: str = "exact",
    *,
    alone: bool = False,
) -> Copies | None:
    """Return copies of a model's weights; None where exact ones would not pay, not fit, or not be the same.

    Args:
        model: In evaluation mode, used by nobody else meanwhile.
        new_tokens: How many it is going to decode, one after the other.
        rows: Of how many completions, together.
        made: Those that were made of the same weights before.
        precision: In which tokens are to be drawn, as `precision_of` returns it.
        alone: What is drawn may not depend on what others have drawn: choose as if nothing had been made before.
    """
    if made is not None and made.precision != precision:
        made = None
    if precision != "exact":
        return made or Copies(_weights(model, partial(_fast, precision)), precision=precision)
    if made is not None and not alone and (made.rough is not None or rows > 1):
        return made
    if new_tokens < PAYS_FROM_TOKENS or not pay(model) or not works(in_float32, 1e-4):
        return None
    size = memory.size_of([_weight(matrix) for matrix in [*_matrices(model), model.head]])
    there = memory.available(model.device)
    if there is None or (made is None and size > SHARE * there):
        return None
    more = size * (made is None) + size * BYTES["int8"]
    guesses = (
        rows == 1
        and new_tokens >= GUESSES_PAY_FROM_TOKENS
        and more <= SHARE * there
        and all(map(_is_frozen, [*_matrices(model), model.head]))
        and sums_int8()
        and works(*FAST["int8"])
    )
    if rows == 1 and not guesses and native.library() is None:
        return None  # it is quicker by columns, see `merged`
    exact = _weights(model, _exact) if made is None else made.weights
    if not guesses:
        return Copies(exact)
    rough = None if made is None else made.rough
    return Copies(exact, rough or _weights(model, partial(_fast, "int8")))


def prepare(model: LoadedModel) -> None:
    """Have the products compiled in the meantime, where a model looks as if it will be decoded with copies."""
    body: Any = model.body
    alike = model.split and type(body).__name__ in llama.SHAPED_LIKE_LLAMA
    if (
        alike
        and model.device.type == "cpu"
        and model.compute_dtype is torch.float32
        and sum(parameter.numel() for parameter in body.parameters()) >= PAYS_FROM_NUMBERS
    ):
        native.begin()


def pay(model: LoadedModel) -> bool:
    """Whether a model is of those that are decoded with copies, if there is the memory and enough to decode."""
    return not _unlike(model) and sum(_weight(m).numel() for m in _matrices(model)) >= PAYS_FROM_NUMBERS


def _weights(model: LoadedModel, of: Making) -> Weights:
    body: Any = model.body
    head = of([model.head])
    compiled = isinstance(head, native.Product)
    norm = _compiled_norm if compiled else _itself if of is _exact else _norm
    return Weights([_layer(layer, of, norm) for layer in body.layers], norm(body.norm), head, compiled)


def _layer(layer: Any, of: Making, norm: Callable[[Any], Map]) -> Layer:
    qkv, out, gate_up, down = (of(group) for group in _groups(layer))
    activation = layer.mlp.act_fn

    def mlp(h: Tensor) -> Tensor:
        gate, up = gate_up(h).chunk(2, -1)
        return down(activation(gate) * up)

    return Layer(norm(layer.input_layernorm), qkv, out, norm(layer.post_attention_layernorm), mlp)


def _itself(norm: Any) -> Map:
    return norm  # type: ignore[no-any-return]


def _compiled_norm(norm: Any) -> Map:
    return native.Norm(norm.weight.detach(), norm.variance_epsilon)


def _norm(norm: Any) -> Map:
    """Return a root mean square norm in one call."""
    return lambda x: F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _matrices(model: LoadedModel) -> list[Any]:
    """Return the matrices of the layers."""
    body: Any = model.body
    return [matrix for layer in body.layers for group in _groups(layer) for matrix in group]


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


def _weight(matrix: Any) -> Tensor:
    return _base(matrix).weight  # type: ignore[no-any-return]


def _is_frozen(matrix: Any) -> bool:
    return not any(part.requires_grad for part in _base(matrix).parameters())


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
    return in_float32(whole, _bias(group))


def _fast(precision: str, group: Sequence[Any]) -> Map:
    """Return W in bfloat16 or int8, kept if it is frozen, with the adapter beside it."""
    first, made = _weight(group[0]), _frozen[precision]
    product: Map | None = made.get(first)  # type: ignore[no-untyped-call]
    if product is None:
        packing, _ = FAST[precision]
        product = packing(torch.cat([_weight(matrix).detach() for matrix in group]), _bias(group))
        if all(map(_is_frozen, group)):
            made[first] = product
    adapters, d_out = [], 0
    for matrix in group:
        adapter = _adapter(matrix)
        if adapter is not None:
            a, b, scale = adapter
            adapters.append((d_out, a.clone(), b * scale))
        d_out += len(_weight(matrix))
    return beside(product, adapters, d_out) if adapters else product


def _bias(group: Sequence[Any]) -> Tensor | None:
    found = [_base(matrix).bias for matrix in group]
    if all(bias is None for bias in found):
        return None
    zeros = [_base(matrix).weight.new_zeros(_base(matrix).out_features) for matrix in group]
    return torch.cat(
        [zero if bias is None else bias.detach() for bias, zero in zip(found, zeros, strict=True)]
    )
