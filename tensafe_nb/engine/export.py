"""A stored state as a folder that plain PEFT and transformers load: an adapter, or a whole model."""

from pathlib import Path

from tensafe_nb.engine import checkpoints
from tensafe_nb.engine.engine import Engine
from tensafe_nb.errors import StorageError, ValidationError
from tensafe_nb.store.artifacts import ArtifactStore


def export(store: ArtifactStore, artifact_id: str, path: Path, *, merged: bool = False) -> Path:
    """Write a state in the clear, in the formats that others read.

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
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValidationError(
            f"export_adapter: {path} exists and is not an empty folder. Choose another one."
        )
    config = checkpoints.config_of(store, artifact_id)
    engine = Engine(config)
    checkpoints.load(engine, store, artifact_id)
    try:
        _write(engine, path, merged)
    except OSError as error:
        raise StorageError(
            f"export_adapter: {path} cannot be written ({error.strerror or error})."
        ) from error
    return path


def _write(engine: Engine, path: Path, merged: bool) -> None:
    model = engine.model
    if model.peft is None:
        model.causal.save_pretrained(path)
    elif merged:
        model.peft.merge_and_unload().save_pretrained(path)
    else:
        model.peft.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
