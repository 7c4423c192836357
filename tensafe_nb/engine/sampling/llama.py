"""Our own steps through a Llama-shaped body: prompts, then a token or a few, little between the products.

transformers decodes any architecture, with a cache that is copied at every token and a mask, positions and options
that every layer looks at again. Of the most usual shape (rotary positions, grouped heads, no sliding window) a step
needs none of it: keys and values are written into their place, and a token's heads of one group ask their shared keys
together. A model is taken only after a step of it has been found to say what transformers says.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensafe_nb.engine.models.load import LoadedModel
from tensafe_nb.engine.sampling import native
from tensafe_nb.engine.sampling.prefixes import Layers

SHAPED_LIKE_LLAMA = ("LlamaModel", "MistralModel", "Qwen2Model")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of the largest hidden value
_same: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # by model, whether a step gave the same
Map: TypeAlias = Callable[[Tensor], Tensor]  # of (N, d_in) to (N, d_out)


@dataclass(frozen=True, slots=True)
class Layer:
    """What a step computes in one layer: x + out(attention(qkv(norm(x)))), then x + mlp(mlp_norm(x))."""

    norm: Map
    qkv: Map
    out: Map
    mlp_norm: Map
    mlp: Map


@dataclass(frozen=True, slots=True)
class Weights:
    """What steps compute with: the layers, the last norm, the head, and whether attention is compiled, too."""

    layers: Sequence[Layer]
    norm: Map
    head: Map
    compiled: bool = False


def as_they_are(body: Any, head: Map) -> Weights:
    """Return a body's own modules."""

    def qkv_of(attention: Any) -> Map:
        return lambda h: torch.cat([attention.q_proj(h), attention.k_proj(h), attention.v_proj(h)], -1)

    layers = [
        Layer(
            layer.input_layernorm,
            qkv_of(layer.self_attn),
            layer.self_attn.o_proj,
            layer.post_attention_layernorm,
            layer.mlp,
        )
        for layer in body.layers
    ]
    return Weights(layers, body.norm, head)


class Steps:
    """The keys and values of R rows, and the steps that add to them.

    Args:
        body: The model without its head.
        known: Of each layer keys and values of the prompts, (P, groups, T, width), which are left as they are.
        samples: (P,) rows of each prompt.
        new_tokens: How many a row may grow by.

    Attributes:
        length: How many places of each row are taken; a smaller number forgets the last ones.
    """

    def __init__(self, body: Any, known: Layers, samples: Tensor, new_tokens: int) -> None:
        self.length = known[0][0].shape[2]
        self._body, self._scale = body, body.layers[0].self_attn.scaling
        self._keys = [_with_room(keys, samples, new_tokens) for keys, _ in known]
        self._values = [_with_room(values, samples, new_tokens) for _, values in known]

    def keep(self, rows: Tensor, empty: int = 0) -> None:
        """Go on with some of the rows only, and without the first places, which none of them uses."""
        room = self._room
        for kept in (self._keys, self._values):
            for number, old in enumerate(kept):
                kept[number] = _with_room(old[rows, :, empty : self.length], None, room)
        self.length -= empty

    def join(self, other: "Steps") -> None:
        """Take in the rows of others behind one's own: all of them end at the same place."""
        length, room = max(self.length, other.length), max(self._room, other._room)
        for kept, added in ((self._keys, other._keys), (self._values, other._values)):
            for number, (own, new) in enumerate(zip(kept, added, strict=True)):
                parts = [own[:, :, : self.length], new[:, :, : other.length]]
                kept[number] = _with_room(ending_together(parts), None, room)
        self.length = length

    @property
    def _room(self) -> int:
        room: int = self._keys[0].shape[2] - self.length
        return room

    @property
    def layers(self) -> Layers:
        """Keys and values of all rows, layer by layer."""
        kept = zip(self._keys, self._values, strict=True)
        return [(keys[:, :, : self.length], values[:, :, : self.length]) for keys, values in kept]

    def read(self, rows: Tensor) -> Layers:
        """Return copies of the keys and values of some of the rows, layer by layer."""
        return [(keys[rows], values[rows]) for keys, values in self.layers]

    def __call__(self, weights: Weights, tokens: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Append some tokens to each row.

        Args:
            weights: Of the body, or copies of them.
            tokens: (R, N).
            position: (R, N) of the tokens.
            mask: (R, T), the tokens included, where rows are padded.

        Returns:
            (R · N, D) hidden states, normalised for the head.
        """
        new, here = tokens.shape[1], self.length
        self.length = here + new
        x = self._body.embed_tokens(tokens.flatten())
        cos, sin = self._body.rotary_emb(x, position)
        # rotate_half(x) · sin = roll(x) · (−sin, sin): the sign goes to the table, once for all layers
        sin = torch.cat([-sin[..., : sin.shape[-1] // 2], sin[..., sin.shape[-1] // 2 :]], -1)
        compiled = weights.compiled and native.attends(new, cos.shape[-1])
        attend = (native.Attention if compiled else Attention)(cos, sin, mask, here, self._scale)
        for layer, keys, values in zip(weights.layers, self._keys, self._values, strict=True):
            x = x + layer.out(attend(layer.qkv(layer.norm(x)), keys, values))
            x = x + layer.mlp(layer.mlp_norm(x))
        return weights.norm(x)


class Attention:
    """Some tokens that are appended to rows: their rotary positions, and what they see.

    Args:
        cos: (R, N, width), of N tokens in each of R rows.
        sin: The same, with the signs of `rotate_half`.
        mask: (R, T), the tokens included, where rows are padded.
        here: Places that are taken before.
        scale: Of what is in the softmax.
    """

    def __init__(self, cos: Tensor, sin: Tensor, mask: Tensor | None, here: int, scale: float) -> None:
        self._cos, self._sin, self._scale = cos.unsqueeze(2), sin.unsqueeze(2), scale
        self._here, self._end = here, here + cos.shape[1]
        self._seen = _seen(mask, cos.shape[1], self._end, cos.device)

    def __call__(self, projected: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Write the tokens' keys and values; return (R · N, heads · width), what they find.

        Args:
            projected: (R · N, (heads + 2 · groups) · width), queries, keys and values.
            keys: (R, groups, places, width), as `values`, with room for the tokens.
            values: Of what was read.
        """
        (rows, new, _, width), groups = self._cos.shape, keys.shape[1]
        heads = projected.view(rows, new, -1, width)
        turned = heads[:, :, :-groups]
        turned = torch.addcmul(turned * self._cos, turned.roll(width // 2, -1), self._sin)
        keys[:, :, self._here : self._end] = turned[:, :, -groups:].transpose(1, 2)
        values[:, :, self._here : self._end] = heads[:, :, -groups:].transpose(1, 2)
        asking = turned[:, :, :-groups].transpose(1, 2)  # (R, heads, N, width)
        if new == 1:  # those of one group ask together
            asking = asking.reshape(rows, groups, -1, width)
        found = F.scaled_dot_product_attention(
            asking,
            keys[:, :, : self._end],
            values[:, :, : self._end],
            attn_mask=self._seen,
            is_causal=new > 1 and self._seen is None,
            scale=self._scale,
            enable_gqa=new > 1,
        )
        return found.view(rows, -1, new, width).transpose(1, 2).reshape(rows * new, -1)


def _seen(mask: Tensor | None, new: int, end: int, device: torch.device) -> Tensor | None:
    """Return (R or 1, 1, N, T), what each of the last N places sees; None if it is all there are, or all before it."""
    if mask is None and new in (1, end):
        return None
    there = torch.ones(1, end, dtype=torch.bool, device=device) if mask is None else mask.bool()
    if new == 1:
        return there[:, None, None, :]
    places = torch.arange(end, device=device)
    last = places[end - new :, None]
    # an empty place sees itself: of nothing at all there is no mean
    return ((places <= last) & there[:, None, None, :]) | (places == last)


def fits(model: LoadedModel) -> bool:
    """Whether a model can take these steps; tried once for each, on a token beside transformers' own."""
    if not model.split or type(model.body).__name__ not in SHAPED_LIKE_LLAMA:
        return False
    if model.causal not in _same:
        _same[model.causal] = says_the_same(model)
    return _same[model.causal]


def says_the_same(model: LoadedModel) -> bool:
    """Try a step on two rows, one of them padded, beside transformers' own."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

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
        if any(type(layer) is not DynamicLayer for layer in cache.layers):  # a sliding window, for one
            return False
        try:
            one_each = torch.ones(2, dtype=torch.long, device=model.device)
            ours = Steps(body, [(layer.keys, layer.values) for layer in cache.layers], one_each, 1)(
                as_they_are(body, model.head), ids[:, 2:], positions[:, 2:], mask
            )
        except (AttributeError, TypeError, ValueError, RuntimeError):  # another version of transformers
            return False
        expected = read(slice(2, 3))
    return bool((ours - expected).abs().max() <= TOLERANCE[model.compute_dtype] * expected.abs().max())


def cache_argument(module: Any) -> str:
    """Return what a model's forward calls the cache it is given: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def nothing(body: Any, rows: int) -> Layers:
    """Return the keys and values of rows of which nothing was read."""
    attention = body.layers[0].self_attn
    weight = attention.k_proj.weight
    empty = weight.new_empty(rows, weight.shape[0] // attention.head_dim, 0, attention.head_dim)
    return [(empty, empty)] * len(body.layers)


def _with_room(filled: Tensor, samples: Tensor | None, new_tokens: int) -> Tensor:
    """Return (rows, groups, T + new_tokens, width), filled in at the first T places, each row so many times."""
    rows, groups, length, width = filled.shape
    room = filled.new_empty(
        rows if samples is None else int(samples.sum()), groups, length + new_tokens, width
    )
    each = (
        torch.arange(rows, device=filled.device).repeat_interleave(samples) if samples is not None else None
    )
    room[:, :, :length] = filled if each is None else filled[each]
    return room


def ending_together(tensors: Sequence[Tensor]) -> Tensor:
    """Return the rows of several (R, groups, T, width) as those of one: what they hold stands last, nothing before."""
    longest, first = max(tensor.shape[2] for tensor in tensors), tensors[0]
    whole = first.new_zeros(sum(map(len, tensors)), first.shape[1], longest, first.shape[3])
    row = 0
    for tensor in tensors:
        whole[row : row + len(tensor), :, longest - tensor.shape[2] :] = tensor
        row += len(tensor)
    return whole
