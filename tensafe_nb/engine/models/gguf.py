"""GGUF files: converted once to transformers' own format, for reading one takes longer than all the rest of a load.

The weights become float32, exactly as transformers reads them; tokenizer and chat template are the file's own.
"""

import contextlib
import hashlib
import importlib.util
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensafe_nb.engine.models import reading
from tensafe_nb.errors import ModelLoadError, StorageError
from tensafe_nb.locks import held
from tensafe_nb.store.disk import Files, disk_errors, make_folder, publish_folder
from tensafe_nb.store.home import Home

logger = logging.getLogger(__name__)

VERSION = 2  # of what is written here; another number converts every file anew (1 made up weights that were missing)
DRAFT = ".converting"
STAGES = 3  # the weights, the tokenizer, the files
BAR_WIDTH = 88


def converted(path: Path, home: Home | None = None) -> Path:
    """Return the folder that a GGUF file was converted to; the first call for a content converts it.

    It has its name only once all of it is on the disk: what a killed conversion leaves is swept away by the next.

    Args:
        path: The file.
        home: Where converted models are kept; None takes the home folder of this process.

    Raises:
        ModelLoadError: No such file, a package is missing, or transformers cannot read the file.
        StorageError: The disk is full, or the home folder cannot be written.
    """
    if not path.is_file():
        raise ModelLoadError(f"There is no file {str(path)!r} (looked in {Path.cwd()}).")
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()[:24]
    models = (home or Home.of_environment()).models()
    folder = models / f"{path.stem}-{content}-v{VERSION}"
    if not folder.is_dir():
        files = Files()
        with disk_errors(f"convert {path.name}"):
            make_folder(files, models)
            with held(models / ".lock", exclusive=True):
                if not folder.is_dir():
                    convert(path, folder, files)
    return folder


def convert(path: Path, folder: Path, files: Files) -> None:
    """Write everything under another name, then give it its own in one step. The caller holds the lock."""
    for left in folder.parent.glob(f"*{DRAFT}"):
        shutil.rmtree(left)
    draft = folder.with_name(folder.name + DRAFT)
    try:
        write_draft(path, draft)
        publish_folder(files, draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)  # gone already, unless something failed


def write_draft(path: Path, draft: Path) -> None:
    """Read a GGUF file, and write the folder that it becomes.

    Raises:
        ModelLoadError: transformers cannot read the file.
        StorageError: There is no room for the folder.
    """
    from tqdm import tqdm

    with tqdm(total=STAGES, desc=f"Converting {path.name}, once", leave=False, ncols=BAR_WIDTH) as bar:
        try:
            metadata = metadata_of(path)
            with reading.ALONE:
                model = model_of(path)
                bar.update()
                tokenizer = tokenizer_of(path, metadata)
            bar.update()
        except (OSError, ValueError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
            raise ModelLoadError(
                f"The GGUF file {str(path)!r} could not be converted: {reading.first_line(error)} Is it complete, and "
                f"of an architecture that transformers reads from GGUF? A folder in transformers' format always works."
            ) from error
        check_space(model, draft.parent)
        with reading.ALONE:
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
        bar.update()


def metadata_of(path: Path) -> dict[str, Any]:
    """Return what the file says of itself, after refusing what cannot be converted."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelLoadError(
            f"{str(path)!r}: reading a GGUF file needs the package gguf. Install it: pip install gguf"
        )
    try:
        from transformers.integrations.gguf.reader import read_gguf_metadata
    except ImportError as error:
        raise ModelLoadError(
            f"{str(path)!r}: this transformers is too old for GGUF files. Update it: pip install -U transformers"
        ) from error
    metadata: dict[str, Any] = read_gguf_metadata(str(path))[0]
    if metadata.get("split.count", 0) > 1:
        raise ModelLoadError(
            f"{str(path)!r} is one of {metadata['split.count']} parts of a model. Join them first: "
            f"llama-gguf-split --merge"
        )
    return metadata


def model_of(path: Path) -> Any:
    """Return the file's model in float32, an ordinary one that can be saved."""
    import torch
    from transformers import AutoModelForCausalLM

    with without_bar(), reading.without_report():
        model, info = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
        )
    reading.check_report(str(path), info, (), model.config.to_dict())
    # The weights are plain float32, but while the quantizer that read them is attached, saving is refused.
    model.hf_quantizer, model.is_quantized, model.quantization_method = None, False, None
    del model.config.quantization_config
    return model


@contextlib.contextmanager
def without_bar() -> Iterator[None]:
    """Keep transformers' own bar, which stays behind when done, out of the cell."""
    from transformers import modeling_gguf_pytorch_utils as utils

    theirs = getattr(utils, "tqdm", None)
    utils.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        utils.tqdm = theirs


def tokenizer_of(path: Path, metadata: dict[str, Any]) -> Any:
    """Return the file's tokenizer, which splits texts by the rule that the file names."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        split_as_trained(tokenizer, metadata.get("tokenizer.ggml.pre", "default"))
    return tokenizer


def split_as_trained(tokenizer: Any, pre: str) -> None:
    """Make a byte-level tokenizer split texts as the file says, where transformers falls back to GPT-2's rule."""
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs

    # transformers 5.17 has no such table, and splits all texts as for GPT-2
    known = getattr(theirs, "GGUF_PRE_TOKENIZER_SPLITS", ())
    if pre == "smollm":
        # llama.cpp: \p{N} by itself, then GPT-2's rule; so two spaces before a digit are one token
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif pre not in {"default", "gpt-2", "phi-2", *known}:
        logger.warning(
            "The GGUF file asks for the pre-tokenizer %r, which is not known here: texts are split as for GPT-2, and "
            "some tokens may differ from those the model was trained on.",
            pre,
        )


def check_space(model: Any, folder: Path) -> None:
    """Refuse before a disk is full, for safetensors would say so only in an error of its own kind."""
    needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02:
        raise StorageError(
            f"The converted model needs {needed / 1e9:.1f} GB under {str(folder)!r}, where {free / 1e9:.1f} GB are "
            f"free. Free some space, or set TENSAFE_HOME to a folder on another disk."
        )
