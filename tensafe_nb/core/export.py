"""A stored state as a folder that plain PEFT and transformers load: an adapter, or a whole model."""

import secrets
import shutil
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from tensafe_nb.core import checkpoints
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models import adapter_folders
from tensafe_nb.engine.models import load as models
from tensafe_nb.engine.models.load import LoadedModel
from tensafe_nb.engine.models.reading import first_line
from tensafe_nb.errors import StorageError, TGTinkerError, ValidationError
from tensafe_nb.store.artifacts.artifacts import ArtifactStore
from tensafe_nb.store.disk import Files


def export(store: ArtifactStore, artifact_id: str, path: Path, *, merged: bool = False) -> Path:
    """Write a state in the clear, in the formats that others read. The folder is whole, or it is not there.

    Args:
        store: Where the state is kept.
        artifact_id: Its id, or its name.
        path: A folder that does not exist yet, or is empty.
        merged: Add the adapter into the base weights and write a whole model. States of all weights always are.

    Returns:
        The folder.

    Raises:
        ArtifactNotFoundError: There is no such state.
        DecryptionError: It does not open.
        ModelLoadError: Its base model is not here.
        ValidationError: The folder holds something already.
        StorageError: It cannot be written.
    """
    target = path.expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir()) or target == Path.cwd()):
        raise ValidationError(
            f"export_adapter: {path} exists and is not an empty folder, or is the one you are in. Choose another one."
        )
    config = checkpoints.config_of(store, artifact_id)
    engine = Engine(
        config.replace(dtype="float32")
    )  # added in bfloat16, most of a small adapter would be lost
    checkpoints.load(engine, store, artifact_id)
    made = [folder for folder in target.parents if not folder.exists()]
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.exporting")
    try:
        draft.mkdir(parents=True)
        with models.LOADING:  # saving looks at the same patched torch as loading
            _write(engine.model, draft, merged)
        _publish(draft, target)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        for folder in made:  # the innermost first
            if folder.is_dir():
                folder.rmdir()
        if not isinstance(error, Exception) or isinstance(error, TGTinkerError):
            raise
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {first_line(error)}".rstrip(
            "."
        )
        raise StorageError(
            f"export_adapter: {path} cannot be written ({reason}). Nothing is left of it."
        ) from error
    return path


def _publish(draft: Path, target: Path) -> None:
    """Give a folder its name, once all of it is on the disk."""
    files = Files()
    for file in draft.iterdir():
        with files.update(file) as written:
            files.fsync(written)
    files.fsync_folder(draft)
    if target.exists():
        target.rmdir()
    files.replace(draft, target)
    files.fsync_folder(target.parent)


def _write(model: LoadedModel, folder: Path, merged: bool) -> None:
    if model.peft is None:
        _save_whole(model.causal, folder)
    elif merged:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied weights, which are not any more
            _untie(model.causal)
            whole = model.peft.merge_and_unload()
        _save_whole(whole, folder)
    else:
        model.peft.save_pretrained(folder, save_embedding_layers=False)
        if model.own_embeddings:
            _add_embeddings(model.causal, folder / adapter_folders.WEIGHTS[0])
    model.tokenizer.save_pretrained(folder)


def _untie(causal: Any) -> None:
    """Give an adapted embedding or head a weight of its own: added into a tied one, its adapter would change both."""
    for module in models.embeddings_of(causal).values():
        if hasattr(module, "base_layer"):
            module.base_layer.weight = nn.Parameter(module.base_layer.weight.detach().clone())


def _save_whole(causal: Any, folder: Path) -> None:
    ends = [module.weight for module in models.embeddings_of(causal).values()]
    if len(ends) == 2 and ends[0] is not ends[1]:  # a file of both, that says so
        causal.config.tie_word_embeddings = False
        causal.config.get_text_config().tie_word_embeddings = False
        causal.all_tied_weights_keys = {}
    causal.save_pretrained(folder)


def _add_embeddings(causal: Any, file: Path) -> None:
    """Put the frozen embedding and head beside the adapter, as PEFT does where they are not those of the base."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    for name, module in models.embeddings_of(causal).items():
        if hasattr(module, "modules_to_save"):  # trained, and in the file already
            continue
        adapted = hasattr(module, "base_layer")
        base = module.base_layer if adapted else module
        start = f"{adapter_folders.PREFIX}{name}{'.base_layer' if adapted else ''}"
        for own, value in base.named_parameters(recurse=False):
            tensors[f"{start}.{own}"] = value.detach().cpu().clone()
    save_file(tensors, file, metadata={"format": "pt"})
