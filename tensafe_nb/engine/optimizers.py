"""Optimisers by name, and the learning rate of each step."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tensafe_nb.config import OptimizerConfig


def build(config: OptimizerConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the torch optimiser that a configuration names."""
    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adamw": torch.optim.AdamW,
        "adam": torch.optim.Adam,
        "sgd": torch.optim.SGD,
        "adafactor": torch.optim.Adafactor,
    }
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.name in ("adamw", "adam"):
        options |= {"betas": config.betas, "eps": config.eps, "fused": _can_fuse(parameters)}
    if config.name == "sgd":
        options |= {"momentum": config.momentum, "fused": _can_fuse(parameters)}
    return makers[config.name](list(parameters), **options)


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Return the rate of optimiser step `step` (0 is the first): linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    total = config.total_steps or 1
    done = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
    factor = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * factor


def _can_fuse(parameters: Sequence[nn.Parameter]) -> bool:
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
