"""Products of few rows that torch has no quick form of, compiled where the machine has a C compiler.

torch quantises what it multiplies by one scale for all rows, and takes a dozen operations around its product to do it
by row. `products.c` does both in one pass, with the same 15 bits, and adds adapters whose matrices read one input
without zeros between them. It is compiled once for each process, in a folder of its own that goes with the compiler's
run: nothing is kept that somebody else could have written.
"""

import ctypes
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from tensafe_nb.engine.sampling.llama import Map

logger = logging.getLogger(__name__)

Adapter: TypeAlias = tuple[int, Tensor, Tensor]  # first output, A (rank, d_in), B (outputs, rank)
Adding: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # of an input and a product, which it returns
SOURCE = Path(__file__).with_name("products.c")
COMPILERS = "cc", "gcc", "clang"
OPTIONS = "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"
SECONDS = 60  # that a compiler may take; a second is usual
OUTPUTS = 64  # that are computed together
MOST_INPUTS = 65_535  # whose products are added up in 32 bits


@cache
def library() -> ctypes.CDLL | None:
    """Compile the products; None where there is no compiler, or it does not know the processor's instructions."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None or sys.platform != "linux":
        return None
    with tempfile.TemporaryDirectory() as folder:  # 0700
        target = Path(folder) / "products.so"
        try:
            command = [compiler, *OPTIONS, "-o", str(target), str(SOURCE), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
            found = ctypes.CDLL(str(target))
        except (OSError, subprocess.SubprocessError) as error:
            logger.info(
                "int8 products are torch's, which take longer: %s did not compile ours: %s", compiler, error
            )
            return None
    pointer, number = ctypes.c_void_p, ctypes.c_long
    found.int8_product.argtypes = [
        *(pointer, number, number), *(pointer, number, pointer), *(pointer, number, ctypes.c_int)
    ]  # fmt: skip
    found.int8_product.restype = ctypes.c_int
    found.add_adapter.argtypes = [
        *(pointer, number, number), *(pointer, number), *(pointer, number), pointer, *(pointer, number)
    ]  # fmt: skip
    found.add_adapter.restype = None
    return found


def packed(whole: Tensor, scales: Tensor, bias: Tensor | None) -> Map | None:
    """Pack a weight in int8 with a scale for each output; None where these products cannot be had.

    A row's output depends on that row alone, bit for bit, on any number of threads: sums of int8 are exact.

    Args:
        whole: (d_out, d_in), int8.
        scales: (d_out,).
        bias: (d_out,).
    """
    (d_out, d_in), compiled = whole.shape, library()
    if compiled is None or d_in > MOST_INPUTS:
        return None
    whole = F.pad(whole, (0, -d_in % 4, 0, -d_out % OUTPUTS))
    outputs, width = whole.shape
    blocks = (whole.view(torch.uint8) ^ 128).view(outputs // 16, 16, width // 4, 4)  # 128 more than each
    weight = blocks.transpose(1, 2).contiguous()
    factors = F.pad(scales, (0, outputs - d_out)).contiguous()

    def product(h: Tensor) -> Tensor:
        rows = h.reshape(-1, d_in).contiguous()
        y = rows.new_empty(len(rows), outputs)
        lacks_memory = compiled.int8_product(
            *(rows.data_ptr(), len(rows), d_in), *(weight.data_ptr(), width, factors.data_ptr()),
            *(y.data_ptr(), outputs, torch.get_num_threads()),
        )  # fmt: skip
        if lacks_memory:
            raise MemoryError("there is none left for a product in int8")
        if outputs > d_out:
            y = y[:, :d_out].contiguous()
        return (y if bias is None else y.add_(bias)).view(*h.shape[:-1], -1)

    return product


def adding(adapters: Sequence[Adapter]) -> Adding | None:
    """Return what adds adapters to a product, y += B A h; None where there is no compiler.

    What is added to a row depends on that row alone, bit for bit.
    """
    compiled = library()
    if compiled is None:
        return None
    laid_out = [(first, a.contiguous(), b.T.contiguous()) for first, a, b in adapters]
    rank = max(len(a) for _, a, _ in laid_out)

    def add(h: Tensor, y: Tensor) -> Tensor:
        rows, whole = h.reshape(-1, h.shape[-1]).contiguous(), y.view(-1, y.shape[-1])
        low, d_out = rows.new_empty(len(rows), rank), whole.shape[1]
        for first, a, b in laid_out:
            compiled.add_adapter(
                *(rows.data_ptr(), len(rows), rows.shape[1]), *(a.data_ptr(), len(a)), *(b.data_ptr(), b.shape[1]),
                low.data_ptr(), *(whole.data_ptr() + first * whole.element_size(), d_out),
            )  # fmt: skip
        return y

    return add
