"""llama.cpp as a sampler: its matrix products on the base's GGUF file, an adapter beside them, our rows and draws.

A base is loaded once for all who adapt it, and an adapter is handed over when its version is another. Both are files to
llama.cpp, which lie in memory where the system can do that. What it says is not quite what is trained: it rounds
otherwise, and where the file is quantised, so are its products.
"""

import contextlib
import ctypes
import logging
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensafe_nb.config import SamplingConfig, TrainingConfig, check_engine, without_llama_cpp
from tensafe_nb.engine.models import memory
from tensafe_nb.engine.models.bases import MadeOnce
from tensafe_nb.engine.models.export import (
    adds_nothing,
    factors_of_layers,
    gguf_architecture,
    write_gguf,
    write_gguf_adapter,
)
from tensafe_nb.engine.models.load import LoadedModel, is_cpu
from tensafe_nb.errors import InsufficientMemoryError, ModelLoadError

logger = logging.getLogger(__name__)

NAME, PACKAGE, VERSION = "llama.cpp", "llama-cpp-python", "0.3.36"
MOST_ROWS = 64  # decoded together; llama.cpp has at most 256
CELLS_AT_ONCE = 16_384  # of its cache, of which a row takes whole blocks
BLOCK = 256  # cells
READ_AT_ONCE = 512  # tokens of prompts
ERROR = 4  # llama.cpp's level of what it logs
TRIED = (2, 4, 6, 8)  # lengths of rows on which it is compared with torch
MOST_APART = 0.5  # nats: SmolLM2 in four bits is a fiftieth of that apart, another model is several


def check(sampling: SamplingConfig, config: TrainingConfig) -> None:
    """Refuse what llama.cpp cannot sample, as far as a client's configuration tells.

    Raises:
        ValidationError: It is not installed, or the client trains something else than LoRA, or not on the processor.
    """
    if sampling.engine != NAME:
        return
    check_engine(sampling, config)
    check_installed()
    if not is_cpu(config.device):
        raise without_llama_cpp(
            "it samples on the processor, and this client's model is elsewhere", "take device='cpu'"
        )


def check_installed() -> None:
    """Refuse where llama-cpp-python is not here, or another version: its functions and structures change.

    Raises:
        ValidationError: Says the line that installs it.
    """
    found = None
    with contextlib.suppress(PackageNotFoundError):
        found = version(PACKAGE)
    if found != VERSION:
        here = (
            "is not installed"
            if found is None
            else f"is here in version {found}, and this was built for {VERSION}"
        )
        raise without_llama_cpp(
            f"{PACKAGE} {here}",
            "install it where the model is, with a C++ compiler at hand (some ten minutes): "
            'pip install "tensafe_nb[llama-cpp]"',
        )


@cache
def library() -> Any:
    """Return llama.cpp's functions; what it logs goes to this module's logger.

    Raises:
        ValidationError: It is not here, or cannot be loaded.
    """
    check_installed()
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise without_llama_cpp(f"{PACKAGE} cannot be loaded ({error})", "install it anew") from error
    llama_cpp.llama_log_set(_log(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@cache  # llama.cpp calls it for as long as the process lives
def _log(llama: Any) -> Any:
    @llama.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, _: object) -> None:
        if level == ERROR:
            logger.warning("%s", text.decode(errors="replace").rstrip())

    return log


class SharedBase:
    """A base model in llama.cpp; it is freed with the last who uses it.

    Args:
        model: Whose base.

    Attributes:
        pointer: To llama.cpp's model.
        adapting: Held by whoever gives it an adapter, or takes one away.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._llama, self.adapting = library(), RLock()
        self._known_by = whose(model)  # whose id must not be another's meanwhile
        gguf_architecture(model)
        if model.gguf_file is not None:
            self.pointer = self._load(model.gguf_file)
        else:
            needed = sum(p.numel() for p in model.causal.parameters()) * 4  # two copies, while it is written
            there = memory.available(model.device)
            if there is not None and needed > there:
                raise InsufficientMemoryError(
                    f"engine='llama.cpp': writing the base in float16 takes {needed / 2**20:.0f} MiB, and "
                    f"{there / 2**20:.0f} are available. Sample with engine='torch'."
                )
            with handed_over("base") as file:
                write_gguf(model, file)
                self.pointer = self._load(file)
        weakref.finalize(self, self._llama.llama_model_free, self.pointer)
        self._compare(model)

    def _compare(self, model: LoadedModel) -> None:
        """Look once, on a few tokens from all over the vocabulary, whether it is the same base."""
        tokens = [n * model.vocab_size // (max(TRIED) + 2) for n in range(1, 1 + max(TRIED))]
        rows = Sequences(
            self, None, [tokens[:length] for length in TRIED], [1] * len(TRIED), 1, model.vocab_size
        )
        bare = contextlib.nullcontext() if model.peft is None else model.peft.disable_adapter()
        with torch.no_grad(), bare, model.autocast():
            logits = model.causal(torch.tensor([tokens]), use_cache=False).logits[0].float()
        ours, theirs = (x.log_softmax(-1) for x in (logits[[length - 1 for length in TRIED]], rows.logits))
        apart = float((ours.exp() * (ours - theirs)).sum(-1).median())
        if not apart < MOST_APART:
            raise ModelLoadError(
                f"engine='llama.cpp': llama.cpp computes something else than what is trained (a KL divergence of "
                f"{apart:.2f} nats a token). Was the GGUF file changed since it was loaded? Create the client anew, or "
                f"sample with engine='torch'."
            )

    def _load(self, file: Path) -> Any:
        parameters = self._llama.llama_model_default_params()
        parameters.n_gpu_layers = 0
        pointer = self._llama.llama_model_load_from_file(os.fsencode(file), parameters)
        if pointer is None:
            raise ModelLoadError(
                f"engine='llama.cpp': llama.cpp cannot read {str(file)!r}. Was the file moved, or is it of a kind that "
                f"llama.cpp {VERSION} does not know? Sample with engine='torch', which has its own copy."
            )
        return pointer


BASES: MadeOnce[SharedBase] = MadeOnce()


def whose(model: LoadedModel) -> Any:
    """Return what is one for all models that share their frozen weights."""
    return model.base or model.causal


class Policy:
    """A client's base and adapter in llama.cpp.

    Args:
        model: In evaluation mode.

    Attributes:
        base: Shared with all who adapt it.
        version: Of the adapter that llama.cpp has; None if it has none yet.

    Raises:
        ValidationError: llama.cpp has no place for what is trained.
        ModelLoadError: It reads the file otherwise than it is trained.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._llama, self._model = library(), model
        list(factors_of_layers(model))  # refused now, and not only once a step has made B other than 0
        self.base = BASES.get((id(whose(model)), model.gguf_file), lambda: SharedBase(model))
        self.version: int | None = None
        self._adapter: Adapter | None = None

    def push(self, version: int) -> None:
        """Hand over the adapter, unless llama.cpp has this version of it, or it adds nothing yet."""
        if version != self.version:
            self._adapter = None if adds_nothing(self._model) else Adapter(self.base, self._model)
            self.version = version

    def rows(self, prompts: Sequence[Sequence[int]], samples: Sequence[int], new_tokens: int) -> "Sequences":
        """Return prompts' rows, so many of each; see `Sequences`."""
        return Sequences(self.base, self._adapter, prompts, samples, new_tokens, self._model.vocab_size)

    def most_rows(self, longest: int) -> int:
        """Return how many rows of so many tokens are decoded together."""
        return max(1, min(MOST_ROWS, CELLS_AT_ONCE // (-(-longest // BLOCK) * BLOCK)))


class Adapter:
    """An adapter that llama.cpp has read; it is freed when nobody uses it any more."""

    def __init__(self, base: SharedBase, model: LoadedModel) -> None:
        llama = library()
        with handed_over("adapter") as file:
            write_gguf_adapter(model, file)
            with base.adapting:
                self.pointer = llama.llama_adapter_lora_init(base.pointer, os.fsencode(file))
        if self.pointer is None:
            raise ModelLoadError(
                "engine='llama.cpp': llama.cpp does not take the adapter, whose base it has otherwise than it is "
                "trained; what it says of it is in the log. Sample with engine='torch'."
            )
        weakref.finalize(self, _free_adapter, base, self.pointer)


def _free_adapter(base: SharedBase, pointer: Any) -> None:
    with base.adapting:
        library().llama_adapter_lora_free(pointer)


@contextlib.contextmanager
def handed_over(name: str) -> Iterator[Path]:
    """Name a file for llama.cpp to read, which is gone then: in memory, or in a folder that only its owner enters."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create(name)
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / name


class Sequences:
    """Some prompts, read; then their rows token by token, each a sequence of llama.cpp's. See `decoding.Rows`.

    Args:
        base: The model.
        adapter: What is added to it.
        prompts: Token ids, none empty.
        samples: How many rows of each prompt, one after the other.
        new_tokens: How many a row may grow by.
        vocabulary: How many logits there are for a token.

    Attributes:
        logits: (R, V) of each row's next token.
    """

    joinable = False

    def __init__(
        self,
        base: SharedBase,
        adapter: Adapter | None,
        prompts: Sequence[Sequence[int]],
        samples: Sequence[int],
        new_tokens: int,
        vocabulary: int,
    ) -> None:
        self._llama, self._vocabulary = library(), vocabulary
        self._holds = base, adapter  # as long as its context computes with them
        rows, longest = sum(samples), max(map(len, prompts)) + new_tokens
        self._context = self._open(base, rows, longest)
        weakref.finalize(self, self._llama.llama_free, self._context)
        self._batch = self._llama.llama_batch_init(max(READ_AT_ONCE, rows), 0, 1)
        weakref.finalize(self, self._llama.llama_batch_free, self._batch)
        if adapter is not None:
            pointers = (self._llama.llama_adapter_lora_p_ctypes * 1)(adapter.pointer)
            self._llama.llama_set_adapters_lora(self._context, pointers, 1, (ctypes.c_float * 1)(1.0))
        self._memory = self._llama.llama_get_memory(self._context)
        # each prompt is a sequence; further rows of it are copies, and come behind those of all prompts
        further = iter(range(len(prompts), rows))
        self._sequences: list[int] = []
        for number, count in enumerate(samples):
            self._sequences += [number, *islice(further, count - 1)]
        self._lengths = [len(prompt) for prompt, n in zip(prompts, samples, strict=True) for _ in range(n)]
        self.logits = self._read(prompts).repeat_interleave(torch.tensor(samples), 0)
        origins = [number for number, count in enumerate(samples) for _ in range(count)]
        for origin, sequence in zip(origins, self._sequences, strict=True):
            if sequence != origin:
                self._llama.llama_memory_seq_cp(self._memory, origin, sequence, -1, -1)

    def _open(self, base: SharedBase, rows: int, longest: int) -> Any:
        parameters = self._llama.llama_context_default_params()
        parameters.n_seq_max, parameters.n_ctx = rows, rows * -(-longest // BLOCK) * BLOCK
        parameters.n_batch = parameters.n_ubatch = max(READ_AT_ONCE, rows)
        parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
        parameters.kv_unified = False
        parameters.no_perf = True
        context = self._llama.llama_init_from_model(base.pointer, parameters)
        if context is None:
            raise InsufficientMemoryError(
                f"engine='llama.cpp': llama.cpp has no room for {rows} rows of {longest} tokens. Draw fewer, or "
                f"shorter ones, in one call."
            )
        return context

    def join(self, other: object) -> None:
        """Take in nobody: there are as many sequences as there were rows in the beginning."""
        raise NotImplementedError

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows only; their sequences move together, so that they are decoded in one go."""
        llama, memory = self._llama, self._memory
        chosen = rows.tolist()
        kept = [self._sequences[row] for row in chosen]
        for ended in set(self._sequences) - set(kept):
            llama.llama_memory_seq_rm(memory, ended, -1, -1)
        free = iter(set(range(len(kept))) - set(kept))
        moved = {sequence: next(free) for sequence in kept if sequence >= len(kept)}
        for source, target in moved.items():
            llama.llama_memory_seq_cp(memory, source, target, -1, -1)
            llama.llama_memory_seq_rm(memory, source, -1, -1)
        self._sequences = [moved.get(sequence, sequence) for sequence in kept]
        self._lengths = [self._lengths[row] for row in chosen]

    def feed(self, tokens: Tensor) -> None:
        """Append one token (R,) to each row."""
        order = sorted(range(len(self._sequences)), key=self._sequences.__getitem__)
        given = tokens.tolist()
        self._put([(given[row], self._lengths[row], self._sequences[row], True) for row in order])
        found = self._decode(len(order))
        self.logits = found if order == list(range(len(order))) else found[torch.tensor(order).argsort()]
        self._lengths = [length + 1 for length in self._lengths]

    def read(self, rows: Tensor) -> None:
        """Keep nothing: the next call reads its prompts anew."""

    def _read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts; return (P, V) logits of what comes after each."""
        places = [
            (token, place, sequence, place == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ]
        found = []
        for start in range(0, len(places), READ_AT_ONCE):
            part = places[start : start + READ_AT_ONCE]
            self._put(part)
            found.append(self._decode(sum(last for *_, last in part)))
        return torch.cat(found)

    def _put(self, places: Sequence[tuple[int, int, int, bool]]) -> None:
        """Fill the batch with tokens, each with its place, its sequence, and whether its logits are wanted."""
        batch = self._batch
        batch.n_tokens = len(places)
        for index, (token, place, sequence, wanted) in enumerate(places):
            batch.token[index], batch.pos[index] = token, place
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, sequence, wanted

    def _decode(self, wanted: int) -> Tensor:
        """Compute the batch; return a copy of the logits (N, V) that were wanted, in its order."""
        failed = self._llama.llama_decode(self._context, self._batch)
        if failed:
            raise RuntimeError(f"llama.cpp could not decode (it says {failed})")
        if not wanted:
            return torch.empty(0, self._vocabulary)
        found = np.ctypeslib.as_array(self._llama.llama_get_logits(self._context), (wanted, self._vocabulary))
        return torch.from_numpy(found.copy())
