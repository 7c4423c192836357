"""Matrix products of a CPU with a weight that is packed once, in float32, bfloat16 or int8.

Each takes float32 rows and gives float32 rows. Which of them there are depends on the processor and on torch: a way is
used only after a product of it has been found to be one.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tensafe_nb.engine.quiet import quiet
from tensafe_nb.engine.sampling import native
from tensafe_nb.engine.sampling.llama import Map

Packing: TypeAlias = Callable[[Tensor, Tensor | None], Map]  # of a weight (d_out, d_in) and its bias
PACKED_FOR = 16  # rows, about; what is packed takes any number
SMALLEST = torch.finfo(torch.float32).tiny
SPAN = 1.01  # of what is multiplied in int8, which lies within ±1
MOST_ROWS = 128  # of a product by oneDNN: what is longer, a prompt, is read piece by piece
LEAST_ROWS = 4  # of a product by torch itself: with fewer it adds up in another order


def in_float32(weight: Tensor, bias: Tensor | None) -> Map:
    """Pack a weight as it is: a few rows take half of the time, or by oneDNN two thirds."""
    return native.Product.of(weight, bias) or _packed(weight, bias)


def in_bfloat16(weight: Tensor, bias: Tensor | None) -> Map:
    """Pack a weight in bfloat16: half the bytes, twice the speed on processors that multiply bfloat16.

    Sums are taken in float32; weight, input and, by oneDNN, output are rounded. A row's output depends on that row
    alone. oneDNN knows AMX, which multiplies many rows at once.
    """
    compiled = None if has("amx_tile") else native.Product.of(weight.bfloat16(), bias)
    if compiled is not None:
        return compiled
    product = _packed(weight.bfloat16(), None if bias is None else bias.bfloat16())
    return lambda h: product(h.bfloat16()).float()


def in_int8(weight: Tensor, bias: Tensor | None) -> Map:
    """Pack a weight in int8: a quarter of the bytes, with a scale for each output.

    torch rounds what comes to 8 bits as well, by one scale for all rows of a product: single large values would drown
    the others. So each row is divided by its largest value and comes in two parts, 8 bits and the 7 after them, and a
    row of ±`SPAN` stands below, so that the scale is always the same. Sums of int8 are exact: a row's output depends on
    that row alone, bit for bit. Where the machine has a C compiler, `native` has a product that does all of it.
    """
    scales = (weight.abs().amax(1) / 127).clamp(min=SMALLEST)
    whole = (weight / scales[:, None]).round_().to(torch.int8)
    compiled = native.Product.of(whole, bias, scales) if sums_int8() else None
    if compiled is not None:
        return compiled
    points = torch.zeros(len(weight), dtype=torch.long)
    with quiet():  # that a later torch will do without: then there is no such product
        quantised = torch._make_per_channel_quantized_tensor(whole, scales.double(), points, 0)
    narrow = not sums_int8()
    packed = torch.ops.quantized.linear_prepack(quantised, None)
    ends = torch.zeros(1, weight.shape[1])
    ends[0, :2] = torch.tensor([SPAN, -SPAN])
    step, finer = 2 * SPAN / (127 if narrow else 255), 64.0 if narrow else 128.0

    def product(h: Tensor) -> Tensor:
        rows = h.reshape(-1, h.shape[-1])
        largest = rows.abs().amax(-1, keepdim=True).clamp_(min=SMALLEST)  # (N, 1)
        rows = rows / largest
        coarse = (rows * (1 / step)).round_().mul_(step)
        parts = torch.cat([coarse, (rows - coarse).mul_(finer), ends])  # (2N + 1, d_in)
        y: Tensor = torch.ops.quantized.linear_dynamic(parts, packed, narrow)
        y = torch.add(y[: len(rows)], y[len(rows) : -1], alpha=1 / finer).mul_(largest)
        return (y if bias is None else y.add_(bias)).view(*h.shape[:-1], -1)

    return product


def beside(product: Map, adapters: Sequence[native.Adapter], d_out: int) -> Map:
    """Add adapters to a product with so many outputs: y + (h Aᵀ) Bᵀ, each to its own."""
    if isinstance(product, native.Product):
        return product.beside(adapters)
    into = torch.cat([a for _, a, _ in adapters]).T.contiguous()
    out, row = into.new_zeros(into.shape[1], d_out), 0
    for first, a, b in adapters:
        out[row : row + len(a), first : first + len(b)] = b.T
        row += len(a)

    def sum_(h: Tensor) -> Tensor:
        y = product(h)
        if len(h) >= LEAST_ROWS:
            return y.addmm_(h @ into, out)
        low = torch.cat([h] * -(-LEAST_ROWS // len(h))) @ into
        return y.add_((low @ out)[: len(h)])

    return sum_


@cache
def works(packing: Packing, within: float) -> bool:
    """Try once whether this torch and this processor multiply so, and it is what a matrix product says."""
    weight, x = torch.linspace(-1, 1, 64 * 32).view(64, 32), torch.linspace(-1, 1, 96).view(3, 32)
    try:
        found = packing(weight, None)(x)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return bool((found - x @ weight.T).abs().max() <= within)


def rows_more(rows: int) -> int:
    """Return how many rows of zeros to multiply beside some, so that few numbers of rows ever occur.

    For each of them oneDNN makes a program of its own for each matrix, and keeps it: 0.6 MB and more.
    """
    step = 1 << max(0, (rows - 1).bit_length() - 3)
    return -rows % step


def sums_int8() -> bool:
    """Whether a processor adds up products of int8 in 32 bits; the 16 of plain AVX2 leave an input 7 of its 8 bits."""
    return has("avx512_vnni")


def has(instructions: str) -> bool:
    """Whether the processor has some instructions, by torch's name for them."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get(instructions, False))


def _packed(weight: Tensor, bias: Tensor | None) -> Map:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)

    def product(h: Tensor) -> Tensor:
        if len(h) > MOST_ROWS:
            return torch.cat([product(part) for part in torch.split(h, MOST_ROWS)])
        more = rows_more(len(h))
        whole = F.pad(h, (0, 0) * (h.dim() - 1) + (0, more)) if more else h
        y: Tensor = torch.ops.mkldnn._linear_pointwise(whole, packed, bias, "none", [], "")
        return y[: len(h)]

    return product
