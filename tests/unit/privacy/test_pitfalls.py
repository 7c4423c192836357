"""The twenty pitfalls of differentially private training, one test for each, in the order of the design page.

Many are tested at length elsewhere; here each has its shortest form, so that none can lose its test unnoticed.
"""

import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tensafe_nb as tn
from tensafe_nb.data.poisson import sample_rate_of
from tensafe_nb.engine.engine import Engine
from tensafe_nb.errors import DPBudgetExceededError, PrivacyUnitError, ValidationError
from tensafe_nb.losses import resolve_loss
from tensafe_nb.privacy import noise
from tensafe_nb.privacy.ledger.statement import PrivacyStatement
from tensafe_nb.privacy.tickets import ticket
from tensafe_nb.protocol import results
from tensafe_nb.protocol.batch import TICKET
from tensafe_nb.store import home as places
from tensafe_nb.store.vault import Vault
from tests.close import assert_close
from tests.forking import Forker
from tests.unit.engine.private import (
    CLIENT,
    TOKEN_CE,
    CountingAccount,
    RecordedNoise,
    clipped_sum,
    examples,
    private_engine,
)
from tests.unit.privacy.homes import Home, step

C = 0.5
ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10, 20) for b in (3, 5)]
Create = Callable[..., tn.TrainingClient]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "here")


@pytest.fixture
def create(service: tn.ServiceClient) -> Create:
    def client(**dp: Any) -> tn.TrainingClient:
        return service.create_training_client(
            model_ref="builtin:sums",
            lora_config=tn.LoRAConfig(rank=2),
            optimizer={"learning_rate": 1e-3},
            batch_size=4,
            dp_config=tn.DPConfig(**{"dataset_size": len(ROWS), "target_epsilon": None} | dp),
        )

    return client


def take_steps(tc: tn.TrainingClient, count: int) -> None:
    for draw in tc.dp_batches(ROWS, steps=count):
        tc.forward_backward(draw), tc.optim_step().result()


def weights(engine: Engine) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in engine.parameters])


def engine_of(tc: tn.TrainingClient) -> Engine:
    found: Engine = tc._channel._executor.engine  # type: ignore[attr-defined]
    return found


def drawn(number: int = 0) -> tn.BatchData:
    return examples((5, 4, 6), **{TICKET: ticket(CLIENT, 7, number, np.arange(3))})


def poisson_engine(account: CountingAccount | None = None, **dp: Any) -> Engine:
    declared = {"sampling": "poisson", "dataset_size": 100, "expected_batch_size": 10}
    return private_engine(account, dp=declared | {"noise_multiplier": 1.0} | dp)


def test_1_each_unit_is_clipped_not_the_batch() -> None:
    engine = private_engine(dp={"max_grad_norm": 1e-3})
    row = examples((9,)).input_ids
    alike = tn.BatchData(np.repeat(row, 6, 0), example_ids=np.arange(6))
    assert float(clipped_sum(engine, alike).norm()) == pytest.approx(6e-3, rel=1e-2), "six times C, not once"


def test_2_a_loss_whose_rows_share_a_divisor_is_refused() -> None:
    def token_mean(outputs: Any, batch: Any) -> torch.Tensor:
        rows: torch.Tensor = -outputs.sum_rows(outputs.logprobs)
        return rows / len(batch["labels"])

    with pytest.raises(PrivacyUnitError, match="another value when other rows are beside it"):
        private_engine().forward_backward(examples((3, 9)), resolve_loss(token_mean))


def test_3_rows_of_gradients_that_are_not_rows_of_the_batch_are_told_and_not_used(random_model: Any) -> None:
    engine = private_engine(model_ref=random_model("opt"), dp={"max_grad_norm": C}, dtype="float32")
    clipped_sum(engine, examples((5, 8)))
    assert engine.training_step.gradients.ways == ("one at a time",)


def test_4_the_divisor_is_the_declared_l_however_many_calls_made_the_step() -> None:
    def moved(*parts: slice) -> torch.Tensor:
        engine = private_engine(dp={"expected_batch_size": 10, "max_grad_norm": C})
        before = weights(engine)
        for part in parts:
            engine.forward_backward(examples((5, 4, 6)).take(part), TOKEN_CE)
        engine.optim_step()
        return before - weights(engine)

    once = moved(slice(0, 3))
    assert_close(moved(slice(0, 1), slice(1, 2), slice(2, 3)), once, within=1e-4)  # differences of weights
    expected = clipped_sum(private_engine(dp={"max_grad_norm": C}), examples((5, 4, 6))) / 10
    assert_close(once, expected, within=1e-4)


def test_5_noise_is_drawn_once_a_step_at_sigma_c_however_many_rows_came() -> None:
    recorded = RecordedNoise()
    engine = private_engine(dp={"noise_multiplier": 2.0, "max_grad_norm": C}, noise=recorded)
    for lengths in ((5,), (4, 6, 3, 8)):
        (
            engine.forward_backward(examples(lengths), TOKEN_CE),
            engine.forward_backward(examples((3,)), TOKEN_CE),
        )
        engine.optim_step()
    assert recorded.draws == [2.0 * C, 2.0 * C]


def test_6_neither_an_empty_draw_nor_a_row_that_is_not_a_number_lets_a_step_be_skipped() -> None:
    account = CountingAccount()
    engine = poisson_engine(account)
    empty = tn.BatchData.nothing(ticket(CLIENT, 7, 0, np.array([], int)))
    engine.forward_backward(empty, TOKEN_CE), engine.optim_step()

    def broken(outputs: Any, batch: Any) -> torch.Tensor:
        rows: torch.Tensor = -outputs.sum_rows(outputs.logprobs)
        return rows * math.nan

    engine.forward_backward(drawn(1), resolve_loss(broken)), engine.optim_step()
    assert (len(account.charges), engine.step) == (2, 2)
    assert weights(engine).isfinite().all()


def test_7_the_sampling_rate_has_no_default_and_is_never_the_length_of_the_data(create: Create) -> None:
    with pytest.raises(ValidationError, match="needs dataset_size"):
        tn.DPConfig()
    tc = create(dataset_size=1000)
    assert sample_rate_of(tc.config) == tc.dp_batches(ROWS, steps=1).sample_rate == 4 / 1000


def test_8_a_unit_that_comes_twice_in_a_step_is_charged_twice() -> None:
    account = CountingAccount()
    engine = private_engine(account)
    for _ in range(2):
        engine.forward_backward(examples((4, 5)), TOKEN_CE)
    engine.optim_step()
    assert account.charges[0][1] == {"0": 2, "1": 2}
    poisson = poisson_engine()
    poisson.forward_backward(drawn(), TOKEN_CE)
    with pytest.raises(PrivacyUnitError, match="came twice"):
        poisson.forward_backward(drawn(), TOKEN_CE)


def test_9_the_step_over_the_budget_is_refused_before_a_weight_moves() -> None:
    engine = private_engine(CountingAccount(budget=0), dp={"noise_multiplier": 1.0})
    before = weights(engine)
    engine.forward_backward(examples((4, 5)), TOKEN_CE)
    with pytest.raises(DPBudgetExceededError):
        engine.optim_step()
    assert torch.equal(weights(engine), before) and engine.step == 0


def test_10_a_step_without_noise_is_refused_and_after_void_privacy_epsilon_is_infinite_for_good(
    create: Create,
) -> None:
    tc = create()
    saved = tc.save_state().result()
    (draw,) = tc.dp_batches(ROWS, steps=1)
    tc.forward_backward(draw)
    with pytest.raises(ValidationError, match="void_privacy"):
        tc.optim_step(apply_dp_noise=False).result()
    tc.void_privacy("a test").result()
    tc.load_state(saved.artifact_id).result()
    take_steps(tc, 1)
    assert tc.privacy_statement().epsilon is None and tc.dp_metrics is not None
    assert tc.dp_metrics.total_epsilon == math.inf


def test_11_going_back_to_a_checkpoint_gives_no_epsilon_back(create: Create) -> None:
    tc = create()
    saved = tc.save_state().result()
    take_steps(tc, 3)
    spent = tc.privacy_statement().epsilon
    tc.load_state(saved.artifact_id).result()
    assert (tc.step, tc.privacy_statement().epsilon) == (0, spent)


def test_12_no_gradient_without_noise_is_in_a_checkpoint(create: Create) -> None:
    tc = create(sampling="worst_case")
    (batch, *_) = tc.batches(ROWS)
    tc.forward_backward(batch).result()
    saved = tc.save_state().result()
    assert saved.dropped_batches == 1
    with Vault(places.Home.of_environment()).artifacts.open(saved.artifact_id) as artifact:
        parts = {name for name, _, _ in artifact.parts()}
    assert not any("accumulation" in name or "grad" in name for name in parts), parts


def test_13_what_is_shown_live_is_marked_as_outside_epsilon(home: Home) -> None:
    ledger = home.ledger()
    ledger.charge(step())
    statement = PrivacyStatement.of(ledger, tn.DPConfig(dataset_size=1000))
    assert any("operator's view" in text and "gradient norms" in text for text in statement.outside)
    assert "epsilon does not cover them" in (results.DPMetrics.__doc__ or "")
    listed = home.log.entries(operation="dp_charge")[0].dp_metrics
    assert listed is not None, "the log may be handed on: it holds none of this"
    assert {listed[name] for name in ("grad_norm_before_clip", "grad_norm_after_clip", "num_clipped")} == {
        None
    }


def test_14_adapters_cannot_be_initialised_from_private_data() -> None:
    for name in ("init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "loftq_config"):
        with pytest.raises(ValidationError, match=f"no field {name!r}"):
            tn.LoRAConfig(**{name: "pissa"})


def test_15_runs_with_other_hyperparameters_on_the_same_data_add_up(create: Create) -> None:
    slow, fast = (create(dataset_id="letters", max_grad_norm=c) for c in (0.1, 2.0))
    take_steps(slow, 2), take_steps(fast, 3)
    assert slow.privacy_statement().epsilon == pytest.approx(slow.what_if(steps=5).epsilon)
    assert len(slow.privacy_statement().mechanisms) == 2


def test_16_a_trainable_weight_outside_the_optimiser_is_refused() -> None:
    engine = Engine(tn.TrainingConfig(dp_config=tn.DPConfig(sampling="worst_case")))
    engine.model.causal.register_parameter("stray", nn.Parameter(torch.zeros(2)))
    with pytest.raises(PrivacyUnitError, match="'stray' is trainable and the optimiser does not know it"):
        engine.train_privately(CountingAccount(), CLIENT)


def test_17_the_optimisers_moments_see_noised_gradients_only() -> None:
    dp = tn.DPConfig(sampling="worst_case", noise_multiplier=1.0, expected_batch_size=10, max_grad_norm=C)
    engine = Engine(tn.TrainingConfig(lora_config=tn.LoRAConfig(rank=2), dp_config=dp))
    engine.train_privately(CountingAccount(), CLIENT)
    engine.training_step.noise = lambda like, sd: [torch.full_like(t, 100 * sd) for t in like]
    exact = [total / 10 for total in _sums(engine)]
    engine.forward_backward(examples((5, 4)), TOKEN_CE)
    assert not engine.optimizer.torch.state, "nothing has reached it before the noise"
    engine.optim_step()
    beta = engine.optimizer.torch.param_groups[0]["betas"][0]
    for parameter, mean in zip(engine.parameters, exact, strict=True):
        moment = engine.optimizer.torch.state[parameter]["exp_avg"] / (1 - beta)
        assert torch.allclose(moment, mean + 100 * C / 10, rtol=1e-4)


def _sums(engine: Engine) -> list[torch.Tensor]:
    engine.forward_backward(examples((5, 4)), TOKEN_CE)
    found = [total.clone() for total in engine.training_step.sum._totals()]
    engine.discard_gradients()
    return found


def test_18_no_seed_repeats_noise_or_draws(create: Create) -> None:
    zeros = [torch.zeros(50)]
    found = []
    for _ in range(2):
        torch.manual_seed(3), np.random.seed(3)
        found.append(noise.gaussian(zeros, 1.0)[0])
    assert not torch.equal(*found)
    tc = create(dataset_size=20, expected_batch_size=10)
    first, second = (
        [draw.extras[TICKET].tolist() for draw in tc.dp_batches(ROWS, steps=4)] for _ in range(2)
    )
    assert first != second


def test_19_choosing_by_private_metrics_is_named_in_the_statement(home: Home) -> None:
    ledger = home.ledger()
    ledger.charge(step())
    text = PrivacyStatement.of(ledger, tn.DPConfig(dataset_size=1000)).to_markdown()
    assert "Stopping early, choosing a checkpoint, or choosing epsilon by a metric" in text
    assert "Hyperparameter search on the same data" in text


def test_20_the_machine_that_trains_is_never_called_protected_from(home: Home) -> None:
    text = PrivacyStatement.of(home.ledger(), tn.DPConfig(dataset_size=1000)).to_markdown()
    assert "The machine or server that trained: it saw the raw batches." in text
    for page in (Path(tn.__file__).parent / "privacy").rglob("*.py"):
        assert "protects from the server" not in page.read_text(encoding="utf-8")


# a real death between paying and stepping

DIES = """
import os, signal
import tensafe_nb as tn
from tensafe_nb.privacy.dp_sgd import ClippedSum

rows = [{"prompt": f"{a}+3=", "completion": str(a + 3)} for a in range(10, 30)]
service = tn.ServiceClient()
tc = service.create_training_client(
    model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=2), batch_size=4,
    dp_config=tn.DPConfig(dataset_size=20, target_epsilon=None, dataset_id="letters"),
)
first, second = tc.dp_batches(rows, steps=2)
tc.forward_backward(first), tc.optim_step().result()
print(tc.save_state().result().artifact_id, flush=True)
ClippedSum.release = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
tc.forward_backward(second), tc.optim_step().result()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_process_killed_between_ledger_and_step_has_paid_and_its_weights_are_the_old_ones(
    forker: Forker, tmp_path: Path
) -> None:
    done = forker.run(DIES, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with tn.ServiceClient() as service:
        tc = service.restore(done.stdout.strip())
        tc.tokenizer  # noqa: B018  # the model is there now
        assert (tc.step, tc.privacy_statement().steps) == (1, 2)
        assert tc.privacy_statement().epsilon == pytest.approx(tc.what_if(steps=2).epsilon)
        assert service.verify_audit_log().ok
