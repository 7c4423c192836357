"""Every built-in loss that can be divided, over 1, 2 and 3 replicas: loss, gradient norm and change of one engine."""

from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb.cluster.group import EngineGroup
from tensafe_nb.cluster.local_places import ThreadPlaces
from tensafe_nb.config import TrainingConfig
from tensafe_nb.engine.accumulation import no_tick
from tensafe_nb.engine.engine import Engine
from tensafe_nb.losses import get_registered_losses, resolve_loss
from tests.unit.cluster.groups import CONFIG

ROWS, WIDTH, HIDDEN, TARGETS = 8, 10, 160, 2
KEYWORDS: dict[str, dict[str, Any]] = {
    "mse": {"readout": np.random.default_rng(2).normal(size=(HIDDEN, TARGETS))},
    "policy_cispo": {"ratio_min": 0.5, "ratio_max": 2.0},
}
PER_TOKEN = ("advantages", "weights", "returns", "old_logprobs")
SPLITTABLE = sorted(
    name
    for name in get_registered_losses()
    if (loss := resolve_loss(name)).declares.splittable and loss.function.__module__.startswith("tensafe_nb.")
)


def batch(loss: str) -> tn.BatchData:
    rng = np.random.default_rng(1)
    ids = rng.integers(3, 200, (ROWS, WIDTH))
    mask = np.arange(WIDTH) < rng.integers(4, WIDTH + 1, ROWS)[:, None]
    if loss == "mse":
        return tn.BatchData(ids, mask, targets=rng.normal(size=(ROWS, TARGETS)))
    if not loss.startswith("policy_"):
        return tn.BatchData(ids, mask)
    extras = {name: rng.normal(size=(ROWS, WIDTH)) for name in PER_TOKEN}
    extras |= {"old_logprobs": -7.5 + 0.1 * extras["old_logprobs"], "weights": np.abs(extras["weights"])}
    if loss == "policy_value":
        del extras["advantages"]
    return tn.BatchData(ids, mask, **extras)


def told_by(engine: Any, name: str) -> tuple[list[float], dict[str, float]]:
    """Take a step with a loss; return losses, gradient norms and change, and the loss's own metrics."""
    loss, rows = resolve_loss(name, **KEYWORDS.get(name, {})), batch(name)
    result = engine.forward_backward(rows, loss, no_tick)
    step = engine.optim_step(True)
    return [result.loss, result.grad_norm, step.grad_norm, step.param_delta_norm], result.metrics


def test_each_loss_over_1_2_and_3_replicas_has_the_loss_the_gradient_norm_and_the_change_of_one_engine() -> (
    None
):
    # of SGD: Adam's first step makes as much of a gradient that is all rounding as of any other
    config = TrainingConfig(**CONFIG | {"value_head": True, "optimizer": {"name": "sgd"}})
    alone = Engine(config)
    groups = [EngineGroup(config, ThreadPlaces(), size, lambda event: None, no_tick) for size in (1, 2, 3)]
    start = alone.capture(True)
    try:
        for name in SPLITTABLE:
            for engine in (alone, *groups):  # each loss from the same weights: what is compared is one step
                engine.restore(start)
            one, metrics = told_by(alone, name)
            for group in groups:
                many, its_metrics = told_by(group, name)
                assert many == pytest.approx(one, rel=1e-6), name
                assert its_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-5), name
    finally:
        for group in groups:
            group.close()
