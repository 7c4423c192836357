"""Accumulation between two optimiser steps: the open window, and the values that its micro-batches add up to."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tensafe_nb.errors import ValidationError
from tensafe_nb.losses import Loss, LossOutputs
from tensafe_nb.losses.base import LossValue
from tensafe_nb.protocol.batch import IGNORE, Array, BatchData
from tensafe_nb.protocol.results import ForwardBackwardResult

Tick = Callable[[int, int], None]
MAXIMUM = "_max"  # a metric of such a name is the largest of the micro-batches' values, not their mean
NO_WEIGHT = 1e-12  # a mean over nothing is 0


def no_tick(done: int, total: int) -> None:
    """Report progress to nobody."""


@dataclass(slots=True)
class Window:
    """What has been accumulated since the last optimiser step."""

    weight: float = 0.0
    batches: int = 0
    prenormalised: bool | None = None

    def join(self, loss: Loss) -> None:
        if self.prenormalised not in (None, loss.declares.prenormalised):
            raise ValidationError(
                f"The loss {loss.name!r} cannot share an optimiser step with the losses before it: policy losses are "
                f"sums that are never divided, other losses are means. Call optim_step() in between."
            )
        self.prenormalised = loss.declares.prenormalised

    def add(self, tally: "Tally") -> None:
        self.weight += tally.weight
        self.batches += 1

    @property
    def divisor(self) -> float:
        return 1.0 if self.prenormalised else self.weight


@dataclass(slots=True)
class Tally:
    """Adds up the values of micro-batches; `logprobs` (B, T) collects those of the labels, where they are wanted."""

    prenormalised: bool
    total: float = 0.0
    weight: float = 0.0
    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    maxima: dict[str, float] = field(default_factory=dict)
    logprobs: Array | None = None

    @classmethod
    def of(cls, loss: Loss, batch: BatchData, *, logprobs: bool) -> "Tally":
        """Return an empty one for a loss of a batch."""
        wanted = np.zeros(batch.shape, dtype=np.float32) if logprobs else None
        return cls(loss.declares.prenormalised, logprobs=wanted)

    def add(self, value: LossValue, total: float) -> None:
        self.total += total
        self.weight += value.weight
        for name, metric in value.metrics.items():
            if name.endswith(MAXIMUM):
                self.maxima[name] = max(self.maxima.get(name, -math.inf), metric)
            else:
                self.sums[name] += metric if self.prenormalised else metric * value.weight

    @torch.no_grad()
    def collect(self, outputs: LossOutputs, batch: BatchData, rows: Array) -> None:
        """Take the logprobs of some rows of the batch, where they are wanted."""
        if self.logprobs is not None:
            place(self.logprobs, batch, rows, outputs.logprobs)

    def join(self, other: "Tally") -> None:
        """Add what other micro-batches have added up to."""
        if other.logprobs is not None:
            self.logprobs = other.logprobs if self.logprobs is None else self.logprobs + other.logprobs
        self.total += other.total
        self.weight += other.weight
        for name, value in other.sums.items():
            self.sums[name] += value
        for name, value in other.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, -math.inf), value)

    @property
    def divisor(self) -> float:
        return 1.0 if self.prenormalised else max(self.weight, NO_WEIGHT)

    @property
    def loss(self) -> float:
        return self.total / self.divisor

    @property
    def metrics(self) -> dict[str, float]:
        return {name: total / self.divisor for name, total in self.sums.items()} | self.maxima


def place(target: Array, batch: BatchData, rows: Array, values: Tensor) -> None:
    """Write values (N, …) of the labelled positions of some rows into a (B, T, …) array."""
    row, column = (batch.labels[rows] != IGNORE).nonzero()
    target[rows[row], column] = values.detach().float().cpu().numpy()


def mean_of(losses: list[tuple[ForwardBackwardResult, bool]]) -> dict[str, float]:
    """Combine the losses and metrics of a window: weighted means; pre-normalised losses add up.

    The metrics of those are sums and maxima over tokens, which the algorithm that sent the batch turns into means.
    """
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for result, prenormalised in losses:
        weight = 1.0 if prenormalised else result.weight
        metrics = {} if prenormalised else result.metrics
        for name, value in {"loss": result.loss, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + weight * value
            weights[name] = 1.0 if prenormalised else weights.get(name, 0.0) + weight
    return {name: total / weights[name] for name, total in sums.items() if weights[name]}
