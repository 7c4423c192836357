"""A base model whose chosen layers have their adapters elsewhere: their inputs go there, what comes back is added.

    x ─┬─▶ W x ───────────────────▶ + ─▶ y
       └─▶ apply(part, x): s B A x ─┘      by whoever holds A and B, on ciphertexts

transformers' own model runs; only the chosen linear layers are wrapped. Modules that read one input ask once.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tensafe_nb.config import SamplingConfig, TrainingConfig
from tensafe_nb.engine.accumulation import Tick
from tensafe_nb.engine.models import inputs
from tensafe_nb.engine.models.adapters import adaptable_layers, ends_in
from tensafe_nb.engine.models.bases import frozen_hash
from tensafe_nb.engine.models.load import load
from tensafe_nb.engine.models.low_rank import layer_of
from tensafe_nb.engine.sampling import sampler
from tensafe_nb.engine.sampling.decoding import rows_of
from tensafe_nb.errors import ValidationError
from tensafe_nb.privacy.encrypted.scheme import Vector
from tensafe_nb.protocol.encrypted import EncryptedPart
from tensafe_nb.protocol.results import Prompt, SampledSequence
from tensafe_nb.store.home import Home

Apply: TypeAlias = Callable[[EncryptedPart, Vector], dict[str, Vector]]
Logits: TypeAlias = NDArray[np.float32]
TOKENS_AT_ONCE = 1024  # read together, which bounds their logits


class Asking:
    """Asks for what the adapters add, once for each input.

    Attributes:
        apply: Returns (S, d_out) of each module for the (S, d_in) that they read.
        real: (B, T) which positions are no padding; None where all are.
    """

    def __init__(self) -> None:
        self.apply: Apply | None = None
        self.real: Tensor | None = None
        self._read: tuple[EncryptedPart, Tensor, int] | None = None
        self._added: dict[str, Vector] = {}

    def added(self, part: EncryptedPart, module: str, x: Tensor) -> Tensor:
        """Return what a module's adapter adds for an input (…, d_in)."""
        assert self.apply is not None, "only a call of EncryptedModel runs this layer"
        rows = x.detach().reshape(-1, x.shape[-1])
        real = self.real if self.real is not None and self.real.shape == x.shape[:-1] else None
        known = self._read
        if known is None or known[0] is not part or known[1] is not x or known[2] != x._version:
            chosen = rows if real is None else rows[real.reshape(-1)]
            self._added = self.apply(part, chosen.double().cpu().numpy())
            self._read = part, x, x._version
        found = torch.from_numpy(self._added[module]).to(x.device, torch.float32)
        if real is not None:
            whole = found.new_zeros(len(rows), found.shape[-1])
            whole[real.reshape(-1)] = found
            found = whole
        return found.view(*x.shape[:-1], found.shape[-1])

    def forget(self) -> None:
        """Let go of what was read last."""
        self._read, self._added, self.real, self.apply = None, {}, None, None


class AskingLinear(nn.Module):
    """A frozen linear layer, and the question what its adapter adds."""

    def __init__(self, base: nn.Module, part: EncryptedPart, module: str, asking: Asking) -> None:
        super().__init__()
        self.base, self._part, self._module, self._asking = base, part, module, asking

    @property
    def weight(self) -> Any:
        """Of the frozen layer; some architectures look at its type."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + self._asking.added(self._part, self._module, x).to(y.dtype)


class EncryptedModel:
    """The base model, here, and what it computes with adapters that are elsewhere.

    Args:
        config: Of the base.
        home: Where a GGUF file is kept once it is converted.
        parts: What is applied elsewhere.
        base: Hash of the base that the adapters are for.

    Raises:
        ModelLoadError: The base cannot be loaded.
        ValidationError: It is another base.
    """

    def __init__(self, config: TrainingConfig, home: Home, parts: Sequence[EncryptedPart], base: str) -> None:
        self.model = load(config, home, bare=True)
        if frozen_hash(self.model.causal, values=True) != base:
            raise ValidationError(
                f"The base {config.model_ref!r} here is not the one that the adapter was trained on: its names, shapes "
                f"or values differ. Give the right one: he.model(base=…)."
            )
        rows_of(
            self.model, [[1, 2]], [1], 1
        )  # tries out how this model is sampled, while nobody is asked yet
        self._asking = Asking()
        for part in parts:
            for module in part.modules:
                self._wrap(part, module)

    def _wrap(self, part: EncryptedPart, module: str) -> None:
        causal = self.model.causal
        (name,) = (
            name
            for name in adaptable_layers(causal)
            if layer_of(name) == part.layer and ends_in(name, module)
        )
        parent, _, own = name.rpartition(".")
        base = causal.get_submodule(name)
        setattr(causal.get_submodule(parent), own, AskingLinear(base, part, module, self._asking))

    def encoded(self, prompts: Sequence[Prompt], new_tokens: int) -> list[list[int]]:
        """Return the token ids of prompts.

        Raises:
            ValidationError: One is empty, outside the vocabulary, or too long.
        """
        return inputs.encode(prompts, new_tokens, self.model)

    @torch.no_grad()
    def logits(self, ids: Sequence[Sequence[int]], apply: Apply, tick: Tick) -> Iterator[Logits]:
        """Yield the (T, V) logits of each prompt."""
        for start, end in spans(ids):
            tick(start, len(ids))
            few = ids[start:end]
            longest = max(map(len, few))
            padded = torch.zeros(len(few), longest, dtype=torch.long)
            real = torch.zeros(len(few), longest, dtype=torch.bool)
            for row, prompt in enumerate(few):
                padded[row, : len(prompt)] = torch.tensor(prompt)
                real[row, : len(prompt)] = True
            device = self.model.device
            asked = {"input_ids": padded.to(device), "attention_mask": real.long().to(device)}
            try:
                self._asking.apply = apply
                self._asking.real = None if bool(real.all()) else real.to(device)
                with self.model.autocast():
                    found = self.model.causal(**asked, use_cache=False).logits.float().cpu().numpy()
            finally:
                self._asking.forget()
            for row, prompt in enumerate(few):
                yield found[row, : len(prompt)]

    def sample(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        seed: int,
        apply: Apply,
        tick: Tick,
    ) -> list[SampledSequence]:
        """Draw completions, token by token; see `sampler.sample`."""
        ids, turns, streams = inputs.to_draw(prompts, sampling, self.model)
        try:
            self._asking.apply = apply
            return sampler.sample(self.model, ids, sampling, seed, tick, turns, None, streams)
        finally:
            self._asking.forget()


def spans(ids: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """Yield from where to where prompts are read together, in their order."""
    start = 0
    while start < len(ids):
        end = start + 1
        while end < len(ids) and max(map(len, ids[start : end + 1])) * (end + 1 - start) <= TOKENS_AT_ONCE:
            end += 1
        yield start, end
        start = end


def logprobs_of(logits: Logits, ids: Sequence[int]) -> NDArray[np.float64]:
    """Return the log-probability of each token of a prompt behind its first."""
    said = logits[:-1].astype(np.float64)
    said -= said.max(axis=1, keepdims=True)
    said -= np.log(np.exp(said).sum(axis=1, keepdims=True))
    picked: NDArray[np.float64] = said[np.arange(len(said)), np.asarray(ids[1:], dtype=np.int64)]
    return picked
