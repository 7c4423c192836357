"""What a token takes of a Llama-shaped model, compiled where the machine has a C compiler; and products in training.

`products.c` multiplies a few rows with a matrix in float32, bfloat16 or int8, adapters included, and computes norms and
attention without a dozen of torch's operations for each; and many rows, as training does. It is compiled once for each
process, in a folder of its own that goes with the compiler's run: nothing is kept that somebody else could have
written.
"""

import ctypes
import logging
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

Adapter: TypeAlias = tuple[int, Tensor, Tensor]  # first output, A (rank, d_in), B (outputs, rank)
SOURCE = Path(__file__).with_name("products.c")
COMPILERS = "cc", "gcc", "clang"
OPTIONS = "-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC"
VECTORS = {"AVX512": (), "AVX2": ("-mno-avx512f",)}  # that torch computes with, and the options that say so
SECONDS = 60  # that a compiler may take; a second or two are usual
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # as in products.c
UNIT = 4  # bytes: weights that are multiplied at once
HUGE = 2**21  # bytes of a huge page
MOST_INPUTS = 65_535  # whose products in int8 are added up in 32 bits
_compiling = threading.Lock()
MANY_ROWS = (
    32  # that training multiplies at once: with fewer, what it takes to lay out the weight does not pay
)
FEW_TOKENS = 8  # of a row, whose attention is computed here; torch is the quicker for a prompt


class _Adapter(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_long) for name in ("first", "outputs", "rank")),
        ("b", ctypes.c_void_p),
    )


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_long) for name in ("kind", "d_in", "d_out", "units")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias", "a")),
        *((name, ctypes.c_long) for name in ("rank", "count")),
        ("adapters", ctypes.c_void_p),
    )


class _Factors(ctypes.Structure):
    _fields_ = (("x", ctypes.c_void_p), ("w", ctypes.c_void_p), ("d_in", ctypes.c_long))


class _Places(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_long) for name in ("rows", "tokens", "heads", "groups", "width", "room", "here")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "mask")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int),
    )


def begin() -> None:
    """Compile on a thread of its own, so that nobody has to wait for it later."""
    threading.Thread(target=library, name="tensafe-compiler", daemon=True).start()


def library() -> ctypes.CDLL | None:
    """Compile `products.c` once; None where there is no compiler, or it does not know the processor's instructions."""
    with _compiling:
        return _compiled()


@cache
def _compiled() -> ctypes.CDLL | None:
    options = VECTORS.get(torch.backends.cpu.get_cpu_capability())
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None or options is None or sys.platform != "linux":
        return None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # 0700
        target = Path(folder) / "products.so"
        try:
            command = [compiler, *OPTIONS, *options, "-o", str(target), str(SOURCE), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
            found = ctypes.CDLL(str(target))
        except (OSError, subprocess.SubprocessError) as error:
            logger.info("sampling takes longer without a compiler: %s did not compile: %s", compiler, error)
            return None
    pointer, number = ctypes.c_void_p, ctypes.c_long
    found.understands.argtypes = [number]
    found.pack.argtypes = [pointer, number, number, pointer, number, ctypes.c_int]
    found.multiply.argtypes = [pointer, pointer, number, pointer, ctypes.c_int]
    found.rms_norm.argtypes = [pointer, number, number, pointer, ctypes.c_float, pointer]
    found.attend.argtypes = [pointer] * 5
    found.product.argtypes = [pointer, number, number, number, ctypes.c_int, pointer, ctypes.c_int]
    found.pack.restype = found.rms_norm.restype = None
    return found


@dataclass(frozen=True, slots=True)
class Product:
    """y = W x + b, and what adapters add to it; a row's output depends on that row alone, bit for bit.

    Attributes:
        d_in: Inputs.
        d_out: Outputs.
    """

    d_in: int
    d_out: int
    _matrix: _Matrix
    _kept: tuple[Any, ...]  # what the matrix points to

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Self | None:
        """Pack a weight in float32, bfloat16 or int8; None where this cannot be multiplied here.

        Args:
            weight: (d_out, d_in).
            bias: (d_out,).
            scale: (d_out,) of a weight in int8.
        """
        (d_out, d_in), compiled, kind = weight.shape, library(), KINDS[weight.dtype]
        if compiled is None or not compiled.understands(kind) or (scale is not None and d_in > MOST_INPUTS):
            return None
        whole = F.pad(weight, (0, -d_in % (UNIT // weight.element_size())))
        if weight.dtype is torch.int8:
            whole = whole.view(torch.uint8) ^ 128  # 128 more than each
        units = whole.contiguous().view(torch.int32)
        outputs = compiled.outputs()
        packed = _of_huge_pages(-(-d_out // outputs) * outputs * units.shape[1])
        compiled.pack(
            *(units.data_ptr(), d_out, units.shape[1]), packed.data_ptr(), HUGE, torch.get_num_threads()
        )
        own = [None if part is None else part.float().contiguous() for part in (scale, bias)]
        pointers = [None if part is None else part.data_ptr() for part in own]
        return cls(
            d_in,
            d_out,
            _Matrix(kind, d_in, d_out, units.shape[1], packed.data_ptr(), *pointers),
            (packed, *own),
        )

    def __call__(self, h: Tensor) -> Tensor:
        """Multiply (..., d_in), float32; return (..., d_out)."""
        rows = h.reshape(-1, self.d_in).contiguous()
        y = rows.new_empty(*h.shape[:-1], self.d_out)
        compiled = library()
        assert compiled is not None
        _done(
            compiled.multiply(
                ctypes.byref(self._matrix), rows.data_ptr(), len(rows), y.data_ptr(), torch.get_num_threads()
            )
        )
        return y

    def beside(self, adapters: Sequence[Adapter]) -> Self:
        """Return the same with adapters added, y + B A h, each to its own outputs."""
        a = torch.cat([a for _, a, _ in adapters]).contiguous()
        laid_out = [(first, b.T.contiguous()) for first, _, b in adapters]
        own = [_Adapter(first, b.shape[1], len(b), b.data_ptr()) for first, b in laid_out]
        each = (_Adapter * len(own))(*own)
        m = self._matrix
        matrix = _Matrix(
            *(m.kind, m.d_in, m.d_out, m.units, m.weight, m.scale, m.bias),
            *(a.data_ptr(), len(a), len(each), ctypes.addressof(each)),
        )
        return replace(self, _matrix=matrix, _kept=(self._kept, a, laid_out, each))


@dataclass(frozen=True, slots=True)
class Norm:
    """A root mean square norm of (..., width) in float32."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        compiled, x = library(), x.contiguous()
        assert compiled is not None
        y, width = torch.empty_like(x), len(self.weight)
        compiled.rms_norm(
            *(x.data_ptr(), x.numel() // width, width), self.weight.data_ptr(), self.eps, y.data_ptr()
        )
        return y


class CompiledAttention:
    """As `llama.Attention`, for few tokens of each row; a token sees itself in any case."""

    def __init__(self, cos: Tensor, sin: Tensor, mask: Tensor | None, here: int, scale: float) -> None:
        self._tables = cos.contiguous(), sin.contiguous(), None if mask is None else mask.bool().contiguous()
        self._here, self._scale = here, scale
        self._places: _Places | None = None

    def __call__(self, projected: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As `llama.Attention`; keys and values are contiguous."""
        compiled, (rows, tokens, width), groups = library(), self._tables[0].shape, keys.shape[1]
        assert compiled is not None
        heads = projected.shape[-1] // width - 2 * groups
        if self._places is None:
            self._places = _Places(
                *(rows, tokens, heads, groups, width, keys.shape[2], self._here),
                *(None if table is None else table.data_ptr() for table in self._tables),
                *(self._scale, torch.get_num_threads()),
            )
        found = projected.new_empty(rows * tokens, heads * width)
        arrays = projected, keys, values, found
        _done(compiled.attend(ctypes.byref(self._places), *(array.data_ptr() for array in arrays)))
        return found


def trains(rows: int) -> bool:
    """Whether training multiplies so many rows here."""
    return rows >= MANY_ROWS and _is_quicker_than_mkl() and library() is not None


@cache
def _is_quicker_than_mkl() -> bool:
    """Whether MKL, which torch takes, leaves a tenth of the processor unused: it does of AMD's with AVX-512."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    of_amd = str(capabilities.get("cpu_name", "")).startswith("AMD")
    return of_amd and torch.backends.cpu.get_cpu_capability() == "AVX512"


def product(*factors: tuple[Tensor, Tensor], transposed: bool) -> Tensor:
    """Return the sum of x Wᵀ of many rows where `transposed`, else of x W, in float32, with each W as it lies.

    Args:
        factors: x (N, d_in) and W (d_out, d_in), or (d_in, d_out); all of one N and one d_out.
        transposed: Which of them it is.
    """
    compiled = library()
    assert compiled is not None
    kept = [(x.contiguous(), w.contiguous()) for x, w in factors]
    each = (_Factors * len(kept))(*[_Factors(x.data_ptr(), w.data_ptr(), x.shape[1]) for x, w in kept])
    x, w = kept[0]
    y = x.new_empty(len(x), w.shape[0 if transposed else 1])
    _done(
        compiled.product(
            *(ctypes.byref(each), len(kept), *y.shape, transposed), y.data_ptr(), torch.get_num_threads()
        )
    )
    return y


def attends(tokens: int, width: int) -> bool:
    """Whether `Attention` is to be had, and the quicker, of so many tokens with heads of a width."""
    return tokens <= FEW_TOKENS and width % 16 == 0 and library() is not None


def _of_huge_pages(units: int) -> Tensor:
    """Return so many units that begin with a huge page, if they fill one."""
    size = units * UNIT
    room = torch.empty(units + HUGE // UNIT if size >= HUGE else units, dtype=torch.int32, device="cpu")
    skipped = -room.data_ptr() % HUGE // UNIT if size >= HUGE else 0
    return room[skipped : skipped + units]


def _done(lacks_memory: int) -> None:
    if lacks_memory:
        raise MemoryError("there is none left for a product of matrices")
