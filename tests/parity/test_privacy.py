"""Private training as a user does it: draws, steps, a budget, checkpoints and forks, and what is said about it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tensafe_nb as tn
from tensafe_nb.events import PrivacySpent
from tensafe_nb.protocol.results import DPMetrics
from tests.parity.serving import engine_of

ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10, 30) for b in (3, 5)]
DP = {"dataset_size": len(ROWS), "noise_multiplier": 1.0, "target_epsilon": None}

Private = Callable[..., tn.TrainingClient]


@pytest.fixture
def private(service: tn.ServiceClient) -> Private:
    def create(model_ref: str = "builtin:sums", **dp: Any) -> tn.TrainingClient:
        return service.create_training_client(
            model_ref=model_ref,
            lora_config=tn.LoRAConfig(rank=2),
            optimizer={"learning_rate": 1e-3},
            batch_size=4,
            dp_config=tn.DPConfig(**(DP | dp)),
        )

    return create


def train(tc: tn.TrainingClient, steps: int) -> list[DPMetrics]:
    found = []
    for draw in tc.dp_batches(ROWS, steps=steps):
        tc.forward_backward(draw)
        metrics = tc.optim_step().dp_metrics
        assert metrics is not None
        found.append(metrics)
    return found


def weights(tc: tn.TrainingClient) -> list[torch.Tensor]:
    return [p.detach().clone() for p in engine_of(tc).parameters]


def spent(tc: tn.TrainingClient) -> float:
    statement = tc.privacy_statement()
    return math.inf if statement.epsilon is None else statement.epsilon


def events(tc: tn.TrainingClient) -> list[PrivacySpent]:
    return [event for event in tc.history.events() if isinstance(event, PrivacySpent)]


def test_every_step_says_what_it_spent_and_the_values_add_up(private: Private) -> None:
    tc = private()
    metrics = train(tc, 5)
    assert all(m.noise_applied and m.epsilon_spent > 0 for m in metrics)
    assert metrics[-1].total_epsilon == pytest.approx(sum(m.epsilon_spent for m in metrics))
    assert tc.dp_metrics == metrics[-1] and tc.refresh().dp_metrics == metrics[-1]
    told = events(tc)
    assert [e.step for e in told] == [0, 1, 2, 3, 4, 5]
    assert told[-1].total_epsilon == metrics[-1].total_epsilon and told[-1].projected_step is None
    assert tc.history["dp/epsilon"].tolist() == [m.total_epsilon for m in metrics]
    assert metrics[-1].total_epsilon == pytest.approx(tc.what_if(steps=5).epsilon)


def test_without_privacy_nothing_is_claimed(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    tc.forward_backward(batch)
    assert tc.optim_step(apply_dp_noise=True).dp_metrics is None and tc.dp_metrics is None
    for call in (tc.privacy_statement, tc.privacy_audit, lambda: tc.void_privacy("because").result()):
        with pytest.raises(tn.ValidationError, match="without differential privacy"):
            call()
    with pytest.raises(tn.ValidationError, match=r"Use batches\(\)"):
        tc.dp_batches(ROWS)
    assert events(tc) == []


def test_a_run_ends_with_the_budget_and_keeps_a_checkpoint(
    service: tn.ServiceClient, private: Private
) -> None:
    tc = private(target_epsilon=4.0)
    run = tc.fit(tc.dp_batches(ROWS, steps=500), show=False)
    result = run.result()
    assert (result.state, str(run.state)) == ("STOPPED", "STOPPED")
    assert "the budget is 4" in (result.reason or "")
    assert 0 < result.steps == tc.step == run.steps_done
    assert tc.dp_metrics is not None and tc.dp_metrics.total_epsilon <= 4.0
    (saved,) = service.list_artifacts()
    assert saved.step == tc.step and saved.metadata == {"reason": "dp_budget_exceeded"}
    assert any(e.refused and e.step == tc.step for e in events(tc))
    assert events(tc)[1].projected_step == tc.step, "it was foretold"


def test_the_guides_emergency_checkpoint_works_when_the_budget_is_spent(private: Private) -> None:
    tc = private(target_epsilon=3.5)
    handles = []
    for draw in tc.dp_batches(ROWS, steps=60):
        tc.forward_backward(draw)
        handles.append(tc.optim_step())
    with pytest.raises(tn.DPBudgetExceededError) as refused:
        for handle in handles:
            handle.result()
    before = weights(tc)
    assert all(isinstance(h.exception(), tn.DPBudgetExceededError) for h in handles[tc.step :])
    details = refused.value.details
    assert details["current_epsilon"] <= details["max_epsilon"] == 3.5 < details["next_epsilon"]
    assert tc.save_state(metadata={"reason": "dp_budget_exceeded"}).dp_metrics == tc.dp_metrics
    assert all(torch.equal(a, b) for a, b in zip(weights(tc), before, strict=True))
    assert tc.status == "READY"


def test_no_public_call_rewinds_epsilon(service: tn.ServiceClient, private: Private) -> None:
    tc = private()
    train(tc, 2)
    saved = tc.save_state().result()
    after_seven = train(tc, 5)[-1].total_epsilon
    tc.load_state(saved.artifact_id).result()
    assert tc.step == 2 and spent(tc) == after_seven
    after_twelve = train(tc, 5)[-1].total_epsilon
    assert after_twelve == pytest.approx(tc.what_if(steps=12).epsilon)
    service.delete_artifact(saved.artifact_id)
    tc.close()
    again = private()
    assert spent(again) == 0, "another client is another account, unless a data set is named"


def test_forks_and_their_parent_share_one_account(private: Private) -> None:
    tc = private()
    train(tc, 2)
    forks = [tc.fork(), tc.fork()]
    for fork in forks:
        train(fork, 3)
    expected = tc.what_if(steps=8).epsilon
    for client in (tc, *forks):
        assert spent(client) == pytest.approx(expected)


def test_a_named_data_set_is_one_account_for_all_clients(private: Private) -> None:
    first, second = private(dataset_id="letters"), private(dataset_id="letters")
    train(first, 2)
    assert train(second, 2)[-1].total_epsilon == pytest.approx(first.what_if(steps=4).epsilon)
    assert "letters" in second.privacy_statement().account


def test_going_on_without_privacy_from_private_weights_ends_the_guarantee(
    service: tn.ServiceClient, private: Private, batch: tn.BatchData
) -> None:
    tc = private()
    train(tc, 1)
    open_fork = tc.fork(dp_config=None)
    open_fork.forward_backward(tn.BatchData([[3, 4, 5]])).result()
    assert tc.privacy_statement().void == ()
    open_fork.optim_step().result()
    assert "without differential privacy" in str(tc.privacy_statement().void)
    assert train(tc, 1)[-1].total_epsilon == math.inf


def test_weights_without_an_account_are_refused_by_a_private_client(
    service: tn.ServiceClient, private: Private
) -> None:
    plain = service.create_training_client(model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=2))
    saved = plain.save_state().result()
    tc = private()
    with pytest.raises(tn.ValidationError, match="trained without differential privacy"):
        tc.load_state(saved.artifact_id).result()
    assert train(tc, 1)[0].total_epsilon < math.inf
    fork = plain.fork(dp_config=tn.DPConfig(**DP))
    with pytest.raises(tn.ValidationError, match="export"):
        fork.optim_step().result()


@pytest.mark.transports("embedded")  # a server's keys stay where they are
def test_a_checkpoint_restores_elsewhere_with_its_account(
    service: tn.ServiceClient, private: Private, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tc = private()
    train(tc, 3)
    sealed = service.pull_artifact(tc.save_state().artifact_id, to=tmp_path / "sealed.bin")
    expected = spent(tc)
    source = tmp_path / "home" / "keys"
    monkeypatch.setenv("TENSAFE_HOME", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    import shutil

    shutil.copytree(source, tmp_path / "elsewhere" / "keys")
    with tn.ServiceClient() as other:
        restored = other.restore(other.push_artifact(sealed).artifact_id)
        assert train(restored, 1)[-1].total_epsilon == pytest.approx(tc.what_if(steps=4).epsilon)
        assert expected < spent(restored)


def test_a_step_without_noise_needs_the_guarantee_given_up_and_then_epsilon_is_infinite_for_good(
    private: Private,
) -> None:
    tc = private(target_epsilon=4.0)
    (draw,) = tc.dp_batches(ROWS, steps=1)
    tc.forward_backward(draw)
    with pytest.raises(tn.ValidationError, match="void_privacy"):
        tc.optim_step(apply_dp_noise=False).result()
    with pytest.raises(tn.ValidationError, match="say why"):
        tc.void_privacy(" ")
    assert tc.void_privacy("public data").total_epsilon == math.inf
    tc.forward_backward(draw)
    step = tc.optim_step(apply_dp_noise=False).result()
    assert step.dp_metrics is not None and not step.dp_metrics.noise_applied
    saved = tc.save_state().result()
    train(tc, 2), tc.load_state(saved.artifact_id).result()
    statement = tc.privacy_statement()
    assert statement.epsilon is None and statement.void[0][0] == "public data"
    assert "public data" in statement.to_markdown()
    assert events(tc)[-1].void == "public data"


def test_nothing_without_noise_is_in_a_private_checkpoint(private: Private) -> None:
    tc = private()
    train(tc, 1)
    (draw,) = tc.dp_batches(ROWS, steps=1)
    if not len(draw):
        (draw,) = tc.dp_batches(ROWS, steps=1)
    tc.forward_backward(draw).result()
    saved = tc.save_state().result()
    assert saved.dropped_batches == 1
    tc.load_state(saved.artifact_id).result()
    with pytest.raises(tn.ValidationError, match="no gradients"):
        tc.optim_step().result()


def test_batches_of_ones_own_are_accounted_for_by_the_ids_they_bring(private: Private) -> None:
    tc = private(sampling="worst_case", dataset_size=None, expected_batch_size=4)
    run = tc.fit(tc.batches(ROWS), epochs=2, show=False)
    assert run.result().state == "FINISHED"
    assert tc.dp_metrics is not None
    assert tc.dp_metrics.total_epsilon == pytest.approx(
        6.57, abs=0.01
    )  # each example in two steps at sigma 1
    with pytest.raises(tn.errors.PrivacyUnitError, match="do not say whose they are"):
        tc.forward_backward(tn.BatchData([[3, 4, 5]])).result()


def test_one_persons_rows_are_drawn_and_clipped_together(private: Private) -> None:
    tc = private(dataset_size=10)
    people = [n % 10 for n in range(len(ROWS))]
    for draw in tc.dp_batches(ROWS, steps=6, unit_ids=people):
        assert len(draw) % 4 == 0, "each person has four rows"
        tc.forward_backward(draw), tc.optim_step().result()
    assert tc.privacy_statement().unit == "user"


def test_the_declared_size_is_what_counts_and_a_far_one_is_warned_of(
    private: Private, caplog: pytest.LogCaptureFixture
) -> None:
    tc = private(dataset_size=400)
    draws = tc.dp_batches(ROWS, steps=1)
    assert draws.sample_rate == 4 / 400
    assert "dataset_size=400" in caplog.text
    private(target_delta=0.1).tokenizer  # noqa: B018  # it is there
    assert "target_delta=0.1" in caplog.text
    with pytest.raises(tn.ValidationError, match="needs dataset_size"):
        tn.DPConfig()
    for accountant in ("moments", "gdp"):
        with pytest.raises(tn.ValidationError, match="less epsilon than is spent"):
            tn.DPConfig(dataset_size=9, accountant_type=accountant)


def test_draws_and_noise_never_repeat(service: tn.ServiceClient) -> None:
    def first_weights() -> tuple[list[int], torch.Tensor]:
        tc = service.create_training_client(
            model_ref="builtin:sums", seed=3, batch_size=20, dp_config=tn.DPConfig(**DP)
        )
        (draw,) = tc.dp_batches(ROWS, steps=1)
        tc.forward_backward(draw), tc.optim_step().result()
        return draw.input_ids.tolist(), torch.cat([w.flatten() for w in weights(tc)])

    (rows, after), (others, later) = first_weights(), first_weights()
    assert rows != others
    assert not torch.equal(after, later)


def test_the_audit_of_canaries_finds_no_violation(private: Private) -> None:
    for sampling in ({"sampling": "worst_case", "dataset_size": None}, {}):
        audit = private(**sampling).privacy_audit(canaries=500, steps=4)
        assert audit.claimed_mu == 2.0 and not audit.violated
        assert audit.mu > 1.0, "canaries that are in can be seen: the audit measures something"
        assert audit._repr_png_().startswith(b"\x89PNG")


def test_a_process_that_dies_after_paying_has_paid(private: Private, monkeypatch: pytest.MonkeyPatch) -> None:
    tc = private()
    train(tc, 1)
    before = weights(tc)
    engine = engine_of(tc)

    def die(*_: Any) -> Any:
        raise MemoryError("as if killed between the ledger and the step")

    monkeypatch.setattr(engine.training_step.sum, "release", die)
    (draw,) = tc.dp_batches(ROWS, steps=1)
    tc.forward_backward(draw)
    with pytest.raises(tn.TGTinkerError):
        tc.optim_step().result()
    assert all(torch.equal(a, b) for a, b in zip(weights(tc), before, strict=True))
    assert spent(tc) == pytest.approx(tc.what_if(steps=2).epsilon)


def test_the_audit_log_has_a_record_for_each_charge_and_verifies(
    service: tn.ServiceClient, private: Private
) -> None:
    train(private(), 3)
    charges = service.get_audit_logs(operation="dp_charge")
    assert len(charges) == 3
    newest = charges[0].dp_metrics
    assert newest is not None and newest["total_epsilon"] > 0 and newest["grad_norm_before_clip"] is None
    assert service.verify_audit_log().ok


def test_a_full_fine_tuning_trains_privately_too(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(model_ref="builtin:sums", batch_size=4, dp_config=tn.DPConfig(**DP))
    assert train(tc, 2)[-1].noise_applied


def test_what_if_answers_both_ways(private: Private) -> None:
    tc = private()
    plan = tc.what_if(epochs=3, noise_multiplier=1.2)
    back = tc.what_if(epochs=3, target_epsilon=plan.epsilon)
    assert back.noise_multiplier == pytest.approx(1.2, rel=0.01)
    assert (plan.dataset_size, plan.expected_batch_size, plan.steps) == (40, 4, 30)
    tc.tokenizer  # noqa: B018  # the model is there now
    assert (tc.what_if(epochs=1).noise_to_signal or 0) > 0


# reinforcement learning


def test_reinforcement_learning_takes_the_prompt_as_its_unit(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(
        model_ref="builtin:sums",
        lora_config=tn.LoRAConfig(rank=2),
        batch_size=4,
        dp_config=tn.DPConfig(sampling="worst_case", target_epsilon=None, noise_multiplier=1.0),
    )
    prompts = tn.datasets.sums(12, seed=0)
    algo = tn.rlvr.REINFORCE(baseline="rloo", mask_truncated=False)
    trainer = tn.rlvr.RLVRTrainer(
        tc,
        prompts,
        "exact_match",
        algo,
        prompts_per_step=4,
        group_size=4,
        max_new_tokens=4,
        reward_timeout=None,
    )
    result = trainer.run(steps=6, show=False).result()
    assert result.steps == 6, "no step is skipped"
    statement = tc.privacy_statement()
    assert statement.unit == "prompt group"
    assert statement.epsilon == pytest.approx(6.57, abs=0.01), "twelve prompts, twice each"


@pytest.mark.parametrize(
    ("algo", "reason"),
    [
        (lambda: tn.rlvr.REINFORCE(baseline="ema"), "couples prompts"),
        (lambda: tn.rlvr.PPO("grpo", scale="batch"), "scale='batch'"),
        (lambda: tn.rlvr.REINFORCE(baseline="rloo", aggregation="token_mean"), "choose 'const' or 'sum'"),
        (lambda: tn.rlvr.PPO("dr_grpo", ppo_epochs=2), "one pass"),
    ],
)
def test_options_that_couple_prompts_or_release_twice_are_refused(
    service: tn.ServiceClient, algo: Any, reason: str
) -> None:
    dp = tn.DPConfig(sampling="worst_case")
    tc = service.create_training_client(
        model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=2), dp_config=dp
    )
    batch = tn.rlvr.PolicySampler(tc, 4, 4, seed=0).generate_trajectories(["12+34=", "7+5="])
    for number, trajectory in enumerate(batch):
        trajectory.reward = float(number % 2)
    with pytest.raises(tn.ValidationError, match=reason):
        algo().update(batch, tc)
    assert tc.step == 0
