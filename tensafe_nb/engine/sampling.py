"""Our own decode loop: every row has its own random stream, logprobs come for free, any token can be the last.

Why not `generate`: it applies top_k=50 silently, returns no logprobs, and cannot be stopped between tokens.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tensafe_nb.config import SamplingConfig
from tensafe_nb.engine.merged import merged
from tensafe_nb.engine.models import LoadedModel
from tensafe_nb.types import SampledSequence

TOKENS_AT_ONCE = 8_192  # prompts and completions decoded together, which bounds the cache; more take turns
LARGE, BLOCK = 16_384, 128  # tokens of a vocabulary that is multiplied in blocks, and of a block
ON_ACCELERATORS = 32  # times as many: a CPU is no faster with more
Tick = Callable[[int, int], None]


@dataclass(slots=True)
class _Row:
    """One completion in the making."""

    prompt_index: int
    prompt: tuple[int, ...]
    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    text: str | None = None

    def finished(self, tokenizer: Any) -> SampledSequence:
        text = tokenizer.decode(self.tokens, skip_special_tokens=True) if self.text is None else self.text
        return SampledSequence(
            self.prompt_index,
            text,
            self.prompt,
            tuple(self.tokens),
            tuple(self.logprobs),
            tuple(self.raw_logprobs),
            self.finish_reason or "length",
            self.seed,
        )


@torch.no_grad()
def sample(
    model: LoadedModel, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seed: int, tick: Tick
) -> list[SampledSequence]:
    """Draw `num_samples` completions per prompt, prompt by prompt.

    Args:
        model: In evaluation mode.
        prompts: Token ids, none empty.
        sampling: How to draw; its own seed, if any, is the caller's business.
        seed: Of the call; a row's stream depends on it, on the row's prompt and on its number among equal prompts.
        tick: Called with (tokens done, tokens at most) before each token; may raise to stop.
    """
    rows = _rows(prompts, sampling.num_samples, seed)
    longest = max(map(len, prompts)) + sampling.max_new_tokens
    samples = sampling.num_samples
    at_once = max(1, _tokens_at_once(model) // (longest * samples))
    turns = range(0, len(prompts), at_once)
    with merged(model, sampling.max_new_tokens * len(turns)):
        for turn, start in enumerate(turns):
            _decode(
                model,
                prompts[start : start + at_once],
                rows[start * samples : (start + at_once) * samples],
                sampling,
                _of_turn(turn, len(turns), tick),
            )
    return [row.finished(model.tokenizer) for row in rows]


def _tokens_at_once(model: LoadedModel) -> int:
    return TOKENS_AT_ONCE * (1 if model.device.type == "cpu" else ON_ACCELERATORS)


def _of_turn(turn: int, turns: int, tick: Tick) -> Tick:
    return lambda done, most: tick(turn * most + done, turns * most)


def _decode(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    rows: list[_Row],
    sampling: SamplingConfig,
    tick: Tick,
) -> None:
    """Fill in the rows of some prompts, all of them token by token together."""
    active = list(rows)
    state = _Decoder(model, prompts, sampling.num_samples)
    for position in range(sampling.max_new_tokens):
        tick(position, sampling.max_new_tokens)
        tokens, logprobs, raw = _draw(state.logits, sampling, _uniforms(active, position))
        for row, token, logprob, raw_logprob in zip(
            active, tokens.tolist(), logprobs.tolist(), raw.tolist(), strict=True
        ):
            row.tokens.append(token)
            row.logprobs.append(logprob)
            row.raw_logprobs.append(raw_logprob)
            _finish(row, model, sampling, last=position + 1 == sampling.max_new_tokens)
        going = [index for index, row in enumerate(active) if row.finish_reason is None]
        if not going:
            break
        if len(going) < len(active):
            active = [active[index] for index in going]
            state.keep(torch.tensor(going, device=model.device))
            tokens = tokens[torch.tensor(going, device=tokens.device)]
        state.feed(tokens)


class _Decoder:
    """The model's side of decoding: cache, mask and positions of the rows still going."""

    def __init__(self, model: LoadedModel, prompts: Sequence[Sequence[int]], samples: int) -> None:
        self._model = model
        from transformers import DynamicCache

        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padded on the left, so that all rows end together
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        self._cache = DynamicCache(config=model.causal.config)
        self._mask: Tensor | None = None if bool(mask.all()) else mask.to(model.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0).to(model.device)
        self.logits = self._forward(ids.to(model.device), positions)
        self._position = positions[:, -1:]
        if samples > 1:
            self._cache.batch_repeat_interleave(samples)
            self.logits = self.logits.repeat_interleave(samples, 0)
            self._position = self._position.repeat_interleave(samples, 0)
            self._mask = None if self._mask is None else self._mask.repeat_interleave(samples, 0)

    def keep(self, rows: Tensor) -> None:
        self._cache.batch_select_indices(rows)
        self._position = self._position[rows]
        self._mask = None if self._mask is None else self._mask[rows]

    def feed(self, tokens: Tensor) -> None:
        self._position = self._position + 1
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        self.logits = self._forward(tokens.unsqueeze(1).to(self._model.device), self._position)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return (rows, V) logits of the last position."""
        model = self._model
        with autocast(model):
            inputs = {
                "input_ids": ids,
                "attention_mask": self._mask,
                "position_ids": positions,
                "past_key_values": self._cache,
                "use_cache": True,
            }
            if not model.split:
                logits: Tensor = model.causal(**inputs, logits_to_keep=1).logits[:, -1]
            else:
                logits = _head(model, model.body(**inputs).last_hidden_state[:, -1])
        return logits.float().cpu() if model.device.type == "mps" else logits.float()  # MPS has no float64


def _head(model: LoadedModel, hidden: Tensor) -> Tensor:
    """Return (R, V) logits of hidden states (R, D).

    A few rows times a large vocabulary in float32 is what a CPU's matrix product does worst: block by block of the
    vocabulary, each small enough for the cache, it takes about three quarters of the time.
    """
    head: Any = model.head
    plain = type(head) is nn.Linear and [name for name, _ in head.named_parameters()] == ["weight"]
    vocabulary = model.vocab_size
    pays = vocabulary >= LARGE and vocabulary % BLOCK == 0 and len(hidden) > 1
    if not (plain and pays and model.device.type == "cpu" and model.compute_dtype is torch.float32):
        return model.head(hidden)
    blocks = head.weight.view(-1, BLOCK, hidden.shape[-1])
    return torch.matmul(hidden, blocks.transpose(1, 2)).transpose(0, 1).flatten(1)  # (V/b, R, b) → (R, V)


def autocast(model: LoadedModel) -> torch.autocast:
    """Return the context in which the model computes in its compute dtype."""
    return torch.autocast(
        model.device.type, dtype=torch.bfloat16, enabled=model.compute_dtype == torch.bfloat16
    )


def _draw(logits: Tensor, sampling: SamplingConfig, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens (R,), their logprobs under the distribution drawn from, and their raw logprobs."""
    raw = torch.log_softmax(logits, -1)
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros_like(raw[:, 0]), _pick(raw, tokens)
    plain = sampling.temperature == 1 and sampling.top_p == 1 and sampling.top_k == 0
    logprobs = raw if plain else torch.log_softmax(_cut(logits / sampling.temperature, sampling), -1)
    cumulative = logprobs.exp().double().cumsum(-1)  # inverse CDF: one uniform per token
    target = uniforms.to(logits.device).unsqueeze(1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)
    return tokens, _pick(logprobs, tokens), _pick(raw, tokens)


def _pick(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def _cut(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Set to -inf what top_k and top_p (Holtzman et al. 2019, arXiv:1904.09751) leave out."""
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        dropped = (before >= sampling.top_p).scatter(1, order, before >= sampling.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits


def _finish(row: _Row, model: LoadedModel, sampling: SamplingConfig, *, last: bool) -> None:
    if sampling.ignore_end:
        row.finish_reason = "fixed" if last else None
        return
    if row.tokens[-1] in model.end_tokens:
        row.finish_reason = "stop"
        return
    if sampling.stop:
        text = model.tokenizer.decode(row.tokens, skip_special_tokens=True)
        cuts = [text.find(stop) for stop in sampling.stop if stop in text]
        if cuts:
            row.finish_reason, row.text = "stop_string", text[: min(cuts)]
            return
    if last:
        row.finish_reason = "length"


def _rows(prompts: Sequence[Sequence[int]], samples: int, seed: int) -> list[_Row]:
    return list(_each_row(prompts, samples, seed))


def _each_row(prompts: Sequence[Sequence[int]], samples: int, seed: int) -> Iterator[_Row]:
    seen: Counter[tuple[int, ...]] = Counter()
    for index, prompt in enumerate(map(tuple, prompts)):
        for _ in range(samples):
            yield _Row(index, prompt, _row_seed(seed, prompt, seen[prompt]))
            seen[prompt] += 1


def _row_seed(seed: int, prompt: tuple[int, ...], number: int) -> int:
    digest = hashlib.blake2b(repr((seed, prompt, number)).encode(), digest_size=7)
    return int.from_bytes(digest.digest(), "big")


def _uniforms(rows: Sequence[_Row], position: int) -> Tensor:
    """Return one uniform in [0, 1) per row: SplitMix64 (Steele et al. 2014) of the row's seed at this position."""
    with np.errstate(over="ignore"):
        state = np.array([row.seed for row in rows], dtype=np.uint64)
        state = state + np.uint64(position + 1) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)
