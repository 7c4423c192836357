"""From a `model_ref` to a model on a device: loading, adapters, and the split into body and head."""

import contextlib
import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensafe_nb.config import LoRAConfig, TrainingConfig
from tensafe_nb.engine import gguf
from tensafe_nb.errors import ModelLoadError, TGTinkerError, ValidationError, nearest

ASSETS = Path(__file__).parent / "assets"
BUILTINS = ("builtin:sums", "builtin:tiny")
GLOBAL_RANDOM = (
    threading.Lock()
)  # torch has one global random stream: who seeds it and draws from it takes turns
_LOADING = threading.Lock()  # transformers patches torch while it loads: two loads at once corrupt each other


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
        value_head: A scalar head on the hidden states; None without one.
    """

    causal: Any
    peft: Any | None
    tokenizer: Any
    device: torch.device
    compute_dtype: torch.dtype
    split: bool
    value_head: nn.Linear | None = None

    @property
    def body(self) -> Callable[..., Any]:
        return self.causal.get_decoder()  # type: ignore[no-any-return]

    @property
    def head(self) -> Callable[[Tensor], Tensor]:
        return self.causal.get_output_embeddings()  # type: ignore[no-any-return]

    @property
    def vocab_size(self) -> int:
        embeddings = self.causal.get_input_embeddings()
        return int(
            getattr(embeddings, "base_layer", embeddings).num_embeddings
        )  # within an adapter of its own

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
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        trained = [(name, p) for name, p in self.causal.named_parameters() if p.requires_grad]
        head = self.value_head.named_parameters(prefix="value_head") if self.value_head is not None else ()
        return [*trained, *head]

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


def load(config: TrainingConfig) -> LoadedModel:
    """Load the model of a configuration, with fresh adapters when it asks for them.

    Raises:
        ModelLoadError: No such model, or it cannot be loaded; the message says what to do.
        ValidationError: The adapter does not fit the model.
    """
    device = _device(config.device)
    with _LOADING:
        folder = _locate(config.model_ref)
        causal, tokenizer = _read(config.model_ref, folder)
    dtype = _dtype(config, device)
    frozen = config.lora_config is not None
    causal = causal.to(device=device, dtype=dtype if frozen else torch.float32)
    peft = _add_adapter(causal, config.lora_config, config.seed) if config.lora_config else None
    causal.eval()
    split = _head_of_body_is_the_model(causal, device, dtype)
    return LoadedModel(
        causal,
        peft,
        tokenizer,
        device,
        dtype,
        split,
        _value_head(causal, device) if config.value_head else None,
    )


def _value_head(causal: Any, device: torch.device) -> nn.Linear:
    """Return a head that says 0 everywhere before it is trained, in fp32."""
    width = causal.get_output_embeddings().weight.shape[1]
    with GLOBAL_RANDOM, torch.random.fork_rng(devices=[]):
        head = nn.Linear(width, 1, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def share(model: LoadedModel) -> LoadedModel:
    """Return a model of its own whose frozen tensors are the given one's; adapters are copies."""
    frozen = [p for p in model.causal.parameters() if not p.requires_grad] + list(model.causal.buffers())
    memo: dict[int, Any] = {id(tensor): tensor for tensor in frozen}
    peft, causal, value_head = copy.deepcopy((model.peft, model.causal, model.value_head), memo)
    causal.zero_grad(set_to_none=True)
    causal.eval()
    return replace(model, peft=peft, causal=causal, value_head=value_head)


def _locate(model_ref: str) -> str:
    if model_ref in BUILTINS:
        return str(ASSETS / model_ref.removeprefix("builtin:"))
    if model_ref.startswith("builtin:"):
        raise ModelLoadError(f"There is no built-in model {model_ref!r}.{nearest(model_ref, BUILTINS)}")
    path = Path(model_ref).expanduser()
    if path.suffix == ".gguf":
        with _quiet_if(True):  # it has one bar of its own
            return str(gguf.converted(path))
    if path.is_dir():
        return str(path)
    if path.is_absolute() or model_ref.startswith((".", "~")) or model_ref.count("/") > 1:
        raise ModelLoadError(f"There is no folder {model_ref!r} (looked in {Path.cwd()}).")
    return model_ref


def _read(model_ref: str, folder: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = Path(folder).is_dir()
    try:
        with _quiet_if(local):
            source = folder if local or _hub_answers() else _cached(folder)
            causal = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        advice = (
            "Check that the folder holds config.json, model.safetensors and tokenizer.json."
            if local
            else f"It is no built-in ({', '.join(BUILTINS)}) and no local folder, so it was taken for a hub id: "
            f"check the spelling, the network, and HF_TOKEN for gated models."
        )
        raise ModelLoadError(
            f"The model {model_ref!r} could not be loaded: {_first_line(error)} {advice}"
        ) from error
    return causal, tokenizer


def _cached(hub_id: str) -> str:
    """Return the folder of a model that was downloaded before; without network there is no other."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return str(snapshot_download(hub_id, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise OSError("the model hub cannot be reached, and this machine has no earlier download") from error


def _hub_answers() -> bool:
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


@contextlib.contextmanager
def _quiet_if(local: bool) -> Iterator[None]:
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


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".") + "."


def _device(name: str) -> torch.device:
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = accelerator.type if accelerator is not None and accelerator.type in ("cuda", "mps") else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError("device='cuda', but torch sees no CUDA GPU. Use device='auto' or 'cpu'.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ModelLoadError("device='mps', but torch sees no Apple GPU. Use device='auto' or 'cpu'.")
    return torch.device(name)


def _dtype(config: TrainingConfig, device: torch.device) -> torch.dtype:
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


def _add_adapter(causal: Any, lora: LoRAConfig, seed: int) -> Any:
    import peft

    from tensafe_nb.engine.adapters import FusedLinear

    _check_adapter(causal, lora)
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias=lora.bias,
        task_type="CAUSAL_LM",
    )
    settings._register_custom_module({nn.Linear: FusedLinear})
    with GLOBAL_RANDOM, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(causal, settings)
    _train_in_float32(causal)
    return adapted


def _train_in_float32(causal: Any) -> None:
    """Keep what is trained in fp32, adapters and the biases that are trained along."""
    for module in causal.modules():
        own = list(module.parameters(recurse=False))
        if any(p.requires_grad for p in own):
            mixes = isinstance(module, nn.LayerNorm)  # takes its weight and its bias in one type only
            for parameter in own:
                if parameter.requires_grad or mixes:
                    parameter.data = parameter.data.float()


def _check_adapter(causal: Any, lora: LoRAConfig) -> None:
    layers = {
        name: m
        for name, m in causal.named_modules()
        if hasattr(m, "weight") and getattr(m.weight, "ndim", 0) == 2
    }
    names = {name.rsplit(".", 1)[-1] for name in layers}
    if not isinstance(lora.target_modules, str):
        if not lora.target_modules:
            raise ValidationError(
                "LoRAConfig.target_modules is empty: name at least one layer, or 'all-linear'."
            )
        for target in lora.target_modules:
            if not any(name == target or name.endswith(f".{target}") for name in layers):
                raise ValidationError(
                    f"The model has no layer named {target!r} to adapt.{nearest(target, names)}"
                )
    smallest = min(min(m.weight.shape) for name, m in layers.items() if _targeted(name, lora, causal))
    if lora.rank > smallest:
        raise ValidationError(
            f"LoRAConfig.rank={lora.rank} is larger than the smallest adapted layer ({smallest}): "
            f"an adapter of that rank would hold more than the layer. Choose rank ≤ {smallest}."
        )


def _targeted(name: str, lora: LoRAConfig, causal: Any) -> bool:
    if isinstance(lora.target_modules, str):
        module = causal.get_submodule(name)
        return module not in (causal.get_output_embeddings(), causal.get_input_embeddings())
    return any(name == target or name.endswith(f".{target}") for target in lora.target_modules)


@torch.no_grad()
def _head_of_body_is_the_model(causal: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Probe once, on three tokens, whether this architecture's logits are plainly head(body(x))."""
    ids = torch.tensor([[1, 2, 3]], device=device)
    half = dtype is not torch.float32
    try:
        with torch.autocast(device.type, dtype, enabled=half):
            return _same_logits(causal, ids)
    except (AttributeError, TypeError):
        return False


def _same_logits(causal: Any, ids: Tensor) -> bool:
    own = causal(input_ids=ids, use_cache=False).logits
    hidden = causal.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    split = causal.get_output_embeddings()(hidden)
    return own.shape == split.shape and torch.equal(own, split)


def refuse(error: Exception, model_ref: str) -> TGTinkerError:
    """Turn whatever broke a load into the error that every operation of the client will raise."""
    if isinstance(error, TGTinkerError):
        return error
    return ModelLoadError(
        f"The model {model_ref!r} could not be loaded: {type(error).__name__}: {_first_line(error)} "
        f"Is a file damaged or incomplete?"
    )
