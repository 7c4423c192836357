"""Loading: from a `model_ref` to a model on a device, with its adapter, its embedding rows, and body and head apart."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tensafe_nb.config import LoRAConfig, TrainingConfig
from tensafe_nb.engine.models import adapter_folders, adapters, gguf, reading
from tensafe_nb.engine.models.bases import BASES, FACTOR_A, TOKENIZERS, Base, identity_of, plain_name, twin_of
from tensafe_nb.engine.quiet import quiet
from tensafe_nb.errors import ModelLoadError, TGTinkerError, nearest
from tensafe_nb.lifetimes import uncollected
from tensafe_nb.store.home import Home

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parents[1] / "assets"
BUILTINS = ("builtin:sums", "builtin:tiny")
# torch has one global random stream: who seeds it and draws from it takes turns
ROUNDING = 1e-6  # of the largest logit, by which the rows of one batch may differ though they say the same
GLOBAL_RANDOM = threading.Lock()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to train.

    Attributes:
        causal: The transformers model, adapters injected.
        peft: The PEFT wrapper around it; None when all weights are trained.
        tokenizer: Its tokenizer.
        device: Where it lives.
        compute_dtype: float32, or bfloat16 for autocast.
        split: Whether head(body(x)) equals the model's own logits, so that logits can be had per position.
        looks_ahead: Whether what comes behind a token changes what the model says at it: then it has to know what is
            padding.
        value_head: A scalar head on the hidden states; None without one.
        lora: The adapter's configuration, which a folder may have brought; None when all weights are trained.
        continued: Whether the adapter was trained before, so that base and policy differ from the beginning.
        own_embeddings: Whether the frozen embeddings are not those of the base: resized, or brought by the adapter.
        base: What its frozen tensors are shared with; None when they are its own.
        gguf_file: The GGUF file that it was converted from, if it was.
    """

    causal: Any
    peft: Any | None
    tokenizer: Any
    device: torch.device
    compute_dtype: torch.dtype
    split: bool
    looks_ahead: bool = False
    value_head: nn.Linear | None = None
    lora: LoRAConfig | None = None
    continued: bool = False
    own_embeddings: bool = False
    base: Base | None = None
    gguf_file: Path | None = None

    @property
    def body(self) -> Callable[..., Any]:
        return self.causal.get_decoder()  # type: ignore[no-any-return]

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        return self.causal.get_output_embeddings()  # type: ignore[no-any-return]

    @property
    def vocab_size(self) -> int:
        return int(self.causal.get_input_embeddings().weight.shape[0])

    @property
    def context(self) -> int | None:
        """Longest sequence the model was made for."""
        return getattr(self.causal.config, "max_position_embeddings", None)

    @property
    def has_dropout(self) -> bool:
        """Whether training draws random numbers: dropout layers, or rates that the architecture applies itself."""
        rates = [v for k, v in self.causal.config.to_dict().items() if "drop" in k and isinstance(v, float)]
        layers = [m.p for m in self.causal.modules() if isinstance(m, nn.Dropout)]
        return any(rate > 0 for rate in rates + layers)

    @property
    def precision(self) -> str:
        """What it computes in, by name: "float32" or "bfloat16"."""
        return str(self.compute_dtype).removeprefix("torch.")

    @property
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        trained = [(name, p) for name, p in self.causal.named_parameters() if p.requires_grad]
        head = self.value_head.named_parameters(prefix="value_head") if self.value_head is not None else ()
        return [*trained, *head]

    @property
    def own(self) -> list[tuple[str, nn.Parameter]]:
        """What a checkpoint holds: all that is trained, and the A that stays beside a trained B."""
        frozen = [(n, p) for n, p in self.causal.named_parameters() if not p.requires_grad and FACTOR_A in n]
        return [*self.trainable, *frozen]

    @property
    def end_tokens(self) -> frozenset[int]:
        """Every id that ends a completion: the tokenizer's, the generation config's."""
        ends = {self.tokenizer.eos_token_id}
        configured = getattr(self.causal.generation_config, "eos_token_id", None)
        ends.update(configured if isinstance(configured, list) else [configured])
        return frozenset(end for end in ends if end is not None)

    def autocast(self) -> torch.autocast:
        """Return the context in which the model computes in its compute dtype."""
        half = self.compute_dtype is torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half)


@contextlib.contextmanager
def own_random(seed: int | None = None) -> Iterator[None]:
    """Draw from torch's global random stream, from a seed if there is one, and leave it as it was."""
    with GLOBAL_RANDOM, torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def import_transformers() -> None:
    """Import it on the caller's thread.

    It puts another module in its own place once it has been imported: who imports it meanwhile on another thread, as
    `datasets` does, would be left with the first, which has nothing in it.
    """
    with uncollected():
        import transformers  # noqa: F401


def load(
    config: TrainingConfig,
    home: Home | None = None,
    *,
    alone: bool = False,
    served: bool = False,
    bare: bool = False,
) -> LoadedModel:
    """Load the model of a configuration, with the adapter of its folder, or a fresh one where it asks for one.

    With an adapter, its frozen tensors are those of every other that was loaded from the same files, in the same type
    and on the same device.

    Args:
        config: What to load, and what to make of it.
        home: Where a GGUF file is kept once it is converted; None takes the home folder of this process.
        alone: Share nothing: it is going to be changed.
        served: Nobody but the core reads its tokenizer, which it may then share too.
        bare: The frozen base without any adapter, also of a folder that brings one.

    Raises:
        ModelLoadError: No such model, or it cannot be loaded; the message says what to do.
        ValidationError: The adapter does not fit the model.
    """
    device = device_of(config.device)
    find = partial(readable, home=home)
    source = find(config.model_ref)
    brings = adapter_folders.adapter_in(source, find)
    origin, revision = (source, None) if brings is None else (brings.base, brings.revision)
    named = config.model_ref if brings is None else origin
    identity = identity_of(origin, revision)
    own = brings is not None and brings.own_tokenizer
    adapter = None if bare else brings

    @cache
    def tokenizer() -> Any:
        whose = identity_of(source, None) if own else identity
        return TOKENIZERS.get(whose, read_tokenizer) if served and whose is not None else read_tokenizer()

    def read_tokenizer() -> Any:
        with reading.ALONE:
            return reading.tokenizer_of(*((config.model_ref, source) if own else (named, origin, revision)))

    weights = {} if adapter is None else adapter.weights()
    adapts = bare or adapter is not None or config.lora_config is not None
    dtype = compute_dtype_of(config, device)
    kept = dtype if adapts else torch.float32  # what is trained is float32, and autocast rounds it

    def read() -> tuple[Any, int]:
        with reading.ALONE:
            causal = reading.read(named, origin, config.ignore_weights, revision)
        brought = embeddings_in(weights, causal)
        grown = resize_embeddings(causal, tokenizer(), max(brought.values(), default=0), config)
        return causal.to(device=device, dtype=kept), grown

    base: Base | None = None
    if adapts and not alone and identity is not None:
        rows = sorted((name, len(weight)) for name, weight in weights.items() if ".lora_" not in name)
        wanted = (tokens_of(tokenizer()) if config.resize_embeddings else None, *rows)
        base = BASES.get((identity, config.ignore_weights, kept, device, wanted), lambda: Base(*read()))
        causal, grown = base.twin(), base.grown
    else:
        causal, grown = read()
    warn_of_lacking_rows(causal, tokenizer(), config.model_ref)
    brought = embeddings_in(weights, causal)
    lora = None if bare else config.lora_config
    if adapter is not None:
        lora = adapter.merged_with(lora, lambda asked: adapters.layers_of(asked, causal))
    peft = None
    if lora is not None:
        with own_random(config.seed):
            peft = adapters.add_adapter(causal, lora)
        if base is not None:
            base.part(causal, {plain_name(name) for name in weights})
        if adapter is not None:
            adapters.fill_adapter(peft, weights, adapter.path)
    causal.eval()
    split, looks_ahead = found_of(causal, device, dtype, config.model_ref)
    saved = () if lora is None else lora.modules_to_save
    if grown and lora is not None:
        warn_of_frozen_rows(causal, grown)
    return LoadedModel(
        causal,
        peft,
        tokenizer(),
        device,
        dtype,
        split,
        looks_ahead,
        value_head_for(causal, device) if config.value_head else None,
        lora,
        continued=adapter is not None,
        own_embeddings=bool(grown)
        or not all(any(adapters.ends_in(name, each) for each in saved) for name in brought),
        base=base,
        gguf_file=path if (path := Path(config.model_ref).expanduser()).suffix == ".gguf" else None,
    )


def readable(model_ref: str, home: Home | None) -> str:
    """Return the folder of a model, or the hub id by which it can be read."""
    source = locate(model_ref, home)
    return source if Path(source).is_dir() else at_hand(source)


def value_head_for(causal: Any, device: torch.device) -> nn.Linear:
    """Return a head that says 0 everywhere before it is trained, in fp32."""
    width = causal.get_output_embeddings().weight.shape[1]
    with own_random():
        head = nn.Linear(width, 1, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def share(model: LoadedModel) -> LoadedModel:
    """Return a model of its own whose frozen tensors are the given one's; adapters are copies."""
    peft, causal, value_head = twin_of((model.peft, model.causal, model.value_head))
    causal.zero_grad(set_to_none=True)
    causal.eval()
    if model.base is not None:
        model.base.count(causal)
    return replace(model, peft=peft, causal=causal, value_head=value_head)


def locate(model_ref: str, home: Home | None) -> str:
    """Return the folder of a model, or the hub id that it must be.

    Raises:
        ModelLoadError: There is no such built-in, folder or file.
    """
    if model_ref in BUILTINS:
        return str(ASSETS / model_ref.removeprefix("builtin:"))
    if model_ref.startswith("builtin:"):
        raise ModelLoadError(f"There is no built-in model {model_ref!r}.{nearest(model_ref, BUILTINS)}")
    if "://" in model_ref:
        hub_id = "/".join(model_ref.partition("://")[2].split("/")[1:3])
        raise ModelLoadError(f"{model_ref!r} is an address. Give a model of the hub by its id: {hub_id!r}.")
    path = Path(model_ref).expanduser()
    if path.suffix == ".gguf":
        with reading.quiet_if(True):  # it has one bar of its own
            return str(gguf.converted(path, home))
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise ModelLoadError(f"{model_ref!r} is a file. Give the folder it is in: {str(path.parent)!r}.")
    if path.is_absolute() or model_ref.startswith((".", "~")) or model_ref.count("/") > 1:
        raise ModelLoadError(f"There is no folder {model_ref!r} (looked in {Path.cwd()}).")
    return model_ref


def at_hand(hub_id: str) -> str:
    """Return where a model of the hub can be read: the hub id, or the folder of an earlier download.

    An adapter is small, and its folder is what is looked into: it is downloaded whole.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        if not hub_answers():
            return str(snapshot_download(hub_id, local_files_only=True))
    except HFValidationError:
        return hub_id  # no name that the hub could have: reading the model will say so
    except LocalEntryNotFoundError as error:
        raise ModelLoadError(
            f"The model {hub_id!r} could not be loaded: the model hub cannot be reached, and this machine has no "
            f"earlier download. It is no built-in ({', '.join(BUILTINS)}) and no local folder, so it was taken for a "
            f"hub id: check the spelling and the network."
        ) from error
    try:
        hf_hub_download(hub_id, adapter_folders.CONFIG)
        return str(snapshot_download(hub_id))
    except (EntryNotFoundError, HfHubHTTPError):  # no adapter; what else is wrong, reading the model will say
        return hub_id


def hub_answers() -> bool:
    """Ask once and quickly: the hub's own client would retry for a minute before it says that there is no network."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=5)
    except httpx.HTTPError:
        return False
    return True


def device_of(name: str) -> torch.device:
    """Return the device of this name; "auto" takes an accelerator where there is one.

    Raises:
        ModelLoadError: torch sees no such device.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = accelerator.type if accelerator is not None and accelerator.type in ("cuda", "mps") else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError("device='cuda', but torch sees no CUDA GPU. Use device='auto' or 'cpu'.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ModelLoadError("device='mps', but torch sees no Apple GPU. Use device='auto' or 'cpu'.")
    return torch.device(name)


def is_cpu(name: str) -> bool:
    """Whether the device of this name ("auto" included) is the processor."""
    return name == "cpu" or (name == "auto" and device_of(name).type == "cpu")


def compute_dtype_of(config: TrainingConfig, device: torch.device) -> torch.dtype:
    """fp32 for the built-ins; else bf16 compute where the hardware multiplies bf16 matrices."""
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    if config.model_ref in BUILTINS:
        return torch.float32
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions to multiply matrices in bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def embeddings_of(causal: Any) -> dict[str, Any]:
    """Return the embedding and the head by their names."""
    ends = (causal.get_input_embeddings(), causal.get_output_embeddings())
    return {name: module for name, module in causal.named_modules() if any(module is end for end in ends)}


def embeddings_in(weights: Mapping[str, Tensor], causal: Any) -> dict[str, int]:
    """Return the rows of the embedding, and of the head, that an adapter brings, by their names."""
    kept = {
        name: weights.get(
            f"{adapter_folders.PREFIX}{name}.base_layer.weight",
            weights.get(f"{adapter_folders.PREFIX}{name}.weight"),
        )
        for name in embeddings_of(causal)
    }
    return {name: len(weight) for name, weight in kept.items() if weight is not None}


def resize_embeddings(causal: Any, tokenizer: Any, brought: int, config: TrainingConfig) -> int:
    """Give a model rows for its tokenizer's tokens, or for what its adapter brings; return how many are new."""
    rows = len(causal.get_input_embeddings().weight)
    wanted = brought or (max(rows, tokens_of(tokenizer)) if config.resize_embeddings else rows)
    if wanted != rows:
        with own_random(), quiet():
            causal.resize_token_embeddings(wanted, mean_resizing=False)
        begin_as_the_mean(causal, rows)
    return max(0, wanted - rows)


@torch.no_grad()
def begin_as_the_mean(causal: Any, rows: int) -> None:
    """Let new rows begin as the mean of the others, with a hundredth of their spread so that no two are equal.

    So a new token is neither likelier nor less likely than the others are on average. numpy's stream is the same on
    every processor, and always this one: a frozen row is not in a checkpoint, it is made again.
    """
    for module in embeddings_of(causal).values():
        for weight in module.parameters(recurse=False):
            old = weight[:rows].double()
            noise = np.random.default_rng(0).standard_normal(weight[rows:].shape)
            weight[rows:] = (old.mean(0) + 0.01 * old.std(0) * torch.from_numpy(noise)).to(weight.dtype)


def tokens_of(tokenizer: Any) -> int:
    """Return how many rows a tokenizer's tokens need."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def warn_of_lacking_rows(causal: Any, tokenizer: Any, model_ref: str) -> None:
    """Say that some tokens have no row."""
    rows, needed = len(causal.get_input_embeddings().weight), tokens_of(tokenizer)
    if needed > rows:
        logger.warning("%s: %s", model_ref, too_few_rows(needed, rows))


def too_few_rows(tokens: int, rows: int) -> str:
    """Say that a tokenizer has more tokens than its model has rows, and what to do."""
    return (
        f"the tokenizer has {tokens} tokens and the model {rows} rows for them. Tokens that were added need rows: "
        f"TrainingConfig(resize_embeddings=True)"
    )


def warn_of_frozen_rows(causal: Any, grown: int) -> None:
    """Say that new rows of the embedding stay as they began, where nothing trains them."""
    ends = embeddings_of(causal)
    if not any(p.requires_grad for module in ends.values() for p in module.parameters()):
        names = [name.rpartition(".")[2] for name in ends]
        logger.warning(
            "the %d new rows of the embedding are frozen and stay as they began: to train them, "
            "LoRAConfig(modules_to_save=%s)",
            grown,
            names,
        )


@torch.no_grad()
def found_of(causal: Any, device: torch.device, dtype: torch.dtype, model_ref: str) -> tuple[bool, bool]:
    """Look once, on three tokens, what is at hand: whether its logits are head(body(x)), and whether it looks ahead.

    Raises:
        ModelLoadError: The logits are no numbers.
    """
    half = dtype is not torch.float32
    ids = torch.tensor([[1, 2, 3], [1, 2, 0]], device=device)

    def logits(rows: torch.Tensor) -> torch.Tensor:
        return causal(input_ids=rows, use_cache=False).logits  # type: ignore[no-any-return]

    with torch.autocast(device.type, dtype, enabled=half):
        own = logits(ids)
        if not bool(own.isfinite().all()):
            reading.refuse_not_finite(model_ref, causal)
        off, largest = (own[0, :2] - own[1, :2]).abs().max(), own.abs().max()
        if off > (0.05 if half else 1e-3) * largest:
            logger.warning(
                "%r lets a token see the ones after it: a loss on next tokens shows it the answers. It is trained as "
                "it is, padding masked; is_decoder=true in its config.json makes models of BERT's kind causal",
                model_ref,
            )
        # the rows of a batch may be rounded in different ways, those of two are not
        looks_ahead = bool(off > ROUNDING * largest) and not torch.equal(
            *(logits(row.unsqueeze(0))[:, :2] for row in ids)
        )
        try:
            hidden = causal.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            split = causal.get_output_embeddings()(hidden)
        except (AttributeError, TypeError):
            return False, looks_ahead
    return own.shape == split.shape and torch.equal(own, split), looks_ahead


def refuse(error: Exception, model_ref: str) -> TGTinkerError:
    """Turn whatever broke a load into the error that every operation of the client will raise."""
    if isinstance(error, TGTinkerError):
        return error
    return ModelLoadError(
        f"The model {model_ref!r} could not be loaded: {type(error).__name__}: {reading.first_line(error)} "
        f"Is a file damaged or incomplete?"
    )
