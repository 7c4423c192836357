"""Base weights: read once for all clients that adapt the same model, and freed with the last of them.

What clients share is a base's frozen tensors. Modules, hooks, Parameter objects, buffers, and whatever one of them
trains are its own, so that nothing that one does can be seen by another. Only who trains or merges all weights reads
them for itself.
"""

import copy
import hashlib
import threading
import weakref
from collections.abc import Callable, Hashable, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from tensafe_nb.engine.models import memory

T = TypeVar("T")

AHEAD = 1 << 24  # bytes read at a time
PROBES = 64  # values of each frozen tensor that tell one base model from another
ADAPTER, FACTOR_A = ".lora_", ".lora_A."  # in the names of what PEFT adds
CONTENTS = ("*.json", "*.jinja", "*.txt", "*.model")  # of a model's repository, beside its weights


class MadeOnce(Generic[T]):
    """Things that are made once for all who ask for them at a time; nothing here keeps them.

    Who asks for what is being made waits for that; who asks for something else does not.
    """

    def __init__(self) -> None:
        self._made: weakref.WeakValueDictionary[Hashable, T] = weakref.WeakValueDictionary()
        self._turns: weakref.WeakValueDictionary[Hashable, threading.Lock] = weakref.WeakValueDictionary()
        self._looking = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what a key stands for, made now if nobody has it."""
        with self._looking:
            turn = self._turns.get(key)
            if turn is None:
                turn = self._turns[key] = threading.Lock()
        with turn:
            found = self._made.get(key)
            if found is None:
                found = self._made[key] = make()
            return found

    def all(self) -> list[T]:
        """Return what is there."""
        return list(self._made.values())


class Base:
    """A model as it was read, in the type and on the device that it computes with; itself neither trained nor run.

    Attributes:
        causal: The transformers model.
        grown: How many rows its embedding was given beyond those of the file.
    """

    def __init__(self, causal: Any, grown: int) -> None:
        self.causal, self.grown = causal.requires_grad_(False), grown
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()

    def twin(self) -> Any:
        """Return a model of its own whose frozen tensors are these."""
        made = twin_of(self.causal)
        self.count(made)
        return made

    def count(self, causal: Any) -> None:
        """Count a model that shares these tensors, for as long as it is there."""
        self._users.add(causal)

    @property
    def references(self) -> int:
        """How many models share it."""
        return len(self._users)

    def part(self, causal: Any, filled: Set[str]) -> None:
        """Let a twin have a tensor of its own wherever it trains one, or one is filled with something else.

        Args:
            causal: The twin.
            filled: Plain names of what an adapter's folder brings.
        """
        shared = {parameter.untyped_storage().data_ptr() for parameter in self.causal.parameters()}
        for name, parameter in causal.named_parameters(remove_duplicate=False):
            own = parameter.requires_grad or plain_name(name) in filled
            if own and parameter.untyped_storage().data_ptr() in shared:
                parameter.data = parameter.data.clone()


BASES: MadeOnce[Base] = MadeOnce()
TOKENIZERS: MadeOnce[Any] = MadeOnce()


def plain_name(name: str) -> str:
    """Return a parameter's name as it was before PEFT put anything on the model."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")


def twin_of(modules: Any) -> Any:
    """Copy modules: frozen tensors stay the same memory, under Parameter objects of their own, and so do masks.

    An adapter is copied whole, with what of it is frozen: another state may be loaded into one of the two.
    Other buffers are copied: they are small, and some architectures write in theirs.
    """
    whole: list[nn.Module] = [
        m for m in (modules if isinstance(modules, tuple) else (modules,)) if m is not None
    ]
    memo: dict[int, Any] = {}
    for module in whole:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad and ADAPTER not in name and id(parameter) not in memo:
                memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False)
        memo |= {id(buffer): buffer for buffer in module.buffers() if buffer.dtype is torch.bool}
    return copy.deepcopy(modules, memo)


def identity_of(source: str, revision: str | None) -> Hashable | None:
    """Return what tells a model from every other, fetched and read ahead; None where that cannot be told.

    It is called where no other load waits: a download and a slow disk hold up nobody else.

    Args:
        source: A folder, or a hub id.
        revision: Of a hub id.
    """
    folder = Path(source)
    if not folder.is_dir():
        return _fetched(source, revision)
    files = [(path, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    room = memory.left_on_machine()
    weights = [(path, found.st_size) for path, found in files if path.suffix in (".safetensors", ".bin")]
    if room is not None and sum(size for _, size in weights) < room / 2:
        for path, _ in weights:
            _read_ahead(path)
    facts = ((path.name, found.st_size, found.st_mtime_ns, found.st_ino) for path, found in files)
    return (str(folder.resolve()), *facts)


def _fetched(hub_id: str, revision: str | None) -> Hashable | None:
    """Download a model of the hub into its cache; return its id and the commit. What fails, reading it will say."""
    from huggingface_hub import model_info, snapshot_download

    with suppress(Exception):
        found = model_info(hub_id, revision=revision)
        names = [each.rfilename for each in found.siblings or ()]
        weights = "*.safetensors" if any(name.endswith(".safetensors") for name in names) else "*.bin"
        inner = [f"*/{pattern}" for pattern in (weights, *CONTENTS)]
        snapshot_download(
            hub_id, revision=found.sha, allow_patterns=[weights, *CONTENTS], ignore_patterns=inner
        )
        return (hub_id, found.sha)
    return None


def _read_ahead(path: Path) -> None:
    """Read a file into the system's memory, where reading it again takes no disk."""
    with suppress(OSError), path.open("rb", buffering=0) as file:
        while file.read(AHEAD):
            pass


def frozen_hash(causal: Any, *, values: bool) -> str:
    """Return a hash that tells base models apart: names, shapes, and some values of every frozen tensor.

    Args:
        causal: The model, with or without an adapter, whose tensors do not count.
        values: Whether frozen tensors are a base's. Of a model of which all is trained, names and shapes count alone.
    """
    digest = hashlib.sha256()
    for name, parameter in causal.named_parameters():
        if ".lora_" not in name and ".modules_to_save." not in name:
            plain = name.replace(".base_layer", "").replace(".original_module", "")
            digest.update(f"{plain}{tuple(parameter.shape)}".encode())
            if values and not parameter.requires_grad:
                some = parameter.detach().reshape(-1)[:: max(1, parameter.numel() // PROBES)]
                rounded = some.to(torch.bfloat16).float()  # the same whatever dtype it is kept in
                digest.update(rounded.cpu().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
