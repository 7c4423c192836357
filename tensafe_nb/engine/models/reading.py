"""A folder in transformers' format, read whole or refused: a weight that is not in the file is never made up.

transformers fills in what a file lacks with random numbers, leaves out what it has no place for, and says so in a log.
Here that report is read, and whatever is amiss is an error with the names of the weights and what to do about them.
"""

import contextlib
import json
import logging
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tensafe_nb.config import covers
from tensafe_nb.errors import ModelLoadError
from tensafe_nb.lifetimes import uncollected

logger = logging.getLogger(__name__)

ALONE = (
    threading.Lock()
)  # transformers patches torch while it reads or writes a model: two at once corrupt each other

WRAPPERS = {  # what puts its name before every weight, and whose weights to save instead
    "module.": "DistributedDataParallel: save model.module",
    "_orig_mod.": "torch.compile: save model._orig_mod",
    "base_model.model.": "PEFT: save model.merge_and_unload(), or the adapter with model.save_pretrained",
    "pretrained_model.": "TRL's model with a value head: save model.pretrained_model",
    "_fsdp_wrapped_module.": "FSDP: gather the whole state first",
    "_forward_module.": "a trainer: save the model inside it",
}
OTHER_SENSES = ("vision", "audio", "speech", "image", "video")
FOREIGN = (  # what transformers raises at files that are not what they should be
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
)
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
LONGEST_POINTER = 1_024  # bytes of what Git LFS leaves in place of a large file
MOST_PATTERNS = 3  # proposed for ignore_weights
SHOWN = 5  # names in a message; all are in `details`
INTEGERS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}


def read(model_ref: str, source: str, ignore: Sequence[str] = (), revision: str | None = None) -> Any:
    """Return the model of a folder, or of a hub id, in float32.

    Args:
        model_ref: What the user asked for, for messages.
        source: The folder, or the hub id.
        ignore: Patterns of weights that the file may hold and the model need not have.
        revision: Of a hub id.

    Raises:
        ModelLoadError: It is of a kind that is not trained here, or anything is missing, left over or misshapen.
    """
    with uncollected():
        # the last brings in what `from_pretrained` would, whichever the model is
        from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

    where = {} if revision is None else {"revision": revision}
    folder = Path(source) if Path(source).is_dir() else None
    if folder is not None:
        refuse_incomplete(model_ref, folder)
    with _refusals(model_ref, folder):
        config = PreTrainedConfig.get_config_dict(source, **where)[0]
        refuse_kind(model_ref, config)
        with quiet_if(folder is not None), without_report(), without_adapter(source) as whole:
            causal, info = AutoModelForCausalLM.from_pretrained(
                whole,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, with their names
                **where,
            )
    check_report(model_ref, info, ignore, config)
    if folder is not None:
        refuse_integers(model_ref, folder)
        source = str(folder.absolute())
    causal.name_or_path = causal.config._name_or_path = (
        source  # of which an exported adapter says that it is its base
    )
    for module in causal.modules():
        if isinstance(module, PreTrainedModel):
            module.warn_if_padding_and_no_attention_mask = _warn_of_nothing
    return causal


def _warn_of_nothing(input_ids: Any, attention_mask: Any) -> None:
    """Stand for a warning of padding without a mask: a batch says what is padding, and where it matters is a mask."""


def tokenizer_of(model_ref: str, source: str, revision: str | None = None) -> Any:
    """Return the tokenizer of a folder, or of a hub id.

    Raises:
        ModelLoadError: There is none.
    """
    from transformers import AutoTokenizer

    where = {} if revision is None else {"revision": revision}
    folder = Path(source) if Path(source).is_dir() else None
    with _refusals(model_ref, folder), quiet_if(folder is not None):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **where)


def check_report(
    model_ref: str, info: Mapping[str, Any], ignore: Sequence[str], config: Mapping[str, Any]
) -> None:
    """Refuse a model whose weights are not exactly those of its file.

    Args:
        model_ref: What the user asked for.
        info: transformers' loading report: tied heads and what an architecture knows to ignore are not in it.
        ignore: Patterns of weights that may be left over.
        config: Of config.json.

    Raises:
        ModelLoadError: `details` holds all names under "missing", "unexpected" and "mismatched".
    """
    missing = sorted(info["missing_keys"])
    mismatched = sorted((name, tuple(there), tuple(here)) for name, there, here in info["mismatched_keys"])
    left_out = sorted(name for name in info["unexpected_keys"] if covers(ignore, name))
    unexpected = sorted(set(info["unexpected_keys"]) - set(left_out))
    for pattern in ignore:
        if not any(covers((pattern,), name) for name in left_out):
            logger.warning("ignore_weights: %r covers no weight of %s", pattern, model_ref)
    if not (missing or mismatched or unexpected or info["error_msgs"]):
        if left_out:
            logger.warning("%s: left out, as ignore_weights says: %s", model_ref, listed(left_out))
        return
    found = []
    if missing:
        found.append(
            f"{_count(missing, 'weight')} of the model {'are' if missing[1:] else 'is'} not in it: {listed(missing)}."
        )
    if mismatched:
        shapes = [f"{name} {there} there, {here} by config.json" for name, there, here in mismatched]
        found.append(f"{_count(shapes, 'weight')} {_has(shapes)} another shape: {listed(shapes)}.")
    if unexpected:
        found.append(
            f"{_count(unexpected, 'weight')} in it {_has(unexpected)} no place in the model: {listed(unexpected)}."
        )
    found += list(info["error_msgs"])
    raise ModelLoadError(
        f"The model {model_ref!r} could not be loaded as it is. {' '.join(found)} "
        f"{advice_on(missing, unexpected, mismatched, config)} Nothing is made up in its place.",
        details={"missing": missing, "unexpected": unexpected, "mismatched": mismatched},
    )


def refuse_not_finite(model_ref: str, causal: Any) -> None:
    """Refuse a model whose logits are not numbers, with the weights that are not.

    Raises:
        ModelLoadError: Always.
    """
    bad = [name for name, p in causal.named_parameters() if not bool(p.isfinite().all())]
    reason = f"these weights hold NaN or infinity: {listed(bad)}" if bad else "though all weights are finite"
    raise ModelLoadError(
        f"The model {model_ref!r} answers with NaN or infinity: {reason}. Is the file damaged, or from a run that "
        f"diverged?"
    )


def advice_on(
    missing: Sequence[str],
    unexpected: Sequence[str],
    mismatched: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]],
    config: Mapping[str, Any],
) -> str:
    """Return what is the matter, as far as the names tell, and what to do about it."""
    prefix = common_prefix(missing, unexpected)
    if prefix is not None:
        source = next((what for start, what in WRAPPERS.items() if prefix.startswith(start)), None)
        return (
            f"The names in the file begin with {prefix!r}, which the model's do not: they were saved through a wrapper"
            f"{f' ({source})' if source else ''}. Save the model inside it with save_pretrained, or take the prefix "
            f"{prefix!r} away from the names in the file."
        )
    if any(".lora_" in name for name in unexpected):
        return (
            "The file holds an adapter beside the weights: merge it (merge_and_unload) before you save, or save base "
            "and adapter each by itself and give the adapter's folder."
        )
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    surplus, lacking = _layers(unexpected), _layers(missing)
    if surplus and layers is not None and min(surplus) >= layers:
        return (
            f"config.json says {layers} layers, and the file holds layer {max(surplus)}: correct config.json."
        )
    if lacking and not unexpected and max(lacking) + 1 == layers:
        return (
            f"config.json says {layers} layers: if the file holds fewer on purpose, say so there; else fetch or save "
            f"the model again."
        )
    if {name.rpartition(".")[0].rpartition(".")[2] for name in missing} & {"lm_head", "embed_out"}:
        return (
            "The head is missing: this may be the body of a model, or a classifier; or the head is the embedding, "
            "which config.json then says with tie_word_embeddings: true."
        )
    if missing:
        return "Fetch or save the model again: what is missing cannot be left out."
    if mismatched:
        return "config.json and the weights are of different models: take both from one place."
    patterns = sorted({re.sub(r"\.\d+\.", r".\\d+.", name) for name in unexpected})
    patterns = patterns[:MOST_PATTERNS] + ["…"] * (len(patterns) > MOST_PATTERNS)
    return f"If the model is meant to do without them, say so: TrainingConfig(ignore_weights={patterns})."


def common_prefix(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """Return what stands before most of the missing names in the file."""
    for name in sorted(missing, key=len, reverse=True):
        for there in unexpected:
            if there.endswith(f".{name}"):
                prefix = there.removesuffix(name)
                known = set(unexpected)
                return prefix if 2 * sum(prefix + m in known for m in missing) >= len(missing) else None
    return None


def _layers(names: Iterable[str]) -> set[int]:
    found = (re.search(r"\.(?:layers|h|blocks|block)\.(\d+)\.", name) for name in names)
    return {int(match[1]) for match in found if match}


def listed(names: Sequence[str]) -> str:
    """Return the first few names, and how many there are besides."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _count(names: Sequence[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''}"


def _has(names: Sequence[str]) -> str:
    return "have" if len(names) > 1 else "has"


def refuse_incomplete(model_ref: str, folder: Path) -> None:
    """Say what a folder lacks before transformers says it in its own words."""
    names = {path.name for path in folder.iterdir()}
    if "config.json" not in names:
        raise ModelLoadError(f"The folder {model_ref!r} holds no config.json. {_instead(folder, names)}")
    large = sorted(
        folder / name for name in names if name.endswith((".safetensors", ".bin")) or name in TOKENIZERS
    )
    pointers = [file.name for file in large if is_pointer(file)]
    if pointers:
        raise ModelLoadError(
            f"The folder {model_ref!r} was cloned without its large files: {listed(pointers)} only says where they "
            f"are. Fetch them: git lfs pull."
        )
    if "model.safetensors" in names:
        return
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if index not in names:
            continue
        try:
            shards = set(json.loads((folder / index).read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelLoadError(
                f"{model_ref!r}: {index} cannot be read ({type(error).__name__}). Fetch or save the model again."
            ) from error
        absent = sorted(shards - names)
        if absent:
            raise ModelLoadError(
                f"The folder {model_ref!r} lacks {len(absent)} of its {len(shards)} files of weights: "
                f"{listed(absent)}. Fetch or save the model again."
            )
        return
    if not any(name.startswith("pytorch_model") or name.endswith(".safetensors") for name in names):
        raise ModelLoadError(f"The folder {model_ref!r} holds no weights. {_instead(folder, names)}")


def is_pointer(file: Path) -> bool:
    """Whether a file is what Git LFS leaves in place of a large one."""
    is_small = file.stat().st_size <= LONGEST_POINTER
    return is_small and file.read_bytes().startswith(b"version https://git-lfs")


def _instead(folder: Path, names: set[str]) -> str:
    """Return what to do with a folder that is no model."""
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if ggufs:
        return f"It holds GGUF files: give one of them, for instance {str(folder / ggufs[0])!r}."
    inner = sorted(
        name
        for name in names
        if (folder / name / "config.json").is_file() or (folder / name / "adapter_config.json").is_file()
    )
    if inner:
        return f"It holds folders that are models: give one of them, for instance {str(folder / inner[0])!r}."
    if "params.json" in names:
        return (
            "It is in its maker's own format: convert it to that of transformers, or fetch the converted one."
        )
    return (
        f"A model is a folder with config.json, model.safetensors and tokenizer.json; "
        f"this one holds {listed(sorted(names)) or 'nothing'}."
    )


def refuse_kind(model_ref: str, config: Mapping[str, Any]) -> None:
    """Refuse what is no causal language model with weights of its own, by what config.json says."""
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") or "an unnamed method"
        raise ModelLoadError(
            f"The model {model_ref!r} is stored quantised ({method}): such weights can be neither trained nor adapted "
            f"here. Take the model it was made from, or a GGUF file, which is converted to float32."
        )
    named = (config.get("architectures") or [None])[0]
    other = re.search(r"For(?!CausalLM)[A-Z]\w+$", named or "")
    senses = sorted(key for key in config if key.endswith("_config") and key.startswith(OTHER_SENSES))
    if senses:
        reason = f"it takes more than text ({', '.join(senses)})"
    elif config.get("is_encoder_decoder"):
        reason = "it has an encoder and a decoder"
    elif other:
        reason = f"it is saved as {named}, which has no language-model head"
        if "Conditional" in other[0]:
            reason = f"it is saved as {named}, which is made for something else"
    else:
        return
    raise ModelLoadError(
        f"The model {model_ref!r} is no language model that is trained here: {reason}. Only models that continue a "
        f"text are: those that AutoModelForCausalLM loads."
    )


def refuse_integers(model_ref: str, folder: Path) -> None:
    """Refuse weights that are stored as whole numbers: read as they are, they would be another model."""
    from safetensors import safe_open

    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            kinds = {
                name: file.get_slice(name).get_dtype()
                for name in file.keys()  # noqa: SIM118  # it is no dict
                if name.endswith("weight")
            }
        whole = [f"{name} ({kind})" for name, kind in sorted(kinds.items()) if kind in INTEGERS]
        if whole:
            raise ModelLoadError(
                f"The model {model_ref!r} holds weights stored as whole numbers: {listed(whole)}. They are quantised, "
                f"and config.json does not say how. Take the model they were made from."
            )


@contextlib.contextmanager
def _refusals(model_ref: str, folder: Path | None) -> Iterator[None]:
    """Turn what transformers raises into an error that says what to do."""
    try:
        yield
    except FOREIGN as error:
        raise ModelLoadError(
            f"The model {model_ref!r} could not be loaded: {explained(error, folder)}"
        ) from error
    except Exception as error:  # torch raises one of a module that is not imported here
        if type(error).__name__ != "UnpicklingError":
            raise
        raise ModelLoadError(
            f"The model {model_ref!r} holds Python objects besides tensors, and code that comes with a model is never "
            f"run. Save it as safetensors: model.save_pretrained(folder)."
        ) from error


def explained(error: Exception, folder: Path | None) -> str:
    """Return what an error of transformers means for whoever named the model, and what to do."""
    text = str(error)
    if isinstance(error, SafetensorError):
        return f"a file of weights is damaged or cut off: {first_line(error)} Fetch or save the model again."
    if "trust_remote_code" in text:
        return "it needs code of its own, and code that comes with a model is never run. Take another model."
    if "model type" in text and "does not recognize" in text:
        return f"{first_line(error)} Update it: pip install -U transformers"
    if "during automatic conversion" in text:
        return (
            "some of its weights cannot be put together (experts that are missing, or of different shapes). Fetch or "
            "save the model again."
        )
    if "Unrecognized configuration class" in text:
        return "it is no language model. Only models that continue a text are trained: those of AutoModelForCausalLM."
    if "instantiate the backend tokenizer" in text:
        return (
            "it comes without a tokenizer. Put tokenizer.json and tokenizer_config.json beside it, from the model that "
            "it was made from."
        )
    if folder is not None:
        advice = "Check that the folder holds config.json, model.safetensors and tokenizer.json."
    else:
        advice = (
            "It is no built-in and no local folder, so it was taken for a hub id: check the spelling, the network, and "
            "HF_TOKEN for gated models."
        )
    return f"{first_line(error)} {advice}"


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, as a sentence."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".") + "."


@contextlib.contextmanager
def without_report() -> Iterator[None]:
    """Keep transformers' table of what did not fit out of the cell: it becomes an error, or was asked for."""

    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    theirs = logging.getLogger("transformers.modeling_utils")
    theirs.addFilter(is_no_report)
    try:
        yield
    finally:
        theirs.removeFilter(is_no_report)


@contextlib.contextmanager
def without_adapter(source: str) -> Iterator[str]:
    """Let transformers see a folder without the adapter in it, which it would put on in its own way."""
    folder = Path(source)
    if not (folder / "adapter_config.json").is_file():
        yield source
        return
    with tempfile.TemporaryDirectory() as view:
        for file in folder.absolute().iterdir():
            if not file.name.startswith("adapter_"):
                (Path(view) / file.name).symlink_to(file)
        yield view


@contextlib.contextmanager
def quiet_if(local: bool) -> Iterator[None]:
    """A bar is for a download: for a local folder it would only litter the cell."""
    from transformers.utils import logging as transformers_logging

    silenced = local and transformers_logging.is_progress_bar_enabled()
    if silenced:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if silenced:
            transformers_logging.enable_progress_bar()
