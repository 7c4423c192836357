"""An engine that trains privately, and an account that only counts: what the tests of the private path share."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tensafe_nb as tn
from tensafe_nb.engine.engine import Engine
from tensafe_nb.losses import Loss, resolve_loss

CLIENT = "tc-1"
TOKEN_CE = resolve_loss("token_ce")


class CountingAccount:
    """Spends 1 for each step, up to a budget; void from the start if asked to be."""

    draws = None

    def __init__(self, void: bool = False, budget: float = math.inf) -> None:
        self.charges: list[tuple[int, dict[str, int], str, bool]] = []
        self._void, self._budget = void, budget

    def epsilon(self) -> float:
        return math.inf if self._void else float(len(self.charges))

    def charge(self, step: int, participants: Mapping[str, int], unit: str, *, noised: bool) -> None:
        if len(self.charges) + 1 > self._budget:
            raise tn.DPBudgetExceededError("spent")
        self.charges.append((step, dict(participants), unit, noised))


class RecordedNoise:
    """Draws nothing, and writes down what it was asked for."""

    def __init__(self) -> None:
        self.draws: list[float] = []

    def __call__(self, like: Sequence[Tensor], standard_deviation: float) -> list[Tensor]:
        self.draws.append(standard_deviation)
        return [torch.zeros_like(tensor) for tensor in like]


def private_engine(
    account: CountingAccount | None = None, *, noise: Any = None, lora: Any = None, **fields: Any
) -> Engine:
    """Return an engine on its own account; `dp` holds fields of DPConfig."""
    dp = {"sampling": "worst_case", "noise_multiplier": 0.0, "target_epsilon": None} | fields.pop("dp", {})
    config = tn.TrainingConfig(
        lora_config=tn.LoRAConfig(rank=4) if lora is None else lora or None,
        optimizer={"name": "sgd", "momentum": 0.0, "learning_rate": 1.0, "weight_decay": 0.0},
        dp_config=tn.DPConfig(**dp),
        **fields,
    )
    engine = Engine(config)
    engine.train_privately(account or CountingAccount(), CLIENT)
    if noise is not None:
        engine.training_step.noise = noise  # type: ignore[union-attr]
    if config.lora_config is not None:  # B starts at zero, and then A has no gradient
        with torch.no_grad():
            torch.manual_seed(1)
            for parameter in engine.parameters:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return engine


def examples(lengths: Sequence[int], vocabulary: int = 2048, seed: int = 0, **extras: Any) -> tn.BatchData:
    """Return random rows of such lengths, each with an id."""
    dice = np.random.default_rng(seed)
    ids = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = dice.integers(3, vocabulary, length)
        mask[row, :length] = 1
    return tn.BatchData(ids, mask, extras={"example_ids": np.arange(len(lengths))} | extras)


def clipped_sum(engine: Engine, *batches: tn.BatchData, loss: Loss = TOKEN_CE) -> Tensor:
    """Return what a step would release before noise, as one vector, and drop it."""
    for batch in batches:
        engine.forward_backward(batch, loss)
    sums = engine.training_step.sum._totals()  # type: ignore[union-attr]
    vector = torch.cat([total.flatten() for total in sums]).clone()
    engine.discard_gradients()
    return vector


def one_at_a_time(engine: Engine, batch: tn.BatchData, limit: float, loss: Loss = TOKEN_CE) -> Tensor:
    """The oracle: autograd on each row alone, clipped by hand."""
    total = torch.zeros(sum(p.numel() for p in engine.parameters))
    for row in range(len(batch)):
        part = batch.take(np.array([row]))
        tensors = engine.forward_pass.tensors(part, part)
        value, _ = loss.row_values(engine.forward_pass.outputs(part, tensors), tensors)
        found = torch.autograd.grad(value.sum(), engine.parameters, allow_unused=True)
        pieces = [
            torch.zeros_like(p) if g is None else g for g, p in zip(found, engine.parameters, strict=True)
        ]
        gradient = torch.cat([piece.flatten() for piece in pieces])
        total += gradient * min(1.0, limit / (float(gradient.double().norm()) + 1e-6))
    return total
