"""A folder that PEFT (or `export_adapter`) wrote: which base it belongs to, what kind it is, and its weights.

Training goes on with the adapter as it is. A kind that would have to be approximated is refused with the reason.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tensafe_nb.config import LoRAConfig
from tensafe_nb.engine.models.reading import TOKENIZERS, first_line, is_pointer
from tensafe_nb.errors import ModelLoadError, ValidationError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
FIELDS = {  # PEFT's names and ours
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "target_modules",
    "bias": "bias",
    "modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "exclude_modules": "exclude_modules",
    "layers_to_transform": "layers_to_transform",
    "target_parameters": "target_parameters",
}
OF_TRAINING = {"dropout", "freeze_a"}  # ours that no folder tells, or that do not bind who goes on from it
WITHOUT_EFFECT = {  # on an adapter whose weights are there
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "init_lora_weights",
    "fan_in_fan_out",  # PEFT sets it by the kind of the layer
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
}
UNMERGEABLE = {  # of PEFT: what is put before the text, or between the layers
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT",
}  # fmt: skip
# ways to begin that leave the base's weights as they are
KEEP_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
OTHER_KINDS = {
    "use_dora": "DoRA, which also scales the weights",
    "trainable_token_indices": "single rows of the embedding are trained",
    "lora_bias": "the adapters have biases of their own",
    "layer_replication": "layers are used several times",
    "alora_invocation_tokens": "the adapter acts from certain tokens on",
    "ensure_weight_tying": "trained embeddings are tied to the head",
    "megatron_config": "it is for Megatron's layers",
}


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """What a folder with an adapter says of itself.

    Attributes:
        path: The folder.
        base: The model it was trained on: a folder, or a hub id.
        revision: Of a hub id.
        lora: Its configuration, in our words.
        own_tokenizer: Whether it brings a tokenizer.
    """

    path: Path
    base: str
    revision: str | None
    lora: LoRAConfig
    own_tokenizer: bool

    def merged_with(
        self, asked: LoRAConfig | None, layers_of: Callable[[LoRAConfig], set[str]]
    ) -> LoRAConfig:
        """Return the adapter's configuration, after comparing it with the one that was asked for.

        Dropout, and which factor is trained, is no part of an adapter: what is asked for wins.

        Args:
            asked: What the user typed; only fields that were typed count.
            layers_of: Returns the layers that a configuration adapts.

        Raises:
            ValidationError: They contradict each other; says both values.
        """
        lora = self.lora
        if lora.layers_to_transform is None:
            every = lora.replace(target_modules="all-linear", exclude_modules=())
            lora = every if layers_of(lora) == layers_of(every) else lora
        if asked is None:
            return lora
        typed = asked.model_fields_set
        differing = [name for name in sorted(typed - OF_TRAINING) if not agree(name, asked, lora, layers_of)]
        if differing:
            both = "; ".join(
                f"{name}={getattr(asked, name)!r} asked for, {getattr(lora, name)!r} in the adapter"
                for name in differing
            )
            raise ValidationError(
                f"lora_config contradicts the adapter in {str(self.path)!r}: {both}. Training goes on with the adapter "
                f"as it is: leave lora_config out. For another adapter, give the base as model_ref ({self.base!r}), or "
                f"the base with this adapter merged (export_adapter(…, merged=True)).",
                details={"differing": differing},
            )
        return lora.replace(**{name: getattr(asked, name) for name in typed & OF_TRAINING})

    def weights(self) -> dict[str, Tensor]:
        """Return the adapter's tensors by PEFT's names.

        Raises:
            ModelLoadError: There are none, or they cannot be read.
        """
        import peft

        name = next((name for name in WEIGHTS if (self.path / name).is_file()), None)
        if name is None:
            raise ModelLoadError(
                f"The adapter in {str(self.path)!r} has no weights: neither {WEIGHTS[0]} nor {WEIGHTS[1]} is there. "
                f"Save it again with save_pretrained."
            )
        if is_pointer(self.path / name):
            raise ModelLoadError(
                f"{str(self.path / name)!r} only says where the adapter is: the folder was cloned without its large "
                f"files. Fetch them: git lfs pull."
            )
        try:
            found: dict[str, Tensor] = peft.utils.load_peft_weights(str(self.path), device="cpu")
        except Exception as error:  # safetensors, pickle and zip each have their own
            raise ModelLoadError(
                f"{str(self.path / name)!r} cannot be read: {first_line(error)} Is it damaged, or does it hold more "
                f"than tensors? Save the adapter again with save_pretrained."
            ) from error
        return found


def agree(
    name: str, asked: LoRAConfig, lora: LoRAConfig, layers_of: Callable[[LoRAConfig], set[str]]
) -> bool:
    """Whether a field that was asked for says what the adapter says; of layers, whether it names the same ones."""
    if name in (
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
    ):  # what counts is the layers they name
        return layers_of(lora.replace(**{name: getattr(asked, name)})) == layers_of(lora)
    mine, theirs = getattr(asked, name), getattr(lora, name)
    return (
        set(mine) == set(theirs) if name in ("modules_to_save", "target_parameters") else bool(mine == theirs)
    )


def adapter_in(source: str, locate: Callable[[str], str]) -> AdapterFolder | None:
    """Return the adapter that a folder holds; None where it holds none.

    Args:
        source: The folder.
        locate: Returns the folder of a model, or its hub id.

    Raises:
        ModelLoadError: It is of a kind that is not trained here, or its base is not to be found.
    """
    path = Path(source)
    if not (path / CONFIG).is_file():
        return None
    settings = settings_in(path)
    lora = lora_in(path, settings)
    base, revision = base_of(path, settings, locate)
    own_tokenizer = any((path / name).is_file() for name in TOKENIZERS)
    return AdapterFolder(path, base, revision, lora, own_tokenizer)


def announced(model_ref: str, asked: LoRAConfig | None) -> LoRAConfig | None:
    """Return the adapter that a local folder brings, before its model is loaded; what is wrong the load will say."""
    path = Path(model_ref).expanduser()
    if not (path / CONFIG).is_file():
        return asked
    try:
        lora = lora_in(path, settings_in(path))
        return (
            lora if asked is None else lora.replace(**{n: getattr(asked, n) for n in asked.model_fields_set})
        )
    except (ModelLoadError, ValidationError):
        return asked


def settings_in(path: Path) -> dict[str, Any]:
    """Return what PEFT wrote about an adapter.

    Raises:
        ModelLoadError: It cannot be read.
    """
    try:
        settings = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"{str(path / CONFIG)!r} cannot be read: {first_line(error)} Save the adapter again with save_pretrained."
        ) from error
    if not isinstance(settings, dict):
        raise ModelLoadError(f"{str(path / CONFIG)!r} holds no configuration. Save the adapter again.")
    return settings


def lora_in(path: Path, settings: Mapping[str, Any]) -> LoRAConfig:
    """Return an adapter's configuration in our words, every field of it understood or refused."""
    import peft

    kind = settings.get("peft_type")
    if kind in UNMERGEABLE:
        raise ModelLoadError(
            f"The adapter in {str(path)!r} is not one that can be trained here: it is of the kind {kind}, and only "
            f"LoRA is. Such an adapter is no change of weights, so that it cannot be merged either: give its base "
            f"as model_ref, and train an adapter anew."
        )
    if kind != "LORA":
        raise _refused(path, f"it is of the kind {kind}, and only LoRA is trained here")
    if settings.get("task_type") not in (None, "CAUSAL_LM"):
        raise _refused(path, f"it was made for {settings['task_type']}, not for a language model")
    start = settings.get("init_lora_weights", True)
    if start not in KEEP_THE_BASE:
        raise _refused(
            path,
            f"init_lora_weights={start!r} changes the base's weights when it begins: save it as plain LoRA "
            f"(save_pretrained with path_initial_model_for_weight_conversion)",
        )
    usual = peft.LoraConfig(task_type="CAUSAL_LM").to_dict()
    for name, value in settings.items():
        if name in FIELDS or name in WITHOUT_EFFECT or not value or value == usual.get(name):
            continue
        raise _refused(
            path, f"{name}={value!r} ({OTHER_KINDS.get(name, 'a setting that is not known here')})"
        )
    if not settings.get("target_modules"):
        raise _refused(path, "it names no target_modules")
    taken = {ours: settings[theirs] for theirs, ours in FIELDS.items() if settings.get(theirs) is not None}
    taken = {"rank": usual["r"], "alpha": usual["lora_alpha"]} | taken
    for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        if isinstance(taken.get(name), list):
            taken[name] = tuple(sorted(taken[name]))
    if isinstance(taken.get("layers_to_transform"), int):
        taken["layers_to_transform"] = (taken["layers_to_transform"],)
    try:
        return LoRAConfig(**taken)
    except ValidationError as error:
        raise _refused(path, str(error).rstrip(".")) from error


def _refused(path: Path, reason: str) -> ModelLoadError:
    return ModelLoadError(
        f"The adapter in {str(path)!r} is not one that can be trained here: {reason}. To train on top of it, merge it "
        f"into its base with PEFT (merge_and_unload), save that, and give the folder as model_ref."
    )


def base_of(path: Path, settings: Mapping[str, Any], locate: Callable[[str], str]) -> tuple[str, str | None]:
    """Return the base of an adapter: a path as it is, or seen from the adapter's folder, or a hub id."""
    named = settings.get("base_model_name_or_path")
    whole = (path / "config.json").is_file() and any(
        re.match(r"(model|pytorch_model).*\.(safetensors|bin)$", file.name) for file in path.iterdir()
    )
    candidates = [] if not named else [Path(named).expanduser(), path / named]
    found = next((str(folder) for folder in candidates if folder.exists()), None)
    if whole and (found is None or Path(found).resolve() == path.resolve()):
        return str(path), None
    if whole:
        raise ModelLoadError(
            f"The folder {str(path)!r} holds a whole model and an adapter of another base ({named!r}), so that it does "
            f"not say whether the adapter is in the weights already. Move {CONFIG}, or the weights of the model, away."
        )
    if not named:
        raise ModelLoadError(
            f"The adapter in {str(path)!r} does not say what its base is. Write the folder or hub id of the base as "
            f"base_model_name_or_path into {CONFIG}."
        )
    try:
        base = locate(found or str(named))
    except ModelLoadError as error:
        raise ModelLoadError(
            f"The base of the adapter in {str(path)!r} is not to be found: {error} (also looked in {str(path)!r}). "
            f"Write where it is as base_model_name_or_path into {CONFIG}."
        ) from error
    if (Path(base) / CONFIG).is_file():
        raise ModelLoadError(
            f"The base of the adapter in {str(path)!r} is an adapter itself ({base!r}): merge that one into its base "
            f"first (merge_and_unload, or export_adapter(…, merged=True))."
        )
    return base, None if Path(base).is_dir() else settings.get("revision")
