"""Merges a model's adapter into copies of its weights while it samples: a third as many matrix products.

For a single row, wide copies lie column by column: a CPU multiplies one row by them in two thirds of the time. The
adapted layers are put aside and come back as they were: nothing is ever added to, or rounded in, a trained tensor.
Only in float32: rounded to bfloat16, W + BA would lose most of a small BA, and what samples would not be what trains.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tensafe_nb.engine.models import memory
from tensafe_nb.engine.models.load import LoadedModel

PAYS_FROM_TOKENS = 16  # fewer new tokens do not win back the time that the copies take
SMALL = 8_000_000  # numbers of the adapted layers, below which the calls take the time, not the copies
SMALL_PAYS_FROM_TOKENS = 8
SHARE = 0.25  # of the available memory that the copies may take


@contextlib.contextmanager
def merged(model: LoadedModel, new_tokens: int, rows: int) -> Iterator[None]:
    """Let a model compute with merged copies where that pays; a model for which it does not stays as it is.

    Args:
        model: In evaluation mode, used by nobody else meanwhile.
        new_tokens: How many it is going to decode, one after the other.
        rows: Of how many completions, together.
    """
    layers = adapted_layers(model) if new_tokens >= SMALL_PAYS_FROM_TOKENS else {}
    by_column = rows == 1 and model.device.type == "cpu"
    if layers and by_column:
        head: Any = model.head  # a plain layer, adapted or not
        layers |= {n: m for n, m in model.causal.named_modules() if m is head and type(m) is nn.Linear}
    if not (layers and pays(model, layers, new_tokens)):
        yield
        return
    try:
        for name, layer in layers.items():
            _put(model.causal, name, merged_copy(layer, by_column=by_column))
        yield
    finally:
        for name, layer in layers.items():
            _put(model.causal, name, layer)


def adapted_layers(model: LoadedModel) -> dict[str, Any]:
    """Return the adapted layers by name; none at all where one is of a kind whose sum is not W + BA."""
    if model.peft is None or model.compute_dtype is not torch.float32:
        return {}
    from peft.tuners.lora import Linear, LoraLayer

    layers = {name: m for name, m in model.causal.named_modules() if isinstance(m, LoraLayer)}
    plain = all(isinstance(m, Linear) and type(m.get_base_layer()) is nn.Linear for m in layers.values())
    active = all(
        m.active_adapters == ["default"] and not (m.disable_adapters or m.lora_variant)
        for m in layers.values()
    )
    return layers if plain and active else {}


def pays(model: LoadedModel, layers: dict[str, Any], new_tokens: int) -> bool:
    """Whether copies of some layers win back their time, and fit the memory."""
    weights = [_base_of(layer).weight for layer in layers.values()]
    if sum(weight.numel() for weight in weights) < SMALL:
        return True
    there = memory.available(model.device)
    return new_tokens >= PAYS_FROM_TOKENS and there is not None and memory.size_of(weights) <= SHARE * there


def merged_copy(layer: Any, *, by_column: bool) -> nn.Linear:
    """Return W + s BA, or W of a layer without adapter, as a layer of its own, sharing nothing but the bias."""
    base = _base_of(layer)
    copy = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    wide = by_column and base.out_features > base.in_features
    weight = base.weight.detach()
    weight = weight.T.clone(memory_format=torch.contiguous_format).T if wide else weight.clone()
    if layer is not base:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        weight.addmm_(b, a, alpha=layer.scaling["default"])
    copy.weight = nn.Parameter(weight, requires_grad=False)
    copy.bias = base.bias
    return copy.eval()


def _base_of(layer: Any) -> Any:
    return layer if type(layer) is nn.Linear else layer.get_base_layer()


def _put(causal: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(causal.get_submodule(parent), own, layer)
