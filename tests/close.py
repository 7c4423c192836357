"""Whether numbers agree, by the size of what is compared: an absolute bound means another thing on every model."""

from typing import Any

import numpy as np
import torch

FLOAT32 = 1e-5  # some hundred roundings of float32: what another order of sums, or another processor, changes


def assert_close(found: Any, expected: Any, within: float = FLOAT32, *, at_least: float = 0.0) -> None:
    """Check that no difference is larger than `within` times the largest number expected.

    Args:
        found: A number, an array, a tensor, or a sequence of tensors such as the gradients of all parameters.
        expected: The same of what it is compared with.
        within: The part of the largest number.
        at_least: Counts as the largest number where all are smaller: for logprobs, which come from logits of size 1
            and more, and may themselves be next to 0.
    """
    first, second = _values(found), _values(expected)
    assert first.shape == second.shape
    size = max(float(np.abs(second).max(initial=0.0)), at_least)
    difference = float(np.abs(first - second).max(initial=0.0))
    assert difference <= within * size, f"off by {difference:.3g} where the largest is {size:.3g}"


def _values(given: Any) -> np.ndarray:
    if isinstance(given, torch.Tensor):
        return given.detach().double().numpy().ravel()
    if isinstance(given, list | tuple):
        return np.concatenate([_values(one) for one in given])
    return np.atleast_1d(np.asarray(given, dtype=np.float64)).ravel()
