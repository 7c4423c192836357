"""Adapters of several modules that read one input, stacked to one: what is encrypted goes to the server once for all.

    x ─▶ A = [A_q; A_v] ─▶ B = diag(B_q, B_v) ─▶ [y_q, y_v]

The blocks are brought to one size by powers of two, which the client undoes: the scheme rounds alike everywhere, and a
faint block beside a loud one would lose its digits.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tensafe_nb.privacy.encrypted.scheme import Vector


def stacked(blocks: Sequence[tuple[Any, Any, float]]) -> tuple[Vector, Vector, tuple[int, ...]]:
    """Stack adapters (A, B, scale) of one width in.

    Returns:
        A and B of the stack, its scale being 1, and the exponent of the power of two for each block's output.
    """
    ranks, widths = [len(a) for a, _, _ in blocks], [len(b) for _, b, _ in blocks]
    stacked_a = np.concatenate([np.asarray(a, dtype=np.float64) for a, _, _ in blocks])
    stacked_b = np.zeros((sum(widths), sum(ranks)))
    exponents = []
    row = column = 0
    for (a, b, scale), rank, width in zip(blocks, ranks, widths, strict=True):
        b = scale * np.asarray(b, dtype=np.float64)
        up_a = exponent_of(np.abs(a).max())
        stacked_a[column : column + rank] = a = np.ldexp(stacked_a[column : column + rank], -up_a)
        # ‖B A‖² = tr(BᵀB · AAᵀ): how large its outputs are on average, of two small matrices
        size = np.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())) / width)
        up_b = exponent_of(size)
        stacked_b[row : row + width, column : column + rank] = np.ldexp(b, -up_b)
        exponents.append(up_a + up_b)
        row, column = row + width, column + rank
    return stacked_a, stacked_b, tuple(exponents)


def exponent_of(size: float) -> int:
    """Return e so that size / 2^e lies in [1/2, 1); 0 for nothing."""
    return int(np.frexp(size)[1])


def unstacked(y: Vector, widths: Sequence[int], exponents: Sequence[int]) -> list[Vector]:
    """Take apart what a stack gave, (S, sum of widths)."""
    parts = np.split(y, np.cumsum(widths)[:-1], axis=1)
    return [np.ldexp(part, exponent) for part, exponent in zip(parts, exponents, strict=True)]
