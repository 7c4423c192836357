"""Adapters on a model: which layers a configuration means, LoRA put on them by PEFT, and a folder's weights in it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tensafe_nb.config import LoRAConfig
from tensafe_nb.display import as_given
from tensafe_nb.engine.models import adapter_folders, reading
from tensafe_nb.engine.models.bases import FACTOR_A
from tensafe_nb.engine.quiet import quiet
from tensafe_nb.errors import ModelLoadError, ValidationError, nearest
from tensafe_nb.lifetimes import uncollected

READ_PAST_LAYERS = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
"""Architectures whose fast kernels take `out_proj.weight` itself, past a layer's adapter: PEFT refuses to adapt it."""


def add_adapter(causal: Any, lora: LoRAConfig) -> Any:
    """Put a fresh adapter on a model, whose `nn.Linear` layers get ours; return PEFT's wrapper. A is random, B is 0.

    Raises:
        ValidationError: It does not fit the model.
    """
    with uncollected():
        import peft

        from tensafe_nb.engine.models.fused_lora import FusedLinear

    check_adapter(causal, lora)
    settings = peft_config_of(lora, causal)
    settings._register_custom_module({nn.Linear: FusedLinear})
    with quiet():
        try:
            adapted = peft.get_peft_model(causal, settings)
        except (ValueError, TypeError) as error:
            raise ValidationError(
                f"LoRAConfig does not fit this model: {reading.first_line(error)}"
            ) from error
    train_in_float32(causal)
    if lora.freeze_a:
        for name, parameter in causal.named_parameters():
            if FACTOR_A in name:
                parameter.requires_grad_(False)
    return adapted


def check_adapter(causal: Any, lora: LoRAConfig) -> None:
    """Refuse names that the model does not have, and ranks that are larger than the layers that they are for."""
    layers = adaptable_layers(causal)
    names = {name.rpartition(".")[2] for name in layers}
    if not lora.target_modules:
        raise ValidationError("LoRAConfig.target_modules is empty: name at least one layer, or 'all-linear'.")
    for target in () if isinstance(lora.target_modules, str) else lora.target_modules:
        if not any(ends_in(name, target) for name in layers):
            raise ValidationError(
                f"The model has no layer named {target!r} to adapt.{nearest(target, names)}"
            )
    for saved in lora.modules_to_save:
        if not any(ends_in(name, saved) for name, _ in causal.named_modules()):
            last = {name.rpartition(".")[2] for name, _ in causal.named_modules()}
            known = {name for name in last if name.strip("0123456789")}
            raise ValidationError(
                f"LoRAConfig.modules_to_save: the model has no module named {saved!r}.{nearest(saved, known)}"
            )
    parameters = [name for name, _ in causal.named_parameters()]
    for target in lora.target_parameters:
        if not any(ends_in(name, target) for name in parameters):
            known = {name.partition(f".{block_of(name)}.")[2] or name for name in parameters}
            raise ValidationError(
                f"LoRAConfig.target_parameters: the model has no parameter named {target!r}.{nearest(target, known)}"
            )
    check_blocks({block for name in layers if (block := block_of(name)) is not None}, lora)
    if lora.layers_to_transform is not None and lora.target_modules == "all-linear" and experts_of(causal):
        raise ValidationError(
            "LoRAConfig(layers_to_transform=…): the experts of this model, which 'all-linear' means too, are adapted "
            "in all blocks or in none. Name layers instead: target_modules=['q_proj', 'v_proj']."
        )
    adapted = layers_of(lora, causal)
    if not adapted:
        hint = ""
        if lora.target_modules == "all-linear":
            hint = (
                f" exclude_modules={as_given(lora.exclude_modules)} leaves out every one."
                if lora.exclude_modules
                else ""
            )
        elif isinstance(lora.target_modules, str):
            hint = (
                f" A string is a regular expression for whole names; a layer's name goes into a list: "
                f"[{lora.target_modules!r}]."
            )
        raise ValidationError(
            f"LoRAConfig(target_modules={lora.target_modules!r}) adapts no layer of this model.{hint}"
        )
    check_patterns(adapted, lora)
    check_ranks({name: layers[name] for name in sorted(adapted & layers.keys())}, lora)
    tables = sorted(name for name in adapted & layers.keys() if isinstance(layers[name], nn.Embedding))
    if lora.freeze_a and tables:
        raise ValidationError(
            f"LoRAConfig(freeze_a=True) cannot adapt the embedding {tables[0]!r}: there A begins at zero and B is "
            f"random, so that nothing would be learnt. Leave it out of target_modules, or train it whole: "
            f"modules_to_save=[{tables[0].rpartition('.')[2]!r}]."
        )


def check_blocks(there: set[int], lora: LoRAConfig) -> None:
    """Refuse numbers of blocks that the model does not have: nothing would be adapted for them."""
    lacking = sorted(set(lora.layers_to_transform or ()) - there)
    if lacking:
        has = f"its blocks are {min(there)} to {max(there)}" if there else "it has none with a number"
        raise ValidationError(f"LoRAConfig.layers_to_transform: this model has no block {lacking[0]}; {has}.")


def check_patterns(adapted: set[str], lora: LoRAConfig) -> None:
    """Refuse ranks and alphas for layers that are not adapted: they would count for nothing."""
    from peft.utils.other import get_pattern_key

    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, field):
            if not any(get_pattern_key([pattern], name) == pattern for name in adapted):
                names = {name.rpartition(".")[2] for name in adapted}
                raise ValidationError(
                    f"LoRAConfig.{field}: no adapted layer is called {pattern!r}, or matches it as a regular "
                    f"expression.{nearest(pattern, names)}"
                )


def check_ranks(layers: Mapping[str, Any], lora: LoRAConfig) -> None:
    """Refuse a rank r > min(out, in) of W + BA: its adapter would hold more numbers than the layer."""
    from peft.utils.other import get_pattern_key

    sizes = {name: min(layer.weight.shape) for name, layer in layers.items()}
    keys = {name: get_pattern_key(lora.rank_pattern.keys(), name) for name in layers}
    room = {name: size - lora.rank_pattern.get(keys[name], lora.rank) for name, size in sizes.items()}
    if room and min(room.values()) < 0:
        name = min(room, key=room.__getitem__)
        raise ValidationError(
            f"LoRAConfig.rank={sizes[name] - room[name]} is larger than the smallest adapted layer ({sizes[name]}), "
            f"{name!r}: an adapter of that rank would hold more than the layer. Choose rank ≤ {sizes[name]}, or leave "
            f"the layer out (exclude_modules)."
        )


def fill_adapter(adapted: Any, weights: dict[str, Tensor], path: Path) -> None:
    """Give an adapter the weights of a folder, all of them.

    Raises:
        ModelLoadError: Some are missing, left over, or of another shape.
    """
    import peft

    own = tensors_of(adapted)
    named = adapted.get_base_model().named_parameters(remove_duplicate=False)
    base = {f"{adapter_folders.PREFIX}{name}": parameter for name, parameter in named}
    known = own | {name: base[name] for name in weights.keys() & base.keys() if ".lora_" not in name}
    missing = sorted(own.keys() - weights.keys())
    left = sorted(weights.keys() - known.keys())
    shapes = [
        f"{name} {tuple(weights[name].shape)} there, {tuple(known[name].shape)} here"
        for name in sorted(weights.keys() & known.keys())
        if weights[name].shape != known[name].shape
    ]
    if missing or left or shapes:
        parts = {"missing": missing, "without a place": left, "of another shape": shapes}
        found = "; ".join(f"{what}: {reading.listed(names)}" for what, names in parts.items() if names)
        raise ModelLoadError(
            f"The adapter in {str(path)!r} does not fit its base: {found}. Is base_model_name_or_path in "
            f"{adapter_folders.CONFIG} the model it was trained on?",
            details={"missing": missing, "unexpected": left, "mismatched": shapes},
        )
    with quiet():
        peft.set_peft_model_state_dict(adapted, weights)


def tensors_of(adapted: Any) -> dict[str, Tensor]:
    """Return an adapter's tensors by PEFT's names, and where they lie."""
    import peft

    found: dict[str, Tensor] = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return found


def layers_of(lora: LoRAConfig, causal: Any) -> set[str]:
    """Return the names of the layers that a configuration adapts, by PEFT's own rules, and of the experts."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    settings = _maybe_include_all_linear_layers(peft_config_of(lora, causal), causal)
    layers = {name for name in adaptable_layers(causal) if check_target_module_exists(settings, name)}
    every = lora.target_modules == "all-linear"
    return layers | {
        name
        for name in experts_of(causal)
        if every or any(ends_in(name, each) for each in lora.target_parameters)
    }


def adaptable_layers(causal: Any) -> dict[str, Any]:
    """Return what can be adapted: every module with a matrix of its own."""
    return {
        name: module
        for name, module in causal.named_modules()
        if name and getattr(getattr(module, "weight", None), "ndim", 0) == 2
    }


def peft_config_of(lora: LoRAConfig, causal: Any) -> Any:
    """Return a configuration in PEFT's words."""
    import peft

    def listed(value: tuple[Any, ...] | str) -> list[Any] | str | None:
        return value if isinstance(value, str) else list(value) or None

    exclude, targets = listed(lora.exclude_modules), listed(lora.target_modules)
    blocks = None if lora.layers_to_transform is None else list(lora.layers_to_transform)
    if blocks is not None and lora.target_modules == "all-linear":  # beside which PEFT takes no blocks
        targets, blocks = [name for name in linear_layers(causal) if block_of(name) in blocks], None
    if lora.target_modules == "all-linear" and getattr(causal.config, "model_type", "") in READ_PAST_LAYERS:
        exclude = exclude or ["out_proj"]
    try:
        return peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            bias=lora.bias,
            task_type="CAUSAL_LM",
            modules_to_save=listed(lora.modules_to_save),
            use_rslora=lora.use_rslora,
            rank_pattern=dict(lora.rank_pattern),
            alpha_pattern=dict(lora.alpha_pattern),
            exclude_modules=exclude,
            target_parameters=listed(lora.target_parameters),
            layers_to_transform=blocks,
        )
    except (ValueError, TypeError) as error:
        raise ValidationError(f"LoRAConfig: {reading.first_line(error)}") from error


def experts_of(causal: Any) -> list[str]:
    """Return the names of the parameters that hold the matrices of all experts of a block."""
    return [name for name, p in causal.named_parameters() if p.ndim == 3 and ".experts." in name]


def linear_layers(causal: Any) -> list[str]:
    """Return the names of the layers that "all-linear" means, by PEFT's own rule."""
    import peft
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    every = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    return sorted(_maybe_include_all_linear_layers(every, causal).target_modules)


def block_of(name: str) -> int | None:
    """Return the number of the block that a layer is in, as PEFT reads it from its name; None of those in none."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return None if found is None else int(found[1])


def train_in_float32(causal: Any) -> None:
    """Keep what is trained in fp32, adapters and the biases that are trained along."""
    for module in causal.modules():
        own = list(module.parameters(recurse=False))
        if any(p.requires_grad for p in own):
            mixes = isinstance(module, nn.LayerNorm)  # takes its weight and its bias in one type only
            for parameter in own:
                if parameter.requires_grad or mixes:
                    parameter.data = parameter.data.float()


def ends_in(name: str, target: str) -> bool:
    """Whether a module is meant by a name, or by the end of one."""
    return name == target or name.endswith(f".{target}")
