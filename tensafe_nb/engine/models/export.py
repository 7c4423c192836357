"""A model written as a folder that plain PEFT and transformers load: an adapter, or all weights."""

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from tensafe_nb.engine.models import adapter_folders, reading
from tensafe_nb.engine.models.load import LoadedModel, embeddings_of


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, which are not any more
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
