"""A stored state as a folder that plain PEFT and transformers load: an adapter, or a whole model."""

import secrets
import shutil
from pathlib import Path

from tensafe_nb.core import checkpoints
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models import load as models
from tensafe_nb.engine.models.export import write_folder
from tensafe_nb.engine.models.reading import first_line
from tensafe_nb.errors import StorageError, TGTinkerError, ValidationError
from tensafe_nb.store.disk import Files, publish_folder
from tensafe_nb.store.vault import Vault


def export(vault: Vault, artifact_id: str, path: Path, *, merged: bool = False) -> Path:
    """Write a state in the clear, in the formats that others read. The folder is whole, or it is not there.

    Args:
        vault: Where the state is kept.
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
    config = checkpoints.config_of(vault.artifacts, artifact_id)
    config = config.replace(dtype="float32")  # added in bfloat16, most of a small adapter would be lost
    engine = Engine(config, models.load(config, vault.home, alone=merged))
    checkpoints.load(engine, vault.artifacts, artifact_id)
    made = [folder for folder in target.parents if not folder.exists()]
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}.exporting")
    try:
        draft.mkdir(parents=True)
        write_folder(engine.model, draft, merged=merged)
        publish_folder(Files(), draft, target)
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
