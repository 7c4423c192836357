"""Adapters and activations with known products, and the two halves."""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensafe_nb.privacy.encrypted import HEClient, HEServer

Matrix = NDArray[np.float64]
SHAPE = (48, 40, 4)


def adapter(d_in: int, d_out: int, rank: int, seed: int = 0) -> tuple[Matrix, Matrix, float]:
    dice = np.random.default_rng(seed)
    return dice.normal(size=(rank, d_in)) / 8, dice.normal(size=(d_out, rank)) / 20, 2.0


def activations(tokens: int, d_in: int, seed: int = 1) -> Matrix:
    return np.random.default_rng(seed).normal(size=(tokens, d_in))


def in_clear(given: tuple[Matrix, Matrix, float], x: Matrix) -> Matrix:
    a, b, scale = given
    return scale * (x @ a.T) @ b.T


def error(found: Matrix, exact: Matrix) -> float:
    """The largest error of a token, relative to its largest entry."""
    return float((np.abs(found - exact).max(axis=1) / np.abs(exact).max(axis=1)).max())


def connected(shape: tuple[int, int, int] = SHAPE, **options: Any) -> tuple[HEClient, HEServer]:
    client = HEClient(shape, **options)
    return client, HEServer(adapter(*shape), client.public_bundle(), keys=options.get("keys"))


@cache
def at_hand() -> tuple[HEClient, HEServer]:
    """Two halves for tests that leave them as they are, or only go on."""
    return connected(tokens=8)
