"""A model written for others: as a folder that plain PEFT and transformers load, or as GGUF files for llama.cpp."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensafe_nb.engine.models import adapter_folders, reading
from tensafe_nb.engine.models.bases import ADAPTER, plain_name
from tensafe_nb.engine.models.load import LoadedModel, embeddings_of
from tensafe_nb.engine.quiet import quiet
from tensafe_nb.errors import ValidationError

IN_GGUF = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Architectures that are written as GGUF, by transformers' names, and llama.cpp's names for them."""


def write_folder(model: LoadedModel, folder: Path, *, merged: bool) -> None:
    """Write a model, or its adapter alone, and its tokenizer.

    Args:
        model: What to write; merging changes it, so that it is of no further use.
        folder: An empty folder.
        merged: Add the adapter into the base weights. A model without an adapter is always written whole.
    """
    with reading.ALONE:
        if model.peft is None:
            save_whole(model.causal, folder)
        elif merged:
            save_whole(merge(model), folder)
        else:
            model.peft.save_pretrained(folder, save_embedding_layers=False)
            if model.own_embeddings:
                add_embeddings(model.causal, folder / adapter_folders.WEIGHTS[0])
        model.tokenizer.save_pretrained(folder)


def merge(model: LoadedModel) -> Any:
    """Return the base with its adapter added in.

    An adapted embedding or head first gets a weight of its own: added into a tied one, its adapter would change both.
    """
    for module in embeddings_of(model.causal).values():
        if hasattr(module, "base_layer"):
            module.base_layer.weight = nn.Parameter(module.base_layer.weight.detach().clone())
    with quiet():  # of tied weights, which are not any more
        return model.peft.merge_and_unload()  # type: ignore[union-attr]


def save_whole(causal: Any, folder: Path) -> None:
    """Write a model; where embedding and head have come apart, its configuration says so."""
    ends = [module.weight for module in embeddings_of(causal).values()]
    if len(ends) == 2 and ends[0] is not ends[1]:  # a file of both, that says so
        causal.config.tie_word_embeddings = False
        causal.config.get_text_config().tie_word_embeddings = False
        causal.all_tied_weights_keys = {}
    causal.save_pretrained(folder)


def add_embeddings(causal: Any, file: Path) -> None:
    """Put the frozen embedding and head beside the adapter, as PEFT does where they are not those of the base."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    for name, module in embeddings_of(causal).items():
        if hasattr(module, "modules_to_save"):  # trained, and in the file already
            continue
        adapted = hasattr(module, "base_layer")
        base = module.base_layer if adapted else module
        start = f"{adapter_folders.PREFIX}{name}{'.base_layer' if adapted else ''}"
        for own, value in base.named_parameters(recurse=False):
            tensors[f"{start}.{own}"] = value.detach().cpu().clone()
    save_file(tensors, file, metadata={"format": "pt"})


def write_gguf(model: LoadedModel, path: Path) -> None:
    """Write a base without its adapter, in float16, for a program that is given tokens: there is no tokenizer in it.

    Raises:
        ValidationError: What it computes cannot be written so.
    """
    file, config, (turns, factors) = GgufDraft(model, path), model.causal.config, _rotary(model)
    writer = file.writer
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(2 * len(factors))
    writer.add_value_length(2 * len(factors))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(turns)
    writer.add_rope_dimension_count(2 * len(factors))
    writer.add_tokenizer_model("none")
    if not torch.equal(factors, torch.ones_like(factors)):
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    for name, weight in model.causal.named_parameters():
        if ADAPTER not in name:
            known, exact = file.placed(plain_name(name), weight)
            half = exact.half()
            keeps = exact.ndim > 1 and bool(half.isfinite().all())
            writer.add_tensor(known, (half if keeps else exact).numpy())
    file.finish()


def adds_nothing(model: LoadedModel) -> bool:
    """Whether an adapter is as it began: B is 0 in every layer."""
    return not any(bool(b.any()) for name, b in model.own if ".lora_B." in name)


def write_gguf_adapter(model: LoadedModel, path: Path) -> None:
    """Write an adapter, in float32, its scales multiplied into B, for a base of `write_gguf` or a GGUF file.

    Raises:
        ValidationError: What is trained is more than LoRA of the layers' matrices.
    """
    file = GgufDraft(model, path)
    file.writer.add_type("adapter")
    file.writer.add_string("adapter.type", "lora")
    file.writer.add_float32("adapter.lora.alpha", 0.0)  # B brings the scales, one for each layer
    for name, a, b in factors_of_layers(model):
        known, placed = file.placed(f"{name}.weight", b)
        file.writer.add_tensor(f"{known}.lora_a", a.detach().float().cpu().contiguous().numpy())  # (r, in)
        file.writer.add_tensor(f"{known}.lora_b", placed.numpy())  # (out, r)
    file.finish()


def gguf_architecture(model: LoadedModel) -> str:
    """Return llama.cpp's name of a model's architecture.

    Raises:
        ValidationError: It is not written as GGUF here.
    """
    config: Any = model.causal.config
    kind = config.model_type
    if kind not in IN_GGUF:
        raise _not_in_gguf(f"the architecture {kind!r} (it is known of {', '.join(IN_GGUF)})")
    windowed = kind == "mistral" or getattr(config, "use_sliding_window", False)
    if windowed and getattr(config, "sliding_window", None):
        raise _not_in_gguf("attention in a sliding window")
    if model.own_embeddings:
        raise _not_in_gguf(
            "an embedding that is not the one of the base's own file (resized, or an adapter's)"
        )
    return IN_GGUF[kind]


class GgufDraft:
    """A GGUF file in the making: which name llama.cpp has for a tensor, and in which order it wants its rows."""

    def __init__(self, model: LoadedModel, path: Path) -> None:
        import gguf

        self._architecture, self._config = gguf_architecture(model), model.causal.config
        self.writer: Any = gguf.GGUFWriter(path, self._architecture)
        number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == self._architecture)
        self._names = gguf.get_tensor_name_map(number, self._config.num_hidden_layers)

    def placed(self, name: str, weight: Tensor) -> tuple[str, Tensor]:
        """Return llama.cpp's name of a tensor (out, …), and what it holds there, in float32.

        Of Llama, it turns neighbouring numbers of a head by one angle, transformers those of the head's two halves.
        """
        known = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise _not_in_gguf(f"the tensor {name!r}")
        found, module = weight.detach().float().cpu(), name.split(".")[-2]
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(module)
        if heads is not None and self._architecture == "llama":
            halves = found.view(getattr(self._config, heads), 2, -1, *found.shape[1:])
            found = halves.transpose(1, 2).reshape(found.shape)
        return str(known), found.contiguous()

    def finish(self) -> None:
        """Write it."""
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def _rotary(model: LoadedModel) -> tuple[float, Tensor]:
    """Return the base of rotary positions, and by how much each frequency is divided, (width of a head / 2,)."""
    config, rotary = model.causal.config, model.causal.get_decoder().rotary_emb
    settings = getattr(config, "rope_parameters", None) or {}
    kind, frequencies = settings.get("rope_type", "default"), rotary.inv_freq.double().cpu()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kind not in ("default", "linear", "llama3") or 2 * len(frequencies) != width:
        raise _not_in_gguf(f"rotary positions of the kind {kind!r}, or of a part of each head,")
    if config.hidden_act != "silu":
        raise _not_in_gguf(f"the activation {config.hidden_act!r}")
    turns = float(settings.get("rope_theta", 10_000.0))
    plain = turns ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return turns, torch.ones(width // 2) if kind == "default" else (plain / frequencies).float()


def factors_of_layers(model: LoadedModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield of each adapted layer its name, A (r, in), and s B (out, r).

    Raises:
        ValidationError: What is trained is more than LoRA of the layers' matrices.
    """
    from peft.tuners.lora import Linear, LoraLayer

    for name, _ in model.trainable:
        if ADAPTER not in name and not name.startswith("value_head"):
            raise _not_in_gguf(f"{plain_name(name)!r}, which is trained beside the adapter,")
    ends = embeddings_of(model.causal)
    for name, module in model.causal.named_modules():
        if isinstance(module, LoraLayer):
            plain = isinstance(module, Linear) and type(module.get_base_layer()) is nn.Linear
            if not plain or module.lora_variant or name in ends:
                raise _not_in_gguf(
                    f"the adapter of {name!r} (LoRA of the layers' matrices can, nothing else)"
                )
            b = module.lora_B["default"].weight * module.scaling["default"]
            yield name, module.lora_A["default"].weight, b


def _not_in_gguf(what: str) -> ValidationError:
    return ValidationError(
        f"engine='llama.cpp': {what} cannot be handed to llama.cpp. Sample with engine='torch', which samples whatever "
        f"can be trained."
    )
