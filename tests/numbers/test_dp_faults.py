"""Five faults that toolkits of this kind have had, planted one at a time: which check sees which.

The canary audit sees what makes a single canary stand out: units counted twice, too little noise, no clip. Clipping the
whole batch, and losses that let rows act on each other, move no orthogonal canary: one adversarial example does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tensafe_nb as tn
from tensafe_nb.engine import canaries
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.unit_gradients import Evaluated, UnitGradients
from tensafe_nb.losses import resolve_loss
from tensafe_nb.privacy import noise
from tensafe_nb.privacy.dp_sgd import ClippedSum
from tensafe_nb.privacy.per_example import PerUnit, WrittenOut
from tests.unit.engine.private import clipped_sum, examples, private_engine

C = 0.5
CONFIG = tn.TrainingConfig(
    dp_config=tn.DPConfig(
        sampling="worst_case", noise_multiplier=1.0, max_grad_norm=C, expected_batch_size=500
    )
)
Fault = Callable[[pytest.MonkeyPatch], None]
add, release, factors = ClippedSum.add, ClippedSum.release, ClippedSum._factors


def none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant nothing."""


def double_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(self: ClippedSum, gradients: Sequence[PerUnit]) -> None:
        add(self, gradients)
        add(self, gradients)

    monkeypatch.setattr(ClippedSum, "add", twice)


def noise_over_l(monkeypatch: pytest.MonkeyPatch) -> None:
    def quiet(self: ClippedSum, sigma: float, units: float, source: noise.NoiseSource) -> list[Tensor]:
        return release(self, sigma / units, units, source)

    monkeypatch.setattr(ClippedSum, "release", quiet)


def no_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_ones(self: ClippedSum, gradients: Sequence[PerUnit]) -> Tensor:
        return torch.ones_like(factors(self, gradients))

    monkeypatch.setattr(ClippedSum, "_factors", all_ones)


def batch_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(self: ClippedSum, gradients: Sequence[PerUnit]) -> None:
        add(self, [WrittenOut(one.written_out().sum(0, keepdim=True)) for one in gradients])

    monkeypatch.setattr(ClippedSum, "add", whole)


def token_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide each row by the tokens of the whole batch, and switch off what would refuse it, at first and each time."""
    monkeypatch.setattr(UnitGradients, "_tells_rows_apart", lambda *_: True)
    monkeypatch.setattr(UnitGradients, "_check_alone", lambda *_: None)
    monkeypatch.setattr(UnitGradients, "_agrees", lambda *_: True)

    def rows(self: UnitGradients, batch: tn.BatchData, at: Any, loss: Any, **_: Any) -> Any:
        part = batch.take(at)
        tensors = self._forward.tensors(part, batch)
        outputs = self._forward.outputs(part, tensors)
        values = -outputs.sum_rows(outputs.logprobs) * len(batch) / len(tensors["labels"])
        return Evaluated(part, outputs, values, {})

    monkeypatch.setattr(UnitGradients, "_evaluated", rows)


def seen_by_the_audit() -> bool:
    return canaries.audit(CONFIG, 1000, 1).violated


def private(limit: float) -> Engine:
    return private_engine(dp={"max_grad_norm": limit}, model_ref="builtin:tiny")


def pulled_by_an_opposite() -> float:
    """Return how far one example with a gradient of -100 g moves the sum of seven of g, in units of C."""

    def signed(outputs: Any, batch: Any) -> Tensor:
        rows: Tensor = -outputs.sum_rows(outputs.logprobs) * batch["sign"]
        return rows

    row, loss, engine = examples((9,)).input_ids, resolve_loss(signed), private(C)
    aligned = tn.BatchData(np.repeat(row, 7, 0), example_ids=np.arange(7), sign=np.full(7, 1.0))
    against = tn.BatchData(
        np.repeat(row, 8, 0), example_ids=np.arange(8), sign=np.array([1.0] * 7 + [-100.0])
    )
    return (
        float((clipped_sum(engine, against, loss=loss) - clipped_sum(engine, aligned, loss=loss)).norm()) / C
    )


def pulled_by_a_long_one() -> float:
    """Return how far one long example moves the sum of fifteen short ones that the clip leaves alone, in units of C."""
    row, long = examples((3,)).input_ids, examples((40,), seed=1)
    short = tn.BatchData(np.repeat(row, 15, 0), example_ids=np.arange(15))
    pad = ((0, 0), (0, 37))
    joined = tn.BatchData(
        np.vstack([np.pad(short.input_ids, pad), long.input_ids]),
        np.vstack([np.pad(short.attention_mask, pad), long.attention_mask]),
        example_ids=np.arange(16),
    )
    limit = 1.1 * float(clipped_sum(private(1e6), short).norm()) / 15
    engine = private(limit)
    return float((clipped_sum(engine, joined) - clipped_sum(engine, short)).norm()) / limit


@pytest.mark.parametrize(
    ("fault", "audit", "sensitivity"),
    [
        (none, False, False),
        (double_counting, True, True),
        (noise_over_l, True, False),
        (no_clip, True, True),
        (batch_clip, False, True),
        (token_mean, False, True),
    ],
)
def test_each_planted_fault_is_caught_by_the_audit_or_by_the_sensitivity(
    fault: Fault, audit: bool, sensitivity: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    moved = max(pulled_by_an_opposite(), pulled_by_a_long_one())
    print(f"{fault.__name__}: one example moves the sum by {moved:.2f} C")
    assert (moved > 1 + 1e-5) is sensitivity
    if fault is not token_mean:  # whose rows the canaries do not have
        assert seen_by_the_audit() is audit


def test_the_audit_measures_what_the_design_foretells(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [canaries.audit(CONFIG, 1000, 1).mu for _ in range(20)]
    assert np.mean(found) == pytest.approx(1.0, abs=0.06)
    double_counting(monkeypatch)
    assert canaries.audit(CONFIG, 1000, 1).mu == pytest.approx(2.0, abs=0.4)


def test_noise_is_standard_normal_and_never_the_same() -> None:
    shape = [torch.zeros(100_000), torch.zeros(3, 7)]
    drawn, again = noise.gaussian(shape, 2.0), noise.gaussian(shape, 2.0)
    values = drawn[0].double() / 2
    assert [d.shape for d in drawn] == [s.shape for s in shape]
    assert abs(float(values.mean())) < 5 / np.sqrt(1e5)
    assert float(values.std()) == pytest.approx(1.0, abs=5 / np.sqrt(2e5))
    assert float((values**4).mean()) == pytest.approx(3.0, abs=0.1)
    assert float((values.abs() > 3).double().mean()) == pytest.approx(0.0027, abs=0.001)
    assert not torch.equal(drawn[0], again[0])
    torch.manual_seed(0)
    first = noise.gaussian(shape, 1.0)[0]
    torch.manual_seed(0)
    assert not torch.equal(first, noise.gaussian(shape, 1.0)[0]), "no seed repeats it"
