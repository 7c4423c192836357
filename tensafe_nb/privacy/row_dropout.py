"""Row dropout, for private training: each row draws its masks from a secret of its own, not from one shared stream.

Masks that are drawn from one stream, row after row, change when a row before them is left out: one example then moves
the gradients of all others, and clipping bounds nothing. Here the mask at a place (row, c1, c2, …) of the k-th dropout
of a forward pass is a hash of the row's secret, of k and of the coordinates. Padding does not change it either, since
the number of columns, which other rows decide, is not hashed.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tensafe_nb.errors import PrivacyUnitError

# the constants of SplitMix64, as int64
GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
ATTENTION = F.scaled_dot_product_attention


class RowDropout(TorchFunctionMode):
    """Gives every dropout within it the masks of the batch's rows; one context for one forward pass.

    Args:
        secrets: (rows,) int64, one for each row.
        one_unit: The rows belong to one privacy unit and are alone. A layer that sees its tokens in another shape than
            (rows, …), such as an expert's, then gets masks of the first row's secret.
    """

    def __init__(self, secrets: Tensor, *, one_unit: bool = False) -> None:
        super().__init__()
        self._secrets, self._one_unit, self._calls = secrets, one_unit, 0

    def again(self) -> "RowDropout":
        """Return what gives the dropouts from here on the same masks, for a layer that is computed a second time."""
        later = RowDropout(self._secrets, one_unit=self._one_unit)
        later._calls = self._calls
        return later

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Carry out a function; dropout, also that of attention, with the rows' own masks."""
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is torch.dropout:
            return self._dropout(*args, **{"training" if k == "train" else k: v for k, v in kwargs.items()})
        if func is ATTENTION and (kwargs.get("dropout_p", 0) or len(args) > 4):
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Inverted dropout (Srivastava et al. 2014): x · mask / (1 - p)."""
        if not training or p == 0:
            return input
        return input * self._mask(input, p).to(input.dtype) / (1 - p) if p < 1 else input * 0

    def _attention(
        self,
        query: Tensor,  # (B, H, T, D)
        key: Tensor,  # (B, H or groups, S, D)
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """softmax(q kᵀ · scale + mask) v, with dropout on the weights: what torch fuses, spelt out."""
        if enable_gqa:
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, -math.inf)
        if attn_mask is not None:
            scores = (
                scores.masked_fill(~attn_mask, -math.inf)
                if attn_mask.dtype is torch.bool
                else scores + attn_mask
            )
        return self._dropout(scores.softmax(-1).to(value.dtype), dropout_p) @ value

    def _mask(self, like: Tensor, p: float) -> Tensor:
        """Return what is kept, in the shape of `like`, each place with probability 1 - p."""
        secrets, shape = self._secrets, like.shape
        if not shape or shape[0] != len(secrets):
            if not self._one_unit:
                raise PrivacyUnitError(
                    f"A dropout layer of this model does not see rows: it gets shape {tuple(shape)} for "
                    f"{len(secrets)} rows."
                )
            secrets, shape = secrets[:1], torch.Size((1, *shape))
        self._calls += 1
        bits = torch.zeros((), dtype=torch.int32, device=like.device)
        # one table of hashes for each dimension, combined by exclusive or: a place's bits depend on its coordinates and
        # not on the shape, and no tensor of 64-bit numbers as large as the mask is made
        for dim, size in enumerate(shape[1:], 1):
            start = splitmix64(splitmix64(secrets + self._calls) + dim).unsqueeze(1)  # (rows, 1)
            table = (splitmix64(start + torch.arange(size) * GOLDEN) >> 32).to(torch.int32)  # (rows, size)
            bits = bits ^ table.to(like.device).view(
                -1, *(size if d == dim else 1 for d in range(1, len(shape)))
            )
        # lowbias32 (Wellons 2018), a hash of 32 bits: what combined tables have in common goes
        for shift, factor in ((16, 0x7FEB352D), (15, -0x7B935975)):
            bits = (bits ^ _shifted(bits, shift, 32)) * factor
        return ((bits ^ _shifted(bits, 16, 32)) >= round(p * 2**32) - 2**31).view(like.shape)


def splitmix64(state: Tensor) -> Tensor:
    """Return what SplitMix64 (Steele et al. 2014) makes of its state: a hash of 64 bits, in int64."""
    state = (state ^ _shifted(state, 30, 64)) * FIRST
    state = (state ^ _shifted(state, 27, 64)) * SECOND
    return state ^ _shifted(state, 31, 64)


def _shifted(state: Tensor, shift: int, width: int) -> Tensor:
    """Shift to the right and fill with zeros, as for numbers without a sign."""
    return (state >> shift) & ((1 << width - shift) - 1)


class OtherRandomness(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses every operation that draws random numbers: what `RowDropout` has not replaced couples rows."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out an operation that draws nothing.

        Raises:
            PrivacyUnitError: It draws random numbers.
        """
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        attention_without = "dropout_p" in names and not given.get("dropout_p", 0)
        if torch.Tag.nondeterministic_seeded in func.tags and not attention_without:
            raise PrivacyUnitError(f"This model draws random numbers for all rows together, by {func}.")
        return func(*args, **(kwargs or {}))
