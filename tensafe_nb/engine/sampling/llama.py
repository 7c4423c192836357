"""One token at a time through a Llama-shaped body: transformers' own layers, called with less between them.

transformers decodes any architecture, with a cache that is copied at every token and a mask, positions and options
that every layer looks at again. Of the most usual shape (rotary positions, grouped heads, no sliding window) a step
needs none of it: keys and values are written into their place, and a token's heads of one group ask their shared keys
together. A model is taken only after a step of it has been found to say what transformers says.
"""

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensafe_nb.engine.models.load import LoadedModel

SHAPED_LIKE_LLAMA = ("LlamaModel", "MistralModel", "Qwen2Model")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the largest hidden value
_same: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # by model, whether a step gave the same


class Steps:
    """The keys and values of R rows, and the steps that add to them.

    Args:
        cache: transformers' cache of the prompts, which is left as it is.
        samples: Rows of each prompt.
        new_tokens: How many a row may grow by.
    """

    def __init__(self, cache: Any, samples: int, new_tokens: int) -> None:
        self._length = cache.get_seq_length()
        self._keys = [_with_room(layer.keys, samples, new_tokens) for layer in cache.layers]
        self._values = [_with_room(layer.values, samples, new_tokens) for layer in cache.layers]

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows only."""
        for kept in (self._keys, self._values):
            for number, old in enumerate(kept):
                kept[number] = _with_room(old[rows, :, : self._length], 1, old.shape[2] - self._length)

    def read(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return copies of the keys and values of some of the rows, layer by layer."""
        kept = zip(self._keys, self._values, strict=True)
        return [(keys[rows, :, : self._length], values[rows, :, : self._length]) for keys, values in kept]

    def __call__(self, body: Any, tokens: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Append a token to each row.

        Args:
            body: The model without its head.
            tokens: (R,).
            position: (R, 1) of the tokens.
            mask: (R, T), the tokens included, where rows are padded.

        Returns:
            (R, D) hidden states, normalised for the head.
        """
        here, rows = self._length, len(tokens)
        self._length += 1
        seen = None if mask is None else mask.bool()[:, None, None, :]
        x = body.embed_tokens(tokens)
        cos, sin = body.rotary_emb(x, position)
        width = cos.shape[-1]
        # rotate_half(x) · sin = roll(x) · (−sin, sin): the sign goes to the table, once for all layers
        sin = torch.cat([-sin[..., : width // 2], sin[..., width // 2 :]], -1)
        for layer, keys, values in zip(body.layers, self._keys, self._values, strict=True):
            attention, groups = layer.self_attn, keys.shape[1]
            h = layer.input_layernorm(x)
            heads = torch.cat([attention.q_proj(h), attention.k_proj(h)], -1).view(rows, -1, width)
            heads = torch.addcmul(heads * cos, heads.roll(width // 2, -1), sin)  # rotary positions
            keys[:, :, here] = heads[:, -groups:]  # (R, groups, T, D/heads)
            values[:, :, here] = attention.v_proj(h).view(rows, groups, width)
            found = F.scaled_dot_product_attention(
                heads[:, :-groups].reshape(rows, groups, -1, width),
                keys[:, :, : here + 1],
                values[:, :, : here + 1],
                attn_mask=seen,
                scale=attention.scaling,
            )
            x = x + attention.o_proj(found.reshape(rows, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return body.norm(x)  # type: ignore[no-any-return]


def fits(model: LoadedModel, cache: Any) -> bool:
    """Whether a model can take these steps; tried once for each, on a token beside transformers' own."""
    from transformers.cache_utils import DynamicLayer

    if not model.split or type(model.body).__name__ not in SHAPED_LIKE_LLAMA:
        return False
    if any(type(layer) is not DynamicLayer for layer in cache.layers):  # a sliding window, for one
        return False
    if model.causal not in _same:
        _same[model.causal] = says_the_same(model)
    return _same[model.causal]


def says_the_same(model: LoadedModel) -> bool:
    """Try a step on two rows, one of them padded, beside transformers' own."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.causal.config)
    ids = torch.tensor([[1, 2, 3], [3, 2, 1]], device=model.device)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]], device=model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    body: Any = model.body

    def read(places: slice) -> Tensor:
        answer = body(
            input_ids=ids[:, places],
            attention_mask=mask[:, : places.stop],
            position_ids=positions[:, places],
            use_cache=True,
            **{cache_argument(body): cache},
        )
        return answer.last_hidden_state[:, -1]  # type: ignore[no-any-return]

    with model.autocast():
        read(slice(0, 2))
        try:
            ours = Steps(cache, 1, 1)(body, ids[:, 2], positions[:, 2:], mask)
        except (AttributeError, TypeError, ValueError, RuntimeError):  # another version of transformers
            return False
        expected = read(slice(2, 3))
    return bool((ours - expected).abs().max() <= TOLERANCE[model.compute_dtype] * expected.abs().max())


def cache_argument(module: Any) -> str:
    """Return what a model's forward calls the cache it is given: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def _with_room(filled: Tensor, samples: int, new_tokens: int) -> Tensor:
    """Return (rows × samples, groups, T + new_tokens, width), filled in at the first T places."""
    rows, groups, length, width = filled.shape
    room = filled.new_empty(rows * samples, groups, length + new_tokens, width)
    room[:, :, :length] = filled.repeat_interleave(samples, 0)
    return room
