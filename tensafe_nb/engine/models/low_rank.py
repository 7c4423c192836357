"""The factors of an adapter, read from some layers of a model: what is applied to ciphertexts."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensafe_nb.engine.models.adapters import ends_in
from tensafe_nb.engine.models.bases import frozen_hash
from tensafe_nb.engine.models.load import LoadedModel
from tensafe_nb.engine.models.reading import listed
from tensafe_nb.errors import ValidationError, nearest
from tensafe_nb.privacy.encrypted.packing import MOST_RANK, MOST_WIDTH
from tensafe_nb.privacy.encrypted.scheme import Vector
from tensafe_nb.privacy.encrypted.stacking import stacked
from tensafe_nb.protocol.encrypted import EncryptedPart

SAME_INPUT = (  # modules of a layer that read one input, by the names that architectures give them
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Factors:
    """The adapters of some layers, stacked where they read one input.

    Attributes:
        parts: By layer.
        matrices: (A, B, 1.0) of each part, by its name.
        base: Hash of the frozen weights.
        elsewhere: Names of what else is trained.
        depth: How many layers the model has.
    """

    parts: tuple[EncryptedPart, ...]
    matrices: Mapping[str, tuple[Vector, Vector, float]]
    base: str
    elsewhere: tuple[str, ...]
    depth: int


def factors_of(model: LoadedModel, layers: Sequence[int], modules: Sequence[str] | None) -> Factors:
    """Read the adapters of some layers.

    Args:
        model: The model.
        layers: Their numbers, from the end where negative.
        modules: Names of what is adapted in them; None takes all of it.

    Raises:
        ValidationError: No such layer or module, or none that is adapted, or an adapter of another kind.
    """
    adapted = adapted_layers(model)
    depth = depth_of(model, adapted)
    parts, matrices, taken = [], {}, set()
    for number in sorted({number_of(layer, depth) for layer in layers}):
        there = {name: module for name, module in adapted.items() if layer_of(name) == number}
        chosen = chosen_in(number, there, modules)
        for group in grouped(chosen, there):
            part, matrices[f"{number}:{','.join(group)}"] = stack_of(number, group)
            parts.append(part)
        taken |= set(chosen.values())
    base = frozen_hash(model.causal, values=True)
    elsewhere = sorted(set(trained_by(model)) - taken)
    return Factors(tuple(parts), matrices, base, tuple(elsewhere), depth)


def trained_by(model: LoadedModel) -> Iterator[str]:
    """Yield the names of adapted layers, and of whatever is trained besides."""
    for name, _ in model.trainable:
        if not name.startswith("value_head."):  # what the model says is the same without it
            yield re.split(r"\.lora_|\.modules_to_save", name)[0]


def adapted_layers(model: LoadedModel) -> dict[str, Any]:
    """Return the layers with an adapter by their names.

    Raises:
        ValidationError: There are none, for all weights are trained.
    """
    if model.peft is None:
        raise ValidationError(
            "he_adapter: this client trains all weights, and there is no adapter to apply. Make a client with a "
            "LoRAConfig."
        )
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.causal.named_modules() if isinstance(module, LoraLayer)}


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a module belongs to; None outside of all."""
    found = re.search(r"\.(\d+)\.", name)
    return None if found is None else int(found[1])


def depth_of(model: LoadedModel, adapted: Mapping[str, Any]) -> int:
    """Return how many layers there are."""
    told = getattr(model.causal.config.get_text_config(), "num_hidden_layers", None)
    numbers = [number for number in map(layer_of, adapted) if number is not None]
    return int(told) if told is not None else max(numbers, default=-1) + 1


def number_of(layer: int, depth: int) -> int:
    """Return the number of a layer from 0.

    Raises:
        ValidationError: There is none of that number.
    """
    if not -depth <= layer < depth:
        raise ValidationError(
            f"he_adapter: the model has {depth} layers, 0 to {depth - 1}; there is no {layer}."
        )
    return layer % depth


def chosen_in(number: int, there: Mapping[str, Any], modules: Sequence[str] | None) -> dict[str, str]:
    """Return the full names of the modules of a layer that were asked for, by the names they were asked for with."""
    names = sorted({name.rpartition(".")[2] for name in there})
    if not there:
        raise ValidationError(
            f"he_adapter: layer {number} has no adapter. Choose layers that the client's LoRAConfig adapts."
        )
    chosen = {}
    for asked in names if modules is None else modules:
        found = [name for name in there if ends_in(name, asked)]
        if not found:
            raise ValidationError(
                f"he_adapter: layer {number} has no adapted module {asked!r}.{nearest(asked, names)}"
            )
        if len(found) > 1:
            raise ValidationError(
                f"he_adapter: {asked!r} names {len(found)} modules of layer {number} ({listed(found)}). Name more "
                f"of it."
            )
        check_plain(found[0], there[found[0]])
        chosen[asked] = found[0]
    return chosen


def check_plain(name: str, module: Any) -> None:
    """Refuse an adapter that is more than the product of two matrices."""
    from peft.tuners.lora import Linear

    if not isinstance(module, Linear) or module.active_adapters != ["default"] or module.lora_variant:
        raise ValidationError(
            f"he_adapter: {name!r} has an adapter of another kind than plain LoRA on a linear layer, which is all that "
            f"can be applied to ciphertexts. Name other modules."
        )


def grouped(chosen: Mapping[str, str], there: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Put those together that read one input, as far as one stack may be that large."""
    groups: list[dict[str, Any]] = []
    for asked, name in chosen.items():
        parent, _, own = name.rpartition(".")
        family = next((family for family in SAME_INPUT if own in family), (own,))
        for group in groups:
            first = chosen[next(iter(group))]
            members = [*group.values(), there[name]]
            fits = (
                sum(len(factors(module)[0]) for module in members) <= MOST_RANK
                and sum(len(factors(module)[1]) for module in members) <= MOST_WIDTH
            )
            if first.rpartition(".")[0] == parent and first.rpartition(".")[2] in family and fits:
                group[asked] = there[name]
                break
        else:
            groups.append({asked: there[name]})
    return groups


def factors(module: Any) -> tuple[Vector, Vector, float]:
    """Return A, B and the scale of an adapted module."""
    a, b = (one["default"].weight.detach().double().cpu().numpy() for one in (module.lora_A, module.lora_B))
    return a, b, float(module.scaling["default"])


def stack_of(number: int, group: Mapping[str, Any]) -> tuple[EncryptedPart, tuple[Vector, Vector, float]]:
    """Stack the adapters of modules that read one input."""
    blocks = [factors(module) for module in group.values()]
    a, b, exponents = stacked(blocks)
    part = EncryptedPart(
        name=f"{number}:{','.join(group)}",
        layer=number,
        modules=tuple(group),
        shape=(a.shape[1], b.shape[0], a.shape[0]),
        widths=tuple(len(block[1]) for block in blocks),
        exponents=exponents,
    )
    return part, (a, b, 1.0)
