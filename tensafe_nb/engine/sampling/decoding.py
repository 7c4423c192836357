"""The model's side of sampling: rows that grow by a token at a time, and the logits of what comes next."""

import logging
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensafe_nb.engine.models.load import LoadedModel
from tensafe_nb.engine.sampling import llama
from tensafe_nb.engine.sampling.copies import Copies
from tensafe_nb.engine.sampling.prefixes import Read

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}  # of the largest logit
_caches: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # by model, whether its cache is relied on
LARGE, BLOCK = 16_384, 128  # tokens of a vocabulary that is multiplied in blocks, and of a block
KEPT_BYTES = 24 << 20  # below what glibc takes as a reason (32 MiB)


class Rows(Protocol):
    """Rows that grow by a token at a time."""

    logits: Tensor

    @property
    def joinable(self) -> bool:
        """Whether others can join."""

    def join(self, other: Any) -> None:
        """Take in the rows of others of the same model and kind, just read, behind one's own."""

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows only."""

    def feed(self, tokens: Tensor) -> None:
        """Append one token (R,) to each row."""

    def read(self, rows: Tensor) -> Read | None:
        """Return what was read of some of the rows, for `rows_of` to go on from; None where nothing is kept of it."""


def rows_of(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[int],
    new_tokens: int,
    before: Read | None = None,
    copies: Copies | None = None,
) -> Rows:
    """Return prompts' rows, decoded with a cache where the architecture's can be relied on, else anew at each token.

    Args:
        model: In evaluation mode.
        prompts: Token ids, none empty.
        samples: How many rows of each.
        new_tokens: How many a row may grow by.
        before: What of the prompts' beginnings was read already, with one sample each.
        copies: Of the weights, to decode with.
    """
    if model.device.type == "cpu" and model.vocab_size >= LARGE:
        reuse_memory()
    if model.causal not in _caches:
        _caches[model.causal] = type(model.body).__name__ in llama.SHAPED_LIKE_LLAMA or cache_works(model)
        if not _caches[model.causal]:
            logger.warning(
                "%s is sampled without a cache, which its architecture has in another form: every token takes as long "
                "as reading all of the row",
                type(model.causal).__name__,
            )
    if _caches[model.causal]:
        return Decoder(model, prompts, samples, new_tokens, before, copies)
    return Recomputed(model, prompts, samples, new_tokens)


@cache
def reuse_memory() -> None:
    """Let the allocator keep what each token gets and frees: logits and probabilities, some MiB each.

    glibc hands free memory back beyond twice the largest block it has seen freed (`M_MMAP_THRESHOLD`, which grows by
    itself), and getting it anew, page by page, takes longer than filling it. Other allocators do not mind.
    """
    torch.empty(KEPT_BYTES, dtype=torch.uint8)


def cache_works(model: LoadedModel) -> bool:
    """Try once, on rows of different length, whether decoding with a cache says what reading them anew says."""
    tokens = torch.tensor([3, 2, 1, 2], device=model.device)
    found = []
    kinds: tuple[Any, ...] = (Recomputed, Decoder)
    for kind in kinds:
        try:
            rows = kind(model, [[1, 2, 3], [2]], [2, 2], 2)
            rows.feed(tokens)
            rows.keep(torch.tensor([1, 2, 3], device=model.device))
            rows.feed(tokens[1:])
        except (AttributeError, TypeError, ValueError, RuntimeError, LookupError):
            if kind is Recomputed:
                raise
            return False
        found.append(rows.logits)
    exact, cached = found
    return bool((exact - cached).abs().max() <= TOLERANCE[model.compute_dtype] * exact.abs().max())


class Recomputed:
    """Rows that are read anew at each token: for state-space models, and whatever keeps no cache of keys and values.

    Rows are padded on the right: what a causal model says of a token does not depend on what comes after it.
    """

    joinable = True

    def __init__(
        self, model: LoadedModel, prompts: Sequence[Sequence[int]], samples: Sequence[int], new_tokens: int
    ) -> None:
        self._model = model
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.zeros(len(prompts), int(lengths.max()) + new_tokens, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        each = torch.tensor(samples)
        self._ids = ids.repeat_interleave(each, 0).to(model.device)
        self._lengths = lengths.repeat_interleave(each).to(model.device)
        self.logits = self._read()

    def join(self, other: "Recomputed") -> None:
        width = max(self._ids.shape[1], other._ids.shape[1])
        padded = [F.pad(ids, (0, width - ids.shape[1])) for ids in (self._ids, other._ids)]
        self._ids, self._lengths = torch.cat(padded), torch.cat([self._lengths, other._lengths])
        self.logits = torch.cat([self.logits, other.logits])

    def keep(self, rows: Tensor) -> None:
        self._ids, self._lengths = self._ids[rows], self._lengths[rows]

    def feed(self, tokens: Tensor) -> None:
        self._ids[torch.arange(len(tokens)), self._lengths] = tokens.to(self._model.device)
        self._lengths = self._lengths + 1
        self.logits = self._read()

    def read(self, rows: Tensor) -> None:
        """Keep nothing: there is nothing to keep."""

    def _read(self) -> Tensor:
        """Return (R, V) logits of what comes after each row."""
        model, rows = self._model, torch.arange(len(self._ids), device=self._model.device)
        inputs = {"input_ids": self._ids[:, : int(self._lengths.max())], "use_cache": False}
        with model.autocast():
            if not model.split:
                return model.causal(**inputs).logits[rows, self._lengths - 1].float()  # type: ignore[no-any-return]
            return head(model, model.body(**inputs).last_hidden_state[rows, self._lengths - 1]).float()


class Decoder:
    """Some prompts, read; then their rows, `samples` of each, token by token.

    Args:
        model: In evaluation mode, used by nobody else meanwhile.
        prompts: Token ids, none empty.
        samples: How many rows of each prompt, one after the other.
        new_tokens: How many a row may grow by.
        before: What of the prompts' beginnings was read already, with one sample each.
        copies: Of the weights, to decode with, and to read with but in int8; else transformers reads.

    Attributes:
        logits: (R, V) of each row's next token, in float32.
    """

    def __init__(
        self,
        model: LoadedModel,
        prompts: Sequence[Sequence[int]],
        samples: Sequence[int],
        new_tokens: int,
        before: Read | None = None,
        copies: Copies | None = None,
    ) -> None:
        from transformers import DynamicCache

        self._model = model
        if before is not None:
            known = before.mask.sum(1).tolist()
            prompts = [prompt[length:] for prompt, length in zip(prompts, known, strict=True)]
        width = max(map(len, prompts))
        lengths = torch.tensor(list(map(len, prompts)))
        # padded on the left, so that all rows end together
        ids = torch.tensor([(*[0] * (width - len(prompt)), *prompt) for prompt in prompts])
        mask = (torch.arange(width) >= width - lengths[:, None]).long().to(model.device)
        if before is not None:
            mask = torch.cat([before.mask, mask], 1)
        self._mask: Tensor | None = None if bool(mask.all()) else mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        ids, self._position = ids.to(model.device), positions[:, -1:]
        self._steps: llama.Steps | None = None
        self._copies = copies
        each = torch.tensor(samples, device=model.device)
        if copies is not None and copies.read_prompts:
            self._weights, once = copies.weights, torch.ones_like(each)
            known = llama.nothing(model.body, len(prompts)) if before is None else before.layers
            self._steps = llama.Steps(model.body, known, once, width)
            hidden = self._steps(self._weights, ids, positions, self._mask)[width - 1 :: width]
            self.logits = self._weights.head(hidden)
            self._steps = llama.Steps(model.body, self._steps.layers, each, new_tokens)
        else:
            self._cache = DynamicCache(config=model.causal.config)
            for number, (keys, values) in enumerate(() if before is None else before.layers):
                self._cache.update(keys, values, number)
            self._cache_argument = llama.cache_argument(model.body if model.split else model.causal)
            self.logits = self._read(ids, positions)
            if copies is not None or llama.fits(model):
                own = llama.as_they_are(model.body, partial(head, model))
                self._weights = own if copies is None else copies.weights
                known = [(layer.keys, layer.values) for layer in self._cache.layers]
                self._steps = llama.Steps(model.body, known, each, new_tokens)
        if max(samples) > 1:
            self.logits = self.logits.repeat_interleave(each.to(self.logits.device), 0)
            self._position = self._position.repeat_interleave(each, 0)
            self._mask = None if self._mask is None else self._mask.repeat_interleave(each, 0)
            if self._steps is None:
                self._cache.batch_repeat_interleave(each)

    @property
    def joinable(self) -> bool:
        """Whether the cache keeps all that was read: a sliding window forgets, and states are sums."""
        from transformers.cache_utils import DynamicLayer

        return self._steps is not None or all(type(layer) is DynamicLayer for layer in self._cache.layers)

    def join(self, other: "Decoder") -> None:
        """Take in the rows of others, just read, behind one's own; go on with the copies that those came with."""
        masks = [rows._seen_so_far() for rows in (self, other)]
        if self._steps is not None and other._steps is not None:
            self._steps.join(other._steps)
        else:
            for own, new in zip(self._cache.layers, other._cache.layers, strict=True):
                own.keys = llama.ending_together([own.keys, new.keys])
                own.values = llama.ending_together([own.values, new.values])
        # (R, T) as the keys of one head with a width of 1
        mask = llama.ending_together([mask[:, None, :, None] for mask in masks])[:, 0, :, 0]
        self._mask = None if bool(mask.all()) else mask
        self._position = torch.cat([self._position, other._position])
        self.logits = torch.cat([self.logits, other.logits])
        if other._steps is not None:
            self._copies, self._weights = other._copies, other._weights

    def _seen_so_far(self) -> Tensor:
        """Return (R, T), 1 where a place holds a token of its row."""
        if self._mask is not None:
            return self._mask
        length = self._cache.get_seq_length() if self._steps is None else self._steps.length
        return self._position.new_ones(len(self._position), length)

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows only."""
        self._position = self._position[rows]
        mask, empty = None if self._mask is None else self._mask[rows], 0
        if mask is not None and self.joinable:  # the first places may have been those of a longer row alone
            empty = int(mask.any(0).int().argmax())
            mask = mask[:, empty:]
        if self._steps is not None:
            self._steps.keep(rows, empty)
        else:
            self._cache.batch_select_indices(rows)
            for layer in self._cache.layers if empty else ():
                layer.keys, layer.values = layer.keys[:, :, empty:], layer.values[:, :, empty:]
        self._mask = None if mask is None or bool(mask.all()) else mask

    def feed(self, tokens: Tensor) -> None:
        """Append one token (R,) to each row."""
        tokens = tokens.to(self._model.device).unsqueeze(1)
        if self._steps is None:
            self.logits = self._read(tokens, self._further(1))
        else:
            self.logits = self._step(self._weights, tokens)

    @property
    def guesses(self) -> bool:
        """Whether there are rough weights, to guess with what comes next of a single row."""
        return self._copies is not None and self._copies.rough is not None and len(self._position) == 1

    def guess(self, token: int) -> Tensor:
        """Append a token to the single row, roughly; return (1, V) logits of the next one, roughly."""
        assert self._copies is not None and self._copies.rough is not None
        return self._step(self._copies.rough, torch.tensor([[token]]))

    def verify(self, guessed: int, tokens: Sequence[int]) -> None:
        """Append tokens to the single row in place of the last ones, which were guessed; logits (N, V) follow each."""
        self.forget(guessed)
        self.logits = self._step(self._weights, torch.tensor([tokens]))

    def forget(self, count: int) -> None:
        """Take back the last tokens."""
        assert self._steps is not None
        self._steps.length -= count
        self._position = self._position - count
        self._mask = None if self._mask is None else self._mask[:, : self._steps.length]

    def _step(self, weights: llama.Weights, tokens: Tensor) -> Tensor:
        """Append tokens (R, N); return (R · N, V) logits after each."""
        assert self._steps is not None
        positions = self._further(tokens.shape[1])
        with self._model.autocast():
            return self._precise(weights.head(self._steps(weights, tokens, positions, self._mask)))

    def _further(self, count: int) -> Tensor:
        """Return the positions (R, N) of as many further tokens, which are seen from now on."""
        positions = self._position + torch.arange(1, count + 1, device=self._position.device)
        self._position = positions[:, -1:]
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(positions), count)], 1)
        return positions

    def read(self, rows: Tensor) -> Read | None:
        """Return what was read of some of the rows, the token that was drawn last apart.

        Of Llama's shape alone: what knows positions by their place in the cache would see the gaps between turns.
        """
        if self._steps is None:
            return None
        layers = self._steps.read(rows)
        whole = rows.new_ones(len(rows), layers[0][0].shape[2])
        return Read.of(layers, whole if self._mask is None else self._mask[rows])

    def _read(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Let transformers read tokens (R, T); return (R, V) logits of the last position."""
        model = self._model
        inputs = {
            "input_ids": ids,
            "attention_mask": self._mask,
            "position_ids": positions,
            "use_cache": True,
            self._cache_argument: self._cache,
        }
        with model.autocast():
            if not model.split:
                return self._precise(model.causal(**inputs, logits_to_keep=1).logits[:, -1])
            return self._precise(head(model, model.body(**inputs).last_hidden_state[:, -1]))

    def _precise(self, logits: Tensor) -> Tensor:
        on_mps = self._model.device.type == "mps"  # which has no float64
        return logits.float().cpu() if on_mps else logits.float()


def head(model: LoadedModel, hidden: Tensor) -> Tensor:
    """Return (R, V) logits of hidden states (R, D).

    A few rows times a large vocabulary in float32 is what a CPU's matrix product does worst: block by block of the
    vocabulary, each small enough for a cache, it takes about two thirds of the time.
    """
    layer: Any = model.head
    plain = type(layer) is nn.Linear and [name for name, _ in layer.named_parameters()] == ["weight"]
    vocabulary = model.vocab_size
    pays = vocabulary >= LARGE and vocabulary % BLOCK == 0 and len(hidden) > 1
    if not (plain and pays and model.device.type == "cpu" and model.compute_dtype is torch.float32):
        return model.head(hidden)
    blocks = layer.weight.view(-1, BLOCK, hidden.shape[-1])
    return torch.matmul(hidden, blocks.transpose(1, 2)).transpose(0, 1).flatten(1)  # (V/b, R, b) → (R, V)
