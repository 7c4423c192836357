"""RLVRTrainer and the guide's loop, on the built-in model that half knows how to add."""

import math
import threading
from itertools import islice

import pytest

from tensafe_nb import datasets
from tensafe_nb.service import ServiceClient
from tensafe_nb.config import LoRAConfig, OptimizerConfig, TrainingConfig
from tensafe_nb.errors import RewardError, ValidationError
from tensafe_nb.events import Metrics, RunState
from tensafe_nb.rlvr import (
    REINFORCE,
    MockRolloutSampler,
    PolicySampler,
    REINFORCEConfig,
    RLVRTrainer,
    resolve_reward,
)
from tensafe_nb.rlvr.trainer import PromptCursor

CONFIG = TrainingConfig(
    model_ref="builtin:sums", lora_config=LoRAConfig(rank=4), optimizer=OptimizerConfig(learning_rate=1e-3)
)
SUMS = datasets.sums(8, seed=0)
SMALL = {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 4}


@pytest.fixture
def client(service):
    return service.create_training_client(CONFIG)


def rows(client):
    """The metric rows of the trainer, the worker's own left out."""
    return [e for e in client.history.events() if isinstance(e, Metrics) and not {"loss"} & set(e.values)]


def train(client, reward="exact_match", steps=3, **options):
    return RLVRTrainer(client, SUMS, reward, **SMALL | options).run(steps=steps, show=False)


# prompts


def test_every_prompt_is_dealt_once_before_any_comes_again():
    cursor = PromptCursor([f"p{n}" for n in range(5)], count=3, seed=0)
    dealt = [prompt for _ in range(5) for prompt in cursor.take()]
    epochs = [dealt[start : start + 5] for start in (0, 5, 10)]
    assert all(sorted(epoch) == ["p0", "p1", "p2", "p3", "p4"] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_order_of_prompts_depends_on_the_seed_and_the_position_alone():
    def dealt(seed, position=0):
        cursor = PromptCursor([str(n) for n in range(50)], count=10, seed=seed)
        cursor.position = position
        return cursor.take()

    assert dealt(0) == dealt(0) != dealt(1)
    going_on = PromptCursor([str(n) for n in range(50)], count=10, seed=0)
    going_on.take()
    assert going_on.take() == dealt(0, position=10)


def test_more_prompts_per_step_than_there_are_takes_several_epochs_at_once():
    assert sorted(PromptCursor(["a", "b"], count=5, seed=0).take())[1:4] in (["a", "a", "b"], ["a", "b", "b"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts_per_step": 0}, "at least one prompt"),
        ({"reward": "exact_macth"}, "exact_match"),
        ({"eval_every": 5}, "eval_prompts"),
        ({"eval_prompts": SUMS, "eval_every": 0}, "≥ 1"),
        ({"eval_prompts": [3]}, "A prompt is"),
        ({"group_size": 0}, "num_samples"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_runs(changes, message):
    options = {"training_client": None, "prompts": SUMS, "reward": "exact_match"} | changes
    with pytest.raises(ValidationError, match=message):
        RLVRTrainer(**options)


# runs


def test_a_run_publishes_one_row_per_step_with_everything_measured(client):
    run = train(client)
    assert run.result(60).steps == 3
    steps = rows(client)
    assert [row.step for row in steps] == [1, 2, 3]
    assert {row.run_id for row in steps} == {run.run_id}
    assert set(steps[-1].values) == {
        "reward", "reward_std", "group/reward_std", "frac_reward_zero_std", "rewards/errors",
        "completions/mean_length", "completions/clipped_ratio", "entropy", "entropy_sampled", "num_tokens",
        "time/sample", "time/reward", "time/update",
    }  # fmt: skip
    values = steps[-1].values
    assert 0 <= values["reward"] <= 1
    assert values["num_tokens"] == 3 * 16 * (6 + 4)  # prompts of 6 characters, answers of 3 and an end
    assert values["completions/mean_length"] == 4
    assert values["completions/clipped_ratio"] == 0
    assert {"loss", "grad_norm", "param_delta_norm", "learning_rate"} <= set(client.history.names)


def test_the_same_seed_gives_the_same_run():
    def rewards():
        with ServiceClient() as service:
            client = service.create_training_client(CONFIG)
            train(client, seed=5).result(60)
            return client.history["reward"].tolist(), client.history["loss"].tolist()

    assert rewards() == rewards()


def test_a_second_run_of_a_trainer_goes_on_with_the_next_prompts(client):
    seen = []
    trainer = RLVRTrainer(client, SUMS, lambda prompt, response: seen.append(prompt) or 1.0, **SMALL)
    for _ in range(2):
        trainer.run(steps=1, show=False).result(60)
    assert len(set(seen[:16]) | set(seen[16:])) == 8


def test_held_out_prompts_are_evaluated_before_during_and_after(client):
    train(client, steps=5, eval_prompts=datasets.sums(6, seed=1, split="heldout"), eval_every=2).result(60)
    for name in ("eval/reward", "eval/greedy"):
        steps, values = client.history.series(name)
        assert steps.tolist() == [0, 2, 4, 5]
        assert all(0 <= value <= 1 for value in values)
    assert len(client.history["reward"]) == 5


def test_evaluating_twice_measures_the_same_and_more_samples_give_pass_at_k(client):
    trainer = RLVRTrainer(
        client,
        SUMS,
        "exact_match",
        eval_prompts=datasets.sums(50, seed=1, split="heldout"),
        eval_samples=8,
        **SMALL,
    )
    first = trainer.evaluate()
    assert first == trainer.evaluate()
    assert 0.2 < first["eval/reward"] < first["eval/greedy"] < first["eval/pass@8"] <= 1


def test_evaluating_without_held_out_prompts_says_what_is_missing(client):
    with pytest.raises(ValidationError, match="eval_prompts"):
        RLVRTrainer(client, SUMS, "exact_match", **SMALL).evaluate()


def test_a_step_without_signal_publishes_that_nothing_moved_and_takes_none(client):
    run = train(client, reward=lambda prompt, response: 1.0, steps=2)
    assert run.result(60).steps == 0
    row = rows(client)[-1]
    assert (row.step, row.values["grad_norm"], row.values["param_delta_norm"]) == (2, 0.0, 0.0)
    assert (row.values["frac_reward_zero_std"], row.values["reward"]) == (1.0, 1.0)
    assert "entropy" not in row.values


def test_a_reward_that_sometimes_fails_is_counted_and_the_run_goes_on(client):
    calls = iter(range(1000))

    def flaky(prompt, response, meta=None):
        return 1 / 0 if next(calls) % 4 == 0 else float(len(set(response)))

    train(client, flaky, steps=2).result(60)
    assert client.history["rewards/errors"].tolist() == [4, 4]
    assert not any(math.isnan(value) for value in client.history["reward"])


def test_a_reward_that_always_fails_ends_the_run_with_its_error(client):
    run = train(client, lambda prompt, response: {}["answer"])
    with pytest.raises(RewardError, match="KeyError: 'answer'"):
        run.result(60)
    assert run.state == "FAILED"
    assert client.step == 0


def test_a_run_can_be_paused_stepped_and_stopped(client):
    paused = threading.Event()
    client.subscribe(lambda event: isinstance(event, RunState) and event.state == "PAUSED" and paused.set())
    run = train(client, steps=1000)
    run.pause()
    assert paused.wait(60)
    done = run.steps_done
    paused.clear()
    run.step(2)
    assert paused.wait(60)
    assert run.steps_done == done + 2
    run.stop()
    assert run.result(60).state == "STOPPED"
    assert client.sample("12+34=", max_new_tokens=1).result(60).texts


def test_the_algorithm_can_be_any_object_that_updates(client):
    batches = []

    class Watching(REINFORCE):
        def update(self, batch, training_client):
            batches.append(batch)
            return super().update(batch, training_client)

    train(client, steps=3, algo=Watching(baseline="group", scale="group", aggregation="token_mean")).result(
        60
    )
    versions = [[group.policy_version for group in batch.groups] for batch in batches]
    assert versions == [[0] * 4, [1] * 4, [2] * 4]  # every sample saw the update before it


# the guide's loop


@pytest.mark.parametrize("mock", [True, False], ids=["MockRolloutSampler", "PolicySampler"])
def test_the_guides_loop_runs_as_written(mock, service, capsys):
    training_client = service.create_training_client(model_ref="builtin:tiny")

    reward_fn = resolve_reward("keyword_contains", keywords=["solution", "answer"])
    algo = REINFORCE(REINFORCEConfig(use_baseline=True, normalize_advantages=True, entropy_coef=0.01))
    sampler = (
        MockRolloutSampler(max_new_tokens=64) if mock else PolicySampler(training_client, max_new_tokens=64)
    )
    prompts = ["Solve the equation x + 2 = 5", "What is 3 * 4?"]

    for _epoch in range(10 if mock else 2):
        batch = sampler.generate_trajectories(prompts)
        for traj in batch:
            traj.reward = reward_fn(traj.prompt, traj.response)

        result = algo.update(batch, training_client)
        print(f"Mean reward: {batch.mean_reward:.3f}")

    assert result.notes == (("off-policy: mock data",) if mock else ())
    assert result.approx_kl == 0
    assert result.param_delta_norm > 0
    assert result.step == training_client.step == (10 if mock else 2)
    printed = capsys.readouterr().out.splitlines()
    assert all(-0.5 <= float(line.removeprefix("Mean reward: ")) <= 1 for line in printed)


def test_what_is_submitted_after_an_update_sees_the_updated_weights(client):
    sampler = PolicySampler(client, group_size=4, max_new_tokens=4)
    batch = sampler.generate_trajectories(["12+34="])
    for number, trajectory in enumerate(batch):
        trajectory.reward = float(number % 2)
    update = REINFORCE().update(batch, client)
    later = sampler.submit(["12+34="])  # before anything was awaited
    assert [trajectory.policy_version for trajectory in islice(later.result(60), 1)] == [1]
    assert update.policy_version == 1


@pytest.mark.parametrize("algo", ["reinforce", REINFORCE])
def test_what_is_no_algorithm_is_refused_at_once(client, algo):
    with pytest.raises(ValidationError, match="algo is an algorithm such as REINFORCE"):
        RLVRTrainer(client, SUMS, "exact_match", algo, **SMALL)


def test_prompts_may_come_from_a_generator(client):
    trainer = RLVRTrainer(client, (row for row in SUMS), "exact_match", **SMALL)
    assert trainer.run(steps=1, show=False).result(60).state == "FINISHED"
