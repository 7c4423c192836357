"""The private path of the engine: whose gradient is whose, how much one unit can move, what is paid for what."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tensafe_nb as tn
from tensafe_nb.engine import unit_gradients
from tensafe_nb.engine.engine import Engine
from tensafe_nb.errors import DPBudgetExceededError, PrivacyUnitError, ValidationError
from tensafe_nb.losses import resolve_loss
from tensafe_nb.privacy.tickets import ticket
from tensafe_nb.protocol.batch import TICKET
from tests.close import assert_close

from .private import (
    CLIENT,
    TOKEN_CE,
    CountingAccount,
    RecordedNoise,
    clipped_sum,
    examples,
    one_at_a_time,
    private_engine,
)

SHAPES = ("llama", "gpt2", "qwen2", "gemma2", "opt", "phi")
LENGTHS = (5, 12, 3, 8, 1 + 6, 4)
C = 0.5


def engine_of(random_model: Any, shape: str, **options: Any) -> Engine:
    options = {"dtype": "float32"} | options
    return private_engine(model_ref=random_model(shape), dp={"max_grad_norm": C}, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_example_moves_the_sum_by_at_most_c(random_model: Any, shape: str) -> None:
    engine = engine_of(random_model, shape)
    without = examples((3,) * 15)
    long = examples((40,), seed=1)
    joined = tn.BatchData(
        np.vstack([np.pad(without.input_ids, ((0, 0), (0, 37))), long.input_ids]),
        np.vstack([np.pad(without.attention_mask, ((0, 0), (0, 37))), long.attention_mask]),
        extras={"example_ids": np.arange(16)},
    )
    moved = clipped_sum(engine, joined) - clipped_sum(engine, without)
    assert float(moved.norm()) <= C * (1 + 1e-5)


def test_an_example_that_pulls_the_other_way_moves_the_sum_by_at_most_c() -> None:
    engine = private_engine(dp={"max_grad_norm": C})

    def signed(outputs: Any, batch: Any) -> torch.Tensor:
        rows: torch.Tensor = -outputs.sum_rows(outputs.logprobs) * batch["sign"]
        return rows

    loss = resolve_loss(signed)
    row = examples((9,)).input_ids
    aligned = tn.BatchData(np.repeat(row, 7, 0), example_ids=np.arange(7), sign=np.full(7, 1.0))
    against = tn.BatchData(
        np.repeat(row, 8, 0), example_ids=np.arange(8), sign=np.array([1.0] * 7 + [-100.0])
    )
    moved = clipped_sum(engine, against, loss=loss) - clipped_sum(engine, aligned, loss=loss)
    assert float(moved.norm()) == pytest.approx(C, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lora", [None, tn.LoRAConfig(rank=4, bias="all"), False])
def test_the_clipped_sum_is_that_of_one_example_at_a_time(random_model: Any, shape: str, lora: Any) -> None:
    engine = engine_of(random_model, shape, lora=lora)
    batch = examples(LENGTHS)
    exact = one_at_a_time(engine, batch, C)
    parts = [batch.rows(0, 1), batch.rows(1, 4), batch.rows(4, 6)], [batch.rows(a, a + 2) for a in (0, 2, 4)]
    for found in (clipped_sum(engine, batch), *(clipped_sum(engine, *split) for split in parts)):
        assert_close(found, exact)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_bfloat16_the_norms_are_those_of_the_gradients_that_are_added(
    random_model: Any, shape: str
) -> None:
    for lora in (None, tn.LoRAConfig(rank=4, bias="all")):
        engine = engine_of(random_model, shape, lora=lora, dtype="bfloat16")
        clipped_sum(engine, examples(LENGTHS))
        alone = clipped_sum(engine, examples((40,)))
        assert 0 < float(alone.norm()) <= C * (1 + 1e-5)
        exact = one_at_a_time(engine, examples(LENGTHS), C)
        assert float((clipped_sum(engine, examples(LENGTHS)) - exact).norm()) <= 0.1 * float(exact.norm())


def test_gradients_are_told_apart_in_one_pass_where_that_is_exact(random_model: Any) -> None:
    def way(shape: str, lora: Any) -> tuple[str, ...]:
        engine = engine_of(random_model, shape, lora=lora)
        clipped_sum(engine, examples(LENGTHS))
        return engine.training_step.gradients.ways

    adapters = tn.LoRAConfig(rank=4, target_modules=("q_proj", "v_proj"))
    assert {way(shape, None) for shape in ("llama", "qwen2", "gemma2", "phi", "gpt2")} == {("book-keeping",)}
    assert way("opt", adapters) == ("book-keeping",)
    assert way("opt", None) == ("one at a time",), "its MLP sees one row of B·T tokens"
    assert {way(shape, False) for shape in ("llama", "qwen2", "phi", "gpt2")} == {("book-keeping",)}


@pytest.mark.parametrize("lora", [None, False])
def test_dropout_is_no_reason_to_go_one_at_a_time(lora: Any, random_model: Any) -> None:
    options = {"lora": tn.LoRAConfig(rank=4, dropout=0.3)} if lora is None else {"lora": False}
    engine = engine_of(random_model, "llama", **options)
    clipped_sum(engine, examples(LENGTHS))
    assert "one at a time" not in engine.training_step.gradients.ways


def test_all_rows_of_a_unit_are_added_up_before_they_are_clipped() -> None:
    engine = private_engine(dp={"max_grad_norm": C})
    batch = examples((6, 7, 8), unit_ids=np.array([5, 9, 5]))
    apart = [clipped_sum(engine, batch.take(np.array(rows))) for rows in ([0, 2], [1])]
    assert_close(clipped_sum(engine, batch), apart[0] + apart[1])
    assert float(apart[0].norm()) <= C * (1 + 1e-5)


def test_a_unit_larger_than_a_micro_batch_is_still_clipped_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = private_engine(dp={"max_grad_norm": C})
    batch = examples((6, 7, 8, 5), unit_ids=np.array([1, 2, 1, 1]))
    expected = clipped_sum(whole, batch)
    size = sum(p.numel() for p in whole.parameters)
    monkeypatch.setattr(unit_gradients, "MAX_GRADIENTS", 2 * size)
    assert_close(clipped_sum(private_engine(dp={"max_grad_norm": C}), batch), expected)


def test_a_scalar_loss_is_taken_one_example_at_a_time() -> None:
    def mean_loss(outputs: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs.logits, batch["labels"])

    engine, batch = private_engine(dp={"max_grad_norm": C}), examples(LENGTHS)
    found = clipped_sum(engine, batch, loss=resolve_loss(mean_loss))
    assert_close(found, clipped_sum(engine, batch))
    assert engine.training_step.gradients.ways == ("book-keeping", "one at a time")


def test_a_loss_whose_rows_are_coupled_is_refused() -> None:
    def coupled(outputs: Any, batch: Any) -> torch.Tensor:
        rows: torch.Tensor = -outputs.sum_rows(outputs.logprobs)
        return rows / len(batch["labels"])

    with pytest.raises(PrivacyUnitError, match="another value when other rows are beside it"):
        private_engine().forward_backward(examples(LENGTHS), resolve_loss(coupled))
    with pytest.raises(PrivacyUnitError, match="compares each row with all others"):
        private_engine().forward_backward(
            examples((4, 4), unit_ids=np.zeros(2, int)), resolve_loss("contrastive")
        )


def test_a_loss_that_was_registered_anew_under_its_name_is_probed_anew() -> None:
    def named(divide: bool) -> Any:
        def mine(outputs: Any, batch: Any) -> torch.Tensor:
            rows: torch.Tensor = -outputs.sum_rows(outputs.logprobs)
            return rows / len(batch["labels"]) if divide else rows

        return mine

    engine = private_engine()
    engine.forward_backward(examples(LENGTHS), resolve_loss(named(divide=False)))
    with pytest.raises(PrivacyUnitError, match="another value"):
        engine.forward_backward(examples(LENGTHS), resolve_loss(named(divide=True)))


def test_pairs_belong_to_one_unit() -> None:
    engine, ranking = private_engine(), resolve_loss("margin_ranking")
    with pytest.raises(PrivacyUnitError, match="must belong to one privacy unit"):
        engine.forward_backward(examples((4, 4)), ranking)
    engine.forward_backward(examples((4, 4, 5, 5), unit_ids=np.array([0, 0, 1, 1])), ranking)
    assert engine.training_step.sum.norms.units == 2


def test_a_row_that_is_not_finite_counts_as_zero_and_the_step_is_not_skipped() -> None:
    def broken(outputs: Any, batch: Any) -> torch.Tensor:
        rows: torch.Tensor = -outputs.sum_rows(outputs.logprobs) * batch["factor"]
        return rows

    engine, loss = private_engine(), resolve_loss(broken)
    clipped_sum(engine, examples(LENGTHS, factor=np.ones(6)), loss=loss)
    factor = np.array([1, 1, np.nan, 1, np.inf, 1])
    rest = examples(LENGTHS, factor=np.ones(6)).take(np.array([0, 1, 3, 5]))
    expected = clipped_sum(engine, rest, loss=loss)
    for _ in range(12):  # which part of the rows the loss is asked about is drawn anew in every step
        assert_close(clipped_sum(engine, examples(LENGTHS, factor=factor), loss=loss), expected)


def test_rows_without_an_owner_are_refused_with_both_ways_out() -> None:
    nobody = tn.BatchData([[5, 6, 7]])
    with pytest.raises(PrivacyUnitError, match=r"give example_ids [\s\S]*dp_batches"):
        private_engine().forward_backward(nobody, TOKEN_CE)
    poisson = private_engine(dp={"sampling": "poisson", "dataset_size": 100})
    with pytest.raises(PrivacyUnitError, match=r"dp_batches.*worst_case"):
        poisson.forward_backward(examples((3, 3)), TOKEN_CE)


# draws


def drawn(number: int = 0, lengths: tuple[int, ...] = LENGTHS, client: str = CLIENT) -> tn.BatchData:
    return examples(lengths, **{TICKET: ticket(client, 7, number, np.arange(len(lengths)))})


@pytest.fixture
def poisson() -> Engine:
    dp = {"sampling": "poisson", "dataset_size": 100, "noise_multiplier": 1.0}
    return private_engine(dp=dp, noise=RecordedNoise())


def account_of(engine: Engine) -> CountingAccount:
    account: Any = engine.training_step.account
    return account  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([0, 1, 2, 3, 4], "5 of the 6 rows"),
        ([0, 1, 2, 3, 4, 5, 5], "came twice"),
    ],
)
def test_a_draw_that_lacks_or_repeats_a_row_is_refused_and_nothing_is_charged(
    poisson: Engine, rows: list[int], reason: str
) -> None:
    with pytest.raises(PrivacyUnitError, match=reason):
        poisson.forward_backward(drawn().take(np.array(rows)), TOKEN_CE), poisson.optim_step()
    assert account_of(poisson).charges == [] and poisson.step == 0
    poisson.forward_backward(drawn(), TOKEN_CE)
    assert poisson.optim_step().step == 1, "whole, it may come again"


def test_a_row_from_elsewhere_is_refused(poisson: Engine) -> None:
    mixed = drawn()
    mixed.extras[TICKET][2] = ticket(CLIENT, 7, 1, np.arange(6))[2]
    with pytest.raises(PrivacyUnitError, match="several draws"):
        poisson.forward_backward(mixed, TOKEN_CE)
    with pytest.raises(PrivacyUnitError, match="another training client's"):
        poisson.forward_backward(drawn(client="tc-2"), TOKEN_CE)


def test_a_draw_counts_once(poisson: Engine) -> None:
    poisson.forward_backward(drawn(), TOKEN_CE), poisson.optim_step()
    with pytest.raises(PrivacyUnitError, match="used in an earlier step"):
        poisson.forward_backward(drawn(), TOKEN_CE)
    poisson.forward_backward(drawn(1), TOKEN_CE)
    with pytest.raises(PrivacyUnitError, match="two draws in one step"):
        poisson.forward_backward(drawn(2), TOKEN_CE)


def test_a_draw_may_be_split_but_not_a_unit(poisson: Engine) -> None:
    batch = drawn()
    for rows in (slice(0, 2), slice(2, 6)):
        poisson.forward_backward(batch.take(rows), TOKEN_CE)
    assert poisson.optim_step().step == 1
    torn = examples(LENGTHS, **{TICKET: ticket(CLIENT, 7, 3, np.array([0, 0, 1, 2, 3, 3]))})
    poisson.forward_backward(torn.take(slice(0, 1)), TOKEN_CE)
    with pytest.raises(PrivacyUnitError, match="came in two calls"):
        poisson.forward_backward(torn.take(slice(1, 6)), TOKEN_CE)


def test_an_empty_draw_pays_is_noised_and_steps() -> None:
    dp = {"sampling": "poisson", "dataset_size": 100, "noise_multiplier": 1.3, "max_grad_norm": 0.5}
    engine = private_engine(dp=dp | {"expected_batch_size": 1})
    before = [p.detach().clone() for p in engine.parameters]
    result = engine.forward_backward(tn.BatchData.nothing(ticket(CLIENT, 7, 0, np.array([], int))), TOKEN_CE)
    assert math.isnan(result.loss) and result.tokens_processed == 0
    step = engine.optim_step()
    assert step.dp_metrics is not None and step.dp_metrics.noise_applied
    assert (step.dp_metrics.grad_norm_before_clip, step.dp_metrics.num_clipped) == (0, 0)
    assert len(account_of(engine).charges) == 1
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(engine.parameters, before, strict=True)])
    assert float(moved.std()) == pytest.approx(0.65, rel=4 / math.sqrt(2 * moved.numel()))


# noise, budget, order of things


def test_noise_is_drawn_once_a_step_and_the_divisor_is_declared() -> None:
    noise = RecordedNoise()
    dp = {"noise_multiplier": 1.5, "max_grad_norm": 0.4, "expected_batch_size": 10}
    engine = private_engine(dp=dp, noise=noise)
    before = torch.cat([p.detach().flatten().clone() for p in engine.parameters])
    expected = clipped_sum(engine, examples(LENGTHS)) / 10
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        engine.forward_backward(examples(LENGTHS).take(rows), TOKEN_CE)
    engine.optim_step()
    assert noise.draws == [1.5 * 0.4]
    moved = before - torch.cat([p.detach().flatten() for p in engine.parameters])
    assert_close(moved, expected, within=1e-4)  # a difference of weights ten times its size


def test_a_step_over_the_budget_moves_nothing_and_every_later_one_is_refused_too() -> None:
    account = CountingAccount(budget=2)
    engine = private_engine(account, dp={"noise_multiplier": 1.0})
    for _ in range(2):
        engine.forward_backward(examples(LENGTHS), TOKEN_CE), engine.optim_step()
    before = [p.detach().clone() for p in engine.parameters]
    for _ in range(2):
        engine.forward_backward(examples(LENGTHS), TOKEN_CE)
        with pytest.raises(DPBudgetExceededError):
            engine.optim_step()
    assert len(account.charges) == 2 and engine.step == 2
    assert all(torch.equal(p, b) for p, b in zip(engine.parameters, before, strict=True))
    with pytest.raises(ValidationError, match="no gradients"):
        engine.optim_step()


def test_a_step_that_cannot_be_paid_for_is_not_taken() -> None:
    class Broke(CountingAccount):
        def charge(self, *args: Any, **kwargs: Any) -> None:
            raise tn.errors.LedgerError("no disk")

    engine = private_engine(Broke(), dp={"noise_multiplier": 1.0})
    before = [p.detach().clone() for p in engine.parameters]
    engine.forward_backward(examples(LENGTHS), TOKEN_CE)
    with pytest.raises(tn.errors.LedgerError):
        engine.optim_step()
    assert all(torch.equal(p, b) for p, b in zip(engine.parameters, before, strict=True))


def test_a_step_without_noise_is_refused_while_there_is_a_guarantee_to_lose() -> None:
    engine = private_engine(dp={"noise_multiplier": 1.0})
    engine.forward_backward(examples(LENGTHS), TOKEN_CE)
    with pytest.raises(ValidationError, match="void_privacy"):
        engine.optim_step(apply_dp_noise=False)
    void = private_engine(CountingAccount(void=True), dp={"noise_multiplier": 1.0, "target_epsilon": 1.0})
    void.forward_backward(examples(LENGTHS), TOKEN_CE)
    step = void.optim_step(apply_dp_noise=False)
    assert step.dp_metrics is not None and not step.dp_metrics.noise_applied
    assert (step.dp_metrics.total_epsilon, step.dp_metrics.epsilon_spent) == (math.inf, 0.0)


def test_the_metrics_are_means_over_the_units_of_the_step() -> None:
    engine = private_engine(dp={"max_grad_norm": C})
    batch = examples(LENGTHS)
    norms = [float(one_at_a_time(engine, batch.take(np.array([r])), math.inf).norm()) for r in range(6)]
    engine.forward_backward(batch.rows(0, 2), TOKEN_CE), engine.forward_backward(batch.rows(2, 6), TOKEN_CE)
    metrics = engine.optim_step().dp_metrics
    assert metrics is not None
    assert metrics.grad_norm_before_clip == pytest.approx(np.mean(norms), rel=1e-5)
    assert metrics.grad_norm_after_clip == pytest.approx(np.mean(np.minimum(norms, C)), rel=1e-5)
    assert metrics.num_clipped == sum(norm > C for norm in norms)


def test_units_that_take_part_twice_in_a_step_are_counted_twice() -> None:
    account = CountingAccount()
    engine = private_engine(account)
    engine.forward_backward(examples((4, 5)), TOKEN_CE), engine.forward_backward(examples((4,)), TOKEN_CE)
    engine.optim_step()
    assert account.charges == [(1, {"0": 2, "1": 1}, "example", True)]


# guards


def test_an_engine_without_an_account_trains_nothing() -> None:
    engine = Engine(tn.TrainingConfig(dp_config=tn.DPConfig(sampling="worst_case")))
    with pytest.raises(ValidationError, match="no privacy account"):
        engine.forward_backward(examples((3, 3)), TOKEN_CE)


def test_a_stray_forward_pass_in_training_mode_changes_nothing(random_model: Any) -> None:
    for lora in (None, False):
        engine = engine_of(random_model, "llama", lora=lora)
        expected = clipped_sum(engine, examples(LENGTHS))
        engine.model.causal.train()
        engine.model.causal(input_ids=torch.tensor([[3, 4, 5]]))
        engine.model.causal.eval()
        assert_close(clipped_sum(engine, examples(LENGTHS)), expected)


def test_layers_that_remember_rows_are_refused() -> None:
    engine = Engine(tn.TrainingConfig(dp_config=tn.DPConfig(sampling="worst_case")))
    engine.model.causal.add_module("norm", nn.BatchNorm1d(4))
    with pytest.raises(PrivacyUnitError, match="running statistics"):
        engine.train_privately(CountingAccount(), CLIENT)


def test_a_weight_that_the_optimiser_does_not_know_is_refused() -> None:
    engine = Engine(tn.TrainingConfig(dp_config=tn.DPConfig(sampling="worst_case")))
    engine.optimizer.torch.param_groups[0]["params"].pop()
    with pytest.raises(PrivacyUnitError, match="the optimiser does not know it"):
        engine.train_privately(CountingAccount(), CLIENT)


def test_a_value_head_is_refused() -> None:
    config = tn.TrainingConfig(value_head=True, dp_config=tn.DPConfig(sampling="worst_case"))
    with pytest.raises(ValidationError, match="value head"):
        Engine(config).train_privately(CountingAccount(), CLIENT)


@pytest.mark.parametrize("name", ["init_lora_weights", "eva_config", "loftq_config"])
def test_adapters_cannot_be_initialised_from_data(name: str) -> None:
    with pytest.raises(ValidationError, match=f"no field {name!r}"):
        tn.LoRAConfig(**{name: True})
