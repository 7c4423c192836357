"""Dropout of private training: whose mask it is, and that attention's is the same attention."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensafe_nb as tn
from tensafe_nb.engine.engine import Engine
from tensafe_nb.errors import PrivacyUnitError
from tensafe_nb.privacy.row_dropout import OtherRandomness, RowDropout
from tensafe_nb.privacy.tickets import ticket
from tensafe_nb.protocol.batch import TICKET, BatchData
from tests.unit.engine.private import CLIENT, TOKEN_CE, clipped_sum, examples, private_engine

SECRETS = torch.tensor([17, -4_000_000_000_000_000_001, 2**61 + 3])
C = 0.5


def masked(shape: tuple[int, ...], secrets: Tensor = SECRETS, p: float = 0.3, calls: int = 1) -> Tensor:
    with RowDropout(secrets):
        for _ in range(calls):
            found = F.dropout(torch.ones(shape), p, training=True)
    return found


@pytest.mark.parametrize("shape", [(3, 40_000), (3, 200, 200), (3, 4, 100, 100)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_each_row_keeps_1_minus_p_of_its_places_and_scales_them_up(shape: tuple[int, ...], p: float) -> None:
    found = masked(shape, p=p).flatten(1)
    assert set(found.unique().tolist()) <= {0.0, float(torch.ones(()) / (1 - p))}
    kept = (found > 0).double().mean(1)
    assert torch.allclose(kept, torch.full((3,), 1 - p, dtype=torch.float64), atol=6 * 0.5 / 200)


def test_places_rows_and_calls_have_masks_that_do_not_go_together() -> None:
    first, second = masked((3, 200, 200)) > 0, masked((3, 200, 200), calls=2) > 0
    pairs = [
        (first[0], first[1]),
        (first, second),
        (first[:, 1:], first[:, :-1]),
        (first[..., 1:], first[..., :-1]),
    ]
    for one, other in pairs:
        together = (one & other).double().mean()
        assert float(together) == pytest.approx(0.7 * 0.7, abs=0.01)


def test_a_rows_mask_depends_on_neither_neighbours_nor_padding() -> None:
    whole = masked((3, 2, 9, 9))
    assert torch.equal(masked((1, 2, 9, 9), SECRETS[1:2]), whole[1:2])
    assert torch.equal(masked((3, 2, 5, 5)), whole[..., :5, :5])
    assert torch.equal(masked((3, 5, 4)), masked((3, 8, 4))[:, :5])


def test_without_training_or_at_rate_0_nothing_is_dropped_and_at_1_everything() -> None:
    with RowDropout(SECRETS):
        assert torch.equal(F.dropout(torch.ones(3, 5), 0.5, training=False), torch.ones(3, 5))
        assert torch.equal(nn.Dropout(0.0)(torch.ones(3, 5)), torch.ones(3, 5))
        assert torch.equal(torch.dropout(torch.ones(3, 5), 1.0, train=True), torch.zeros(3, 5))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_attention_spelt_out_is_torchs_attention(causal: bool, mask: str | None) -> None:
    dice = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, 6, 8, generator=dice) for heads in (4, 2, 2))
    options: dict[str, Any] = {"is_causal": causal and mask is None, "enable_gqa": True}
    if mask is not None:
        seen = torch.rand(3, 1, 6, 6, generator=dice) > 0.3
        seen |= torch.eye(6, dtype=torch.bool)
        options["attn_mask"] = seen if mask == "bool" else torch.where(seen, 0.0, -1e9)
    spelt_out = RowDropout(SECRETS)._attention(query, key, value, **options)
    assert torch.allclose(spelt_out, F.scaled_dot_product_attention(query, key, value, **options), atol=1e-6)


def test_a_dropout_that_sees_no_rows_is_told() -> None:
    with pytest.raises(PrivacyUnitError, match="does not see rows"):
        masked((12, 4))
    with OtherRandomness(), pytest.raises(PrivacyUnitError, match="for all rows together"):
        torch.rand(3)


# training


def secrets_by_id(batch: BatchData) -> np.ndarray[Any, Any]:
    """Streams that a test can repeat: a row's by its own id."""
    return np.asarray(batch.extras["example_ids"]) * 7_919 + 13


@pytest.mark.parametrize(
    ("shape", "lora"),
    [
        ("llama", tn.LoRAConfig(rank=4, dropout=0.4)),
        ("gpt2", None),
        ("gpt2", False),
        ("gpt2", tn.LoRAConfig(rank=4, dropout=0.4)),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_leaving_one_row_out_moves_the_sum_by_at_most_c_with_dropout_on(
    random_model: Any, shape: str, lora: Any, attention: str
) -> None:
    engine = private_engine(
        model_ref=random_model(shape), dp={"max_grad_norm": C}, dtype="float32", lora=lora
    )
    engine.model.causal.set_attn_implementation(attention)
    for module in engine.model.causal.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    engine.forward_pass.has_dropout = engine.model.has_dropout
    assert engine.forward_pass.has_dropout
    engine.training_step.gradients.secrets = secrets_by_id
    batch = examples((5, 12, 3, 8, 7, 4))
    together = clipped_sum(engine, batch)
    assert "one at a time" not in engine.training_step.gradients.ways
    for row in range(6):
        rest = batch.take(np.delete(np.arange(6), row))
        moved = float((together - clipped_sum(engine, rest)).norm())
        assert moved <= C * (1 + 1e-4), row
    engine.training_step.gradients.secrets = lambda batch: secrets_by_id(batch) + 1
    assert not torch.allclose(together, clipped_sum(engine, batch), rtol=0.05), "dropout is on"


def test_no_seed_repeats_the_masks_and_none_is_kept() -> None:
    def summed() -> Tensor:
        engine = private_engine(lora=tn.LoRAConfig(rank=2, dropout=0.5), dp={"max_grad_norm": 1e6}, seed=3)
        before = engine.forward_pass.random["cpu"].clone()
        found = clipped_sum(engine, examples((6, 9)))
        assert torch.equal(engine.forward_pass.random["cpu"], before), "the public stream is not touched"
        assert engine.training_step.gradients._secret_of_row is None
        return found

    first, second = summed(), summed()
    assert float((first - second).norm()) > 0.05 * float(first.norm())


def test_one_at_a_time_has_dropout_of_its_own_too(random_model: Any) -> None:
    engine = private_engine(
        model_ref=random_model("opt"), dp={"max_grad_norm": C}, dtype="float32", lora=False
    )
    engine.training_step.gradients.secrets = secrets_by_id
    batch = examples((5, 12, 3, 8))
    together = clipped_sum(engine, batch)
    assert engine.training_step.gradients.ways == ("one at a time",)
    for row in range(4):
        rest = batch.take(np.delete(np.arange(4), row))
        assert float((together - clipped_sum(engine, rest)).norm()) <= C * (1 + 1e-4)


def test_the_random_state_of_private_training_is_in_no_checkpoint(service: tn.ServiceClient) -> None:
    engine = private_engine(lora=tn.LoRAConfig(rank=2, dropout=0.5))
    assert engine.capture(include_optimizer=True).facts["random"] == {}
    assert Engine(tn.TrainingConfig()).capture(include_optimizer=True).facts["random"].keys() == {"cpu"}


def test_a_draw_with_dropout_takes_a_step() -> None:
    dp = {"sampling": "poisson", "dataset_size": 100, "noise_multiplier": 1.0}
    engine = private_engine(lora=tn.LoRAConfig(rank=2, dropout=0.5), dp=dp)
    engine.forward_backward(examples((4, 5), **{TICKET: ticket(CLIENT, 1, 0, np.arange(2))}), TOKEN_CE)
    assert engine.optim_step().step == 1


def test_a_unit_that_is_alone_gets_masks_in_every_shape_and_they_are_its_own() -> None:
    def of(secret: int, shape: tuple[int, ...]) -> Tensor:
        with RowDropout(torch.tensor([secret, 5]), one_unit=True):
            return F.dropout(torch.ones(shape), 0.3, training=True)

    assert torch.equal(of(17, (2, 40)), masked((2, 40), torch.tensor([17, 5])))
    assert torch.equal(of(17, (300, 40)), of(17, (300, 40)))
    assert not torch.equal(of(17, (300, 40)), of(18, (300, 40)))
    for shape in ((300, 40), (40_000,)):
        assert float((of(17, shape) > 0).double().mean()) == pytest.approx(0.7, abs=0.02)
    assert of(17, ()).shape == ()
