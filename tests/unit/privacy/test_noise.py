"""Noise is added in float64 and rounded once, on every path to a weight: sum, gradient, moments."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensafe_nb as tn
from tensafe_nb.engine.engine import Engine
from tensafe_nb.privacy import noise
from tensafe_nb.privacy.dp_sgd import ClippedSum
from tests.unit.engine.private import TOKEN_CE, CountingAccount, examples

COUNT = 400_000


class KnownNoise:
    """Noise with bits far below float32's, the same each time, in the type it is asked for."""

    def __init__(self) -> None:
        self.types: set[torch.dtype] = set()

    def __call__(self, like: Sequence[Tensor], standard_deviation: float) -> list[Tensor]:
        dice = torch.Generator().manual_seed(5)
        drawn = [torch.randn(t.shape, generator=dice, dtype=torch.float64) * standard_deviation for t in like]
        self.types |= {t.dtype for t in like}
        return [one.to(t.dtype) for one, t in zip(drawn, like, strict=True)]


def released(value: float, source: noise.NoiseSource, dtype: torch.dtype = torch.float32) -> Tensor:
    """Release a sum that has one value everywhere: each place is a mechanism of its own, with sigma = C = L = 1."""
    clipped = ClippedSum([nn.Parameter(torch.zeros(COUNT, dtype=dtype))], 1.0)
    clipped._totals()[0].fill_(value)
    (mean,) = clipped.release(1.0, 1.0, source)
    return mean


def low_bits(values: Tensor) -> float:
    """The share of small values that no sum of 1 and a float32 of its own grid could be (Mironov 2012)."""
    values = values.double()
    return float(((values.abs() < 2**-7) & (torch.frac(values * 2**25) != 0)).double().mean())


def test_the_low_bits_of_what_is_released_do_not_tell_whether_a_unit_was_in() -> None:
    without, within = (low_bits(released(value, noise.gaussian)) for value in (0.0, 1.0))
    density = [2 * 2**-7 * math.exp(-(value**2) / 2) / math.sqrt(2 * math.pi) for value in (0.0, 1.0)]
    assert without == pytest.approx(density[0], rel=0.15)
    assert within == pytest.approx(density[1], rel=0.15), "a float32 sum of float32 noise never has them"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_with_its_noise_is_rounded_once_into_the_weights_type(dtype: torch.dtype) -> None:
    source = KnownNoise()
    exact = source([torch.zeros(COUNT, dtype=torch.float64)], 1.0)[0] + float(torch.tensor(0.7))
    found = released(0.7, source, dtype)
    assert source.types == {torch.float64}
    assert found.dtype is dtype and torch.equal(found, exact.to(dtype))


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "sgd", "momentum": 0.9, "learning_rate": 0.1, "weight_decay": 0.0},
        {"name": "adamw", "learning_rate": 0.01},
        {"name": "adam", "learning_rate": 0.01, "weight_decay": 0.0},
    ],
    ids=lambda options: str(options["name"]),
)
@pytest.mark.parametrize("lora", [tn.LoRAConfig(rank=2), None])
def test_gradients_and_moments_are_made_of_the_value_that_was_rounded_once(
    optimizer: dict[str, Any], lora: Any
) -> None:
    dp = tn.DPConfig(sampling="worst_case", noise_multiplier=1.3, max_grad_norm=0.5, expected_batch_size=7)
    config = tn.TrainingConfig(model_ref="builtin:sums", lora_config=lora, optimizer=optimizer, dp_config=dp)
    engine, source = Engine(config), KnownNoise()
    engine.train_privately(CountingAccount(), "tc-1")
    engine.training_step.noise = source
    engine.forward_backward(examples((5, 8), vocabulary=14), TOKEN_CE)
    sums = engine.training_step.sum._totals()
    whole = torch.cat([total.double().flatten() for total in sums])  # noise is drawn for all of it at once
    means = ((whole + source([whole], 1.3 * 0.5)[0]) / 7).float()
    parts = torch.split(means, [total.numel() for total in sums])
    exact = [part.view(total.shape) for part, total in zip(parts, sums, strict=True)]
    engine.optim_step()
    for parameter, mean in zip(engine.parameters, exact, strict=True):
        moments = engine.optimizer.torch.state[parameter]
        if optimizer["name"] == "sgd":
            assert torch.equal(moments["momentum_buffer"], mean)
        else:
            beta, _ = engine.optimizer.torch.param_groups[0]["betas"]
            assert torch.equal(moments["exp_avg"], torch.zeros_like(mean).lerp_(mean, 1 - beta))


def test_the_docstring_claims_no_more_than_is_done() -> None:
    text = noise.__doc__ or ""
    assert "Mironov 2012" in text and "round once" in text
    assert "no proof" in text and "say nothing about the sum" not in text
