"""The layers of a Llama-shaped model in training: transformers' modules, with fewer passes between them, rows packed.

Norms, rotary positions and the product with the gate are one node of autograd's graph each, and keep less than the
chain of operations does. Rows of different lengths may stand behind each other without padding, each attending to
itself alone: block-diagonal attention (Krell et al. 2021, arXiv:2107.02027), a block at a time, so that no mask is
made. A model is taken only after it has been found to say what transformers says.
"""

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tensafe_nb.engine.models.load import LoadedModel
from tensafe_nb.engine.sampling.llama import SHAPED_LIKE_LLAMA, TOLERANCE

Blocks = Sequence[tuple[int, int]]  # rows of the same length that follow each other: (how many, how long)
_same: dict[Hashable, bool] = {}  # by what a model is made of: whether it then says what transformers says


@contextlib.contextmanager
def in_place(model: LoadedModel, blocks: Blocks | None) -> Iterator[None]:
    """Let the layers of a model work so, for one forward pass without a mask.

    Args:
        model: The model.
        blocks: Of rows that stand behind each other in one, (1, T, D); None for rows as they are, (B, T, D).
    """
    layers = model.body.layers  # type: ignore[attr-defined]
    for layer in layers:
        layer.forward = partial(computed, layer, blocks)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def computed(layer: Any, blocks: Blocks | None, x: Tensor, **given: Any) -> Tensor:
    """Return (B, T, D) what a layer makes of its input.

    Args:
        layer: Of the model.
        blocks: See `in_place`.
        x: (B, T, D).
        given: What transformers hands to a layer: of it, the positions are read.
    """
    attention, mlp = layer.self_attn, layer.mlp
    h = normed(layer.input_layernorm, x)
    (cos, sin), width = given["position_embeddings"], attention.head_dim
    half = cos.shape[-1] // 2  # the second half repeats the first
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    query, key, value = (project(h).unflatten(-1, (-1, width)) for project in projections)
    turn = [table[..., None, :half].float() for table in (cos, sin)]  # (B or 1, T, 1, W/2)
    seen = attended(Rotary.apply(query, *turn), Rotary.apply(key, *turn), value, blocks, attention)  # type: ignore[no-untyped-call]
    x = x + attention.o_proj(seen)
    h = normed(layer.post_attention_layernorm, x)
    return x + mlp.down_proj(Gated.apply(mlp.gate_proj(h), mlp.up_proj(h)))  # type: ignore[no-any-return, no-untyped-call]


def attended(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks | None, attention: Any) -> Tensor:
    """Return (B, T, heads · W) what causal attention gathers, from (B, T, heads, W); of packed rows within each.

    In float32 whatever the model computes in: on CPUs, the backward pass of torch's takes twice the time in bfloat16.
    """

    def gathered(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            dropout_p=attention.attention_dropout if attention.training else 0.0,
            is_causal=True,
            scale=attention.scaling,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return found.transpose(1, 2).flatten(2)

    value = value.float()
    with torch.autocast(query.device.type, enabled=False):
        if blocks is None:
            return gathered(query, key, value)
        sizes = [rows * length for rows, length in blocks]
        parts = zip(*(torch.split(tensor.squeeze(0), sizes) for tensor in (query, key, value)), strict=True)
        found = [
            gathered(*(part.unflatten(0, block) for part in three)).flatten(0, 1)
            for three, block in zip(parts, blocks, strict=True)
        ]
    return torch.cat(found).unsqueeze(0)


def normed(norm: Any, x: Tensor) -> Tensor:
    """Return what an RMS norm makes of (…, D)."""
    if "forward" in norm.__dict__:  # somebody watches it
        return norm(x)  # type: ignore[no-any-return]
    return RMSNorm.apply(x, norm.weight, norm.variance_epsilon)  # type: ignore[no-any-return, no-untyped-call]


class RMSNorm(torch.autograd.Function):
    """w · x / √(mean x² + ε) (Zhang and Sennrich 2019, arXiv:1910.07467); keeps x and one number a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (…, 1)
        ctx.save_for_backward(x, weight, scale)
        normal: Tensor = (wide * scale).to(x.dtype)
        return normal * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        wide, to_x, to_weight = x.float(), None, None
        if ctx.needs_input_grad[0]:
            # s (g w − x s² mean(g w x))
            slopes = (gradient * weight).float()
            mean = (slopes * wide).mean(-1, keepdim=True).mul_(scale.square())
            to_x = slopes.addcmul_(wide, mean, value=-1).mul_(scale).to(x.dtype)
        if ctx.needs_input_grad[1]:
            normal = (wide * scale).to(gradient.dtype)
            to_weight = (gradient * normal).flatten(0, -2).sum(0).to(weight.dtype)
        return to_x, to_weight, None


class Rotary(torch.autograd.Function):
    """Pairs of numbers turned by their position's angle (Su et al. 2021, arXiv:2104.09864); keeps none of them.

    From whatever type into float32, and back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kind = x.dtype
        return turned(x.float(), cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turned(gradient, cos, sin, -1).to(ctx.kind), None, None


class Gated(torch.autograd.Function):
    """silu(a) · b (SwiGLU: Shazeer 2020, arXiv:2002.05202); keeps a and b, and computes silu(a) again."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a).mul_(b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (a, b), (asks_a, asks_b) = ctx.saved_tensors, ctx.needs_input_grad
        to_a = gradient * b if asks_a else None
        if to_a is not None:
            torch.ops.aten.silu_backward.grad_input(to_a, a, grad_input=to_a)
        return to_a, F.silu(a).mul_(gradient) if asks_b else None


def turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Return (a cos − b sin, b cos + a sin) of the two halves a and b of x, or turned back where sign is −1."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    (a, b), (one, other) = x.chunk(2, -1), y.chunk(2, -1)
    torch.mul(a, cos, out=one).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=other).addcmul_(a, sin, value=sign)
    return y


def fits(model: LoadedModel) -> bool:
    """Whether a model's layers can work so; tried once for each kind of model in a process."""
    from transformers.activations import ACT2FN

    body: Any = model.body if model.split else None
    config = model.causal.config
    if type(body).__name__ not in SHAPED_LIKE_LLAMA or config._attn_implementation != "sdpa":
        return False
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return False
    if getattr(config, "sliding_window", None) is not None or len(body.layers) != config.num_hidden_layers:
        return False
    for layer in body.layers:
        norms = layer.input_layernorm, layer.post_attention_layernorm
        if not all(type(norm).__name__.endswith("RMSNorm") for norm in norms) or "forward" in layer.__dict__:
            return False
        if type(layer.mlp.act_fn) is not type(ACT2FN["silu"]):
            return False
    made_of = (type(module) for module in body.modules())
    kind = (config.to_json_string(), model.compute_dtype, model.device.type, *made_of)
    if kind not in _same:
        _same[kind] = says_the_same(model)
    return _same[kind]


@torch.no_grad()
def says_the_same(model: LoadedModel) -> bool:
    """Try two rows, as they are and packed, beside transformers' own."""
    body: Any = model.body
    ids = torch.arange(1, 6, device=model.device).unsqueeze(0) % model.vocab_size
    places = torch.tensor([[0, 1, 0, 1, 2]], device=model.device)
    with model.autocast():
        expected = [
            body(input_ids=part, use_cache=False).last_hidden_state for part in (ids[:, :2], ids[:, 2:])
        ]
        try:
            with in_place(model, None):
                alone = body(input_ids=ids[:, 2:], use_cache=False).last_hidden_state
            with in_place(model, [(1, 2), (1, 3)]):
                packed = body(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state
        except (
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
            RuntimeError,
        ):  # another version of transformers
            return False
    # by the length of what all tokens say: single numbers of it are far apart in bfloat16, whichever way they come
    pairs = ((alone, expected[1]), (packed, torch.cat(expected, 1)))
    near = TOLERANCE[model.compute_dtype]
    return all(bool((ours - theirs).norm() <= near * theirs.norm()) for ours, theirs in pairs)
