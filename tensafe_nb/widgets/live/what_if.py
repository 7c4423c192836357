"""Answers to the sliders of the privacy meter: what a plan would spend. Nothing is spent, nothing is queued."""

from collections.abc import Mapping
from typing import Any, Protocol

from tensafe_nb.config import TrainingConfig
from tensafe_nb.errors import ValidationError
from tensafe_nb.privacy.what_if import WhatIf


class Planner(Protocol):
    """A training client as a plan asks it."""

    def what_if(
        self,
        *,
        noise_multiplier: float | None,
        target_epsilon: float | None,
        epochs: float,
        expected_batch_size: int,
    ) -> WhatIf: ...


def first_plan(config: TrainingConfig) -> dict[str, Any] | None:
    """Return where the sliders begin: the configuration; None where there is nothing to plan."""
    dp = config.dp_config
    if dp is None or not dp.enabled or dp.dataset_size is None:
        return None
    return {"sigma": dp.noise_multiplier, "batch": config.expected_units, "size": dp.dataset_size}  # σ, L, N


def answer(client: Planner, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a page is told of a plan: epsilon for a sigma, or sigma for an epsilon.

    Args:
        client: Answers.
        content: `n`, `batch`, `epochs`, and one of `sigma` and `epsilon`.
    """
    told: dict[str, Any] = {"t": "plan", "n": content.get("n")}
    try:
        plan = client.what_if(
            noise_multiplier=content.get("sigma"),
            target_epsilon=content.get("epsilon"),
            epochs=float(content["epochs"]),
            expected_batch_size=int(content["batch"]),
        )
    except ValidationError as error:
        return told | {"why": str(error)}
    return told | {
        "epsilon": plan.epsilon if plan.epsilon < float("inf") else "∞",
        "sigma": plan.noise_multiplier,
        "steps": plan.steps,
        "ratio": plan.noise_to_signal,
    }
