"""No run trains at a learning rate of 0 unsaid: a plan that would is refused, and what could not be known is told."""

from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.rlvr import PPO, RLVRTrainer

BATCHES = [tn.BatchData([[5, 6, 7, n]]) for n in range(8, 18)]


def client(service: tn.ServiceClient, **fields: Any) -> tn.TrainingClient:
    optimizer = {"learning_rate": 1e-3, "schedule": "linear", "total_steps": 4} | fields.pop("optimizer", {})
    return service.create_training_client(lora_config=tn.LoRAConfig(rank=2), optimizer=optimizer, **fields)


@pytest.mark.parametrize(
    ("plan", "fields"),
    [
        ({"steps": 5}, {}),
        ({"epochs": 1}, {}),
        ({"epochs": 2}, {"gradient_accumulation_steps": 3}),
        ({"steps": 5}, {"optimizer": {"schedule": "cosine", "warmup_steps": 2}}),
    ],
)
def test_a_run_longer_than_its_schedule_is_refused_with_the_line_that_changes_it(
    service: tn.ServiceClient, plan: dict[str, int], fields: dict[str, Any]
) -> None:
    tc = client(service, **fields)
    with pytest.raises(
        tn.ValidationError, match=r"would train at learning rate 0.*total_steps=4.*total_steps=\d+"
    ):
        tc.fit(BATCHES, show=False, **plan)
    assert tc.step == 0 and tc.runs == ()


def test_a_run_as_long_as_its_schedule_and_an_accumulated_one_are_fine(service: tn.ServiceClient) -> None:
    tc = client(service, gradient_accumulation_steps=3)
    result = tc.fit(BATCHES, epochs=1, show=False).result()
    assert (result.steps, result.reason, tc.history.alarms) == (4, None, [])
    assert tc.history["learning_rate"].min() > 0


def test_a_second_run_is_counted_from_where_the_client_stands_and_the_remedy_works(
    service: tn.ServiceClient,
) -> None:
    tc = client(service)
    tc.fit(BATCHES, steps=3, show=False).result()
    with pytest.raises(tn.ValidationError, match=r"2 of the 3 steps.*or ask for 1 steps"):
        tc.fit(BATCHES, steps=3, show=False)
    longer = service.restore(tc.save_state().artifact_id, optimizer={"total_steps": 6})
    assert longer.fit(BATCHES, steps=3, show=False).result().reason is None
    assert longer.history["learning_rate"].min() > 0


def test_a_generator_that_outlasts_the_schedule_is_told_once_and_in_the_result(
    service: tn.ServiceClient,
) -> None:
    tc = client(service)
    result = tc.fit((batch for batch in BATCHES), show=False).result()
    assert "6 steps were taken at learning rate 0" in result.reason
    (alarm,) = tc.history.alarms
    assert (alarm.name, alarm.level, alarm.step) == ("schedule_over", "red", 5)
    assert "linear schedule ended with step 4" in alarm.message and "restore" in alarm.remedy


def test_a_run_that_ends_within_its_warm_up_is_told_at_its_first_step(service: tn.ServiceClient) -> None:
    optimizer = {"schedule": "constant", "total_steps": None, "warmup_steps": 100}
    tc = client(service, optimizer=optimizer)
    tc.fit(BATCHES, epochs=1, show=False).result()
    (alarm,) = tc.history.alarms
    assert (alarm.name, alarm.step) == ("warmup", 1)
    assert "never reaches more than 10%" in alarm.message


def test_runs_with_rewards_are_held_to_the_schedule_too(service: tn.ServiceClient) -> None:
    optimizer = {"learning_rate": 1e-5, "schedule": "linear", "total_steps": 2}
    tc = service.create_training_client(model_ref="builtin:sums", optimizer=optimizer)
    reward = lambda prompt, response, meta=None: float(sum(map(ord, response)) % 7)  # noqa: E731
    trainer = RLVRTrainer(
        tc,
        tn.datasets.sums(8, seed=0),
        reward,
        prompts_per_step=2,
        group_size=2,
        max_new_tokens=4,
        reward_timeout=None,
    )
    with pytest.raises(
        tn.ValidationError, match=r"1 of the 3 steps of this run would train at learning rate 0"
    ):
        trainer.run(steps=3, show=False)


def test_every_step_of_an_update_at_rate_0_is_counted(service: tn.ServiceClient) -> None:
    optimizer = {"learning_rate": 1e-6, "schedule": "linear", "total_steps": 3}
    tc = service.create_training_client(model_ref="builtin:sums", optimizer=optimizer)
    trainer = RLVRTrainer(
        tc,
        tn.datasets.sums(8, seed=0),
        lambda prompt, response, meta=None: float(sum(map(ord, response)) % 7),
        PPO("grpo", ppo_epochs=2),
        prompts_per_step=2,
        group_size=4,
        max_new_tokens=4,
        reward_timeout=None,
    )
    result = trainer.run(steps=3, show=False).result()
    assert (tc.history["learning_rate"] == 0).sum() == 3
    assert "3 steps were taken at learning rate 0" in result.reason


@pytest.mark.parametrize(
    ("plan", "why"),
    [({}, "can be iterated only once"), ({"epochs": 1}, "epochs=1 asked for no further pass")],
)
def test_batches_that_end_before_the_steps_are_told_with_the_true_cause_at_the_last_step(
    service: tn.ServiceClient, plan: dict[str, int], why: str
) -> None:
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
    batches = BATCHES[:3] if plan else iter(BATCHES[:3])
    result = tc.fit(batches, steps=5, show=False, **plan).result()
    (alarm,) = tc.history.alarms
    assert (alarm.name, alarm.step) == ("data_ended", 3)
    assert why in alarm.message and why in result.reason


def test_what_evaluates_nothing_is_refused(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
    used = iter(BATCHES)
    list(used)
    with pytest.raises(tn.ValidationError, match="eval_batches is empty"):
        tc.fit(BATCHES, eval_batches=used, show=False)
    both = iter(BATCHES)
    with pytest.raises(tn.ValidationError, match="one generator"):
        tc.fit(both, eval_batches=both, show=False)


def test_several_passes_over_a_generator_are_refused_before_anything_is_trained(
    service: tn.ServiceClient,
) -> None:
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
    run = tc.fit((batch for batch in BATCHES), epochs=2, show=False)
    with pytest.raises(tn.ValidationError, match="iterated only once"):
        run.result()
    assert tc.step == 0


@pytest.mark.parametrize(
    ("optimizer", "private", "advice"),
    [
        ({}, False, "Set max_grad_norm"),
        ({"max_grad_norm": 1.0}, False, "max_grad_norm=1 has scaled it down"),
        ({}, True, "Rows are clipped"),
    ],
)
def test_the_advice_against_large_gradients_is_true_of_how_it_trains(
    optimizer: dict[str, Any], private: bool, advice: str
) -> None:
    from tensafe_nb.runs.alarms import StepAlarms

    alarms = StepAlarms(tn.OptimizerConfig(**optimizer), private=private)
    for step in range(20):
        alarms.observe("tc-1/1", step, {"grad_norm": 1.0})
    (alarm,) = alarms.observe("tc-1/1", 20, {"grad_norm": 50.0})
    assert advice in alarm.remedy
