"""RLVRTrainer and the guide's loop, on the built-in model that half knows how to add."""

import contextlib
import math
import threading
from itertools import islice

import numpy as np
import pytest

from tensafe_nb import datasets
from tensafe_nb.config import LoRAConfig, OptimizerConfig, TrainingConfig
from tensafe_nb.errors import NonFiniteLossError, RewardError, ValidationError
from tensafe_nb.events import Alarm, ArtifactDeleted, CheckpointSaved, Metrics, Rollouts, RunState
from tensafe_nb.protocol.codec import decode, encode
from tensafe_nb.rlvr import (
    PPO,
    REINFORCE,
    MockRolloutSampler,
    Part,
    PolicySampler,
    REINFORCEConfig,
    RLVRTrainer,
    TrajectoryBatch,
    resolve_reward,
)
from tensafe_nb.service import ServiceClient

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


def events(client, kind):
    return [event for event in client.history.events() if isinstance(event, kind)]


def stored(client):
    """The rollouts of each step, as they are on the disk."""
    return [TrajectoryBatch.load(client.history.rollouts_file(event)) for event in events(client, Rollouts)]


def trainer_of(client, reward="exact_match", **options):
    """A trainer that calls functions of a test in the test's own process, unless told otherwise."""
    return RLVRTrainer(client, SUMS, reward, **SMALL | {"reward_timeout": None} | options)


def train(client, reward="exact_match", steps=3, **options):
    return trainer_of(client, reward, **options).run(steps=steps, show=False)


@pytest.fixture
def paused(client):
    """An event that is set whenever a run of the client has come to rest."""
    happened = threading.Event()
    client.subscribe(lambda event: isinstance(event, RunState) and event.state == "PAUSED" and happened.set())
    return happened


def checksum(prompt, response, meta=None):
    """A reward without a meaning that differs from answer to answer."""
    return float(sum(map(ord, response)) % 7)


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


def alarms_named(name, client):
    """The levels at which a trouble was announced; a learning rate of 1e-3 is loud enough for others."""
    return [alarm.level for alarm in events(client, Alarm) if alarm.name == name]


def test_a_run_publishes_one_row_per_step_with_everything_measured(client):
    run = train(client)
    assert run.result().steps == 3
    steps = rows(client)
    assert [row.step for row in steps] == [1, 2, 3]
    assert {row.run_id for row in steps} == {run.run_id}
    assert set(steps[0].values) == {
        "reward", "reward_std", "group/reward_std", "frac_reward_zero_std",
        "by_group/frac_mixed", "by_group/frac_all_good", "by_group/frac_all_bad",
        "rewards/exact_match/mean", "rewards/exact_match/std", "rewards/exact_match/errors",
        "rewards/exact_match/timeouts", "reward_version",
        "completions/mean_length", "completions/min_length", "completions/max_length",
        "completions/mean_terminated_length", "completions/clipped_ratio", "completions/masked_ratio",
        "entropy", "entropy_sampled", "entropy_trained", "staleness/mean", "staleness/max",
        "policy/approx_kl", "policy/epochs_run", "policy_version",
        "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max",
        "sampling/importance_sampling_ratio/min", "sampling/importance_sampling_ratio/mean",
        "sampling/importance_sampling_ratio/max", "sampling/mismatch_kl", "policy/log_ratio_max",
        "num_tokens", "time/sample", "time/reward", "time/update", "time/total",
    }  # fmt: skip
    measured_now_and_then = {"policy/approx_kl", "policy/log_ratio_max"}  # updates as small as these
    assert set(steps[0].values) - set(steps[-1].values) == measured_now_and_then
    values = steps[-1].values
    assert 0 <= values["reward"] <= 1
    assert values["reward_version"] == 1
    assert values["policy_version"] == 3
    assert values["sampling/sampling_logp_difference/mean"] < 1e-4
    assert values["time/total"] >= values["time/sample"] + values["time/update"]
    assert values["num_tokens"] == 3 * 16 * (6 + 4)  # prompts of 6 characters, answers of 3 and an end
    assert values["completions/mean_length"] == 4
    assert values["completions/clipped_ratio"] == 0
    assert {"loss", "grad_norm", "param_delta_norm", "learning_rate"} <= set(client.history.names)


def test_the_same_seed_gives_the_same_run():
    def rewards():
        with ServiceClient() as service:
            client = service.create_training_client(CONFIG)
            train(client, seed=5).result()
            return client.history["reward"].tolist(), client.history["loss"].tolist()

    assert rewards() == rewards()


def test_a_second_run_of_a_trainer_goes_on_with_the_next_prompts(client):
    seen = []
    trainer = trainer_of(client, lambda prompt, response: seen.append(prompt) or 1.0)
    for _ in range(2):
        trainer.run(steps=1, show=False).result()
    assert len(set(seen[:16]) | set(seen[16:])) == 8


def test_held_out_prompts_are_evaluated_before_during_and_after(client):
    train(client, steps=5, eval_prompts=datasets.sums(6, seed=1, split="heldout"), eval_every=2).result()
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


def test_held_out_answers_are_measured_part_by_part_and_passed_by_the_true_one(client):
    def form(prompt, response, meta=None):
        return float(len(response) == 3)

    def measured(weight):
        parts = [Part("exact_match", weight=1 - weight, true=True), Part(form, weight=weight)]
        reward = resolve_reward("composite", parts=parts)
        held_out = {"eval_prompts": datasets.sums(30, seed=1, split="heldout"), "eval_samples": 4}
        return RLVRTrainer(client, SUMS, reward, **held_out, **SMALL).evaluate()

    exact, mostly_form = measured(0.0), measured(0.6)
    for name in (
        "eval/pass@1",
        "eval/pass@2",
        "eval/pass@4",
        "eval/rewards/exact_match",
        "eval/rewards/true",
    ):
        assert mostly_form[name] == pytest.approx(exact[name])
    assert mostly_form["eval/rewards/form"] > mostly_form["eval/rewards/exact_match"]
    assert mostly_form["eval/reward"] > exact["eval/reward"]


def test_the_ks_of_pass_at_k_are_checked_before_anything_runs(client):
    with pytest.raises(ValidationError, match="eval_samples=2"):
        RLVRTrainer(client, SUMS, "exact_match", eval_prompts=SUMS, eval_samples=2, eval_pass_at=[4], **SMALL)


@pytest.mark.parametrize("threshold", [math.nan, "half"])
def test_a_threshold_is_a_number(client, threshold):
    with pytest.raises(ValidationError, match="good_threshold"):
        RLVRTrainer(client, SUMS, "exact_match", good_threshold=threshold, **SMALL)


def test_what_belonged_to_the_old_reward_is_forgotten_when_another_one_scores(client):
    trainer = RLVRTrainer(client, SUMS, checksum, REINFORCE("reinforce"), **SMALL)
    trainer.run(steps=3, show=False).result(60)
    assert trainer.algo.ema.updates == 3
    memory = trainer.alarms.memory
    assert len(memory.last_rewards) == 3 and memory.signals
    trainer.run(steps=1, show=False).result(60)
    assert trainer.algo.ema.updates == 4, "the same function goes on where it was"
    trainer.set_reward(lambda prompt, response: 1000.0 + len(response))
    assert trainer.algo.ema.updates == 4, "until it scores, the old one counts"
    trainer.run(steps=1, show=False).result(60)
    assert trainer.algo.ema.updates == 1
    assert trainer.algo.ema.value > 1000
    assert memory.lowest >= 1000 and len(memory.last_rewards) == 1


def test_a_checkpoint_knows_which_reward_its_baseline_is_of(client):
    trainer = RLVRTrainer(client, SUMS, checksum, REINFORCE("reinforce"), **SMALL)
    trainer.run(steps=2, show=False).result(60)
    position = trainer.position()
    for reward, updates in ((checksum, 3), (broken_off, 1)):
        again = RLVRTrainer(client, SUMS, reward, REINFORCE("reinforce"), **SMALL)
        again.seek(decode(encode(position)))
        again.run(steps=1, show=False).result(60)
        assert again.algo.ema.updates == updates
    old = {name: value for name, value in position.items() if name != "scored_by"}  # as 0.1 wrote it
    again = RLVRTrainer(client, SUMS, checksum, REINFORCE("reinforce"), **SMALL)
    again.seek(old)
    again.run(steps=1, show=False).result(60)
    assert again.algo.ema.updates == 3


def broken_off(prompt, response, meta=None):
    return float(len(response))


def test_a_policy_in_bfloat16_on_a_cpu_is_named_at_the_first_step_with_its_price_and_remedy(service):
    client = service.create_training_client(CONFIG.replace(dtype="bfloat16"))
    train(client, steps=2).result(60)
    (alarm,) = (event for event in events(client, Alarm) if event.name == "low_precision")
    assert alarm.step == 1
    assert f"{rows(client)[0].values['sampling/sampling_logp_difference/mean']:.2g} nats" in alarm.message
    assert 'dtype="float32"' in alarm.remedy
    assert (client.refresh().device, client.refresh().precision) == ("cpu", "bfloat16")


def test_a_policy_in_float32_has_nothing_to_say_about_its_precision(client):
    train(client, steps=1).result(60)
    assert alarms_named("low_precision", client) == []
    assert client.refresh().precision == "float32"


def test_evaluating_without_held_out_prompts_says_what_is_missing(client):
    with pytest.raises(ValidationError, match="eval_prompts"):
        RLVRTrainer(client, SUMS, "exact_match", **SMALL).evaluate()


def test_a_step_without_signal_publishes_that_nothing_moved_and_takes_none(client):
    run = train(client, reward=lambda prompt, response: 1.0, steps=2)
    assert run.result().steps == 0
    row = rows(client)[-1]
    assert (row.step, row.values["grad_norm"], row.values["param_delta_norm"]) == (2, 0.0, 0.0)
    assert (row.values["frac_reward_zero_std"], row.values["reward"]) == (1.0, 1.0)
    assert row.values["entropy"] > 0, "what was sampled has one, whether it teaches or not"
    assert not {"entropy_trained", "policy/approx_kl"} & set(row.values)


def test_a_reward_that_sometimes_fails_is_counted_and_the_run_goes_on(client):
    calls = iter(range(1000))

    def flaky(prompt, response, meta=None):
        return 1 / 0 if next(calls) % 4 == 0 else float(len(set(response)))

    train(client, flaky, steps=2).result()
    assert client.history["rewards/flaky/errors"].tolist() == [4, 4]
    assert alarms_named("reward_errors", client) == ["amber"]
    assert not any(math.isnan(value) for value in client.history["reward"])


def test_a_reward_that_always_fails_ends_the_run_with_its_error(client):
    run = train(client, lambda prompt, response: {}["answer"])
    with pytest.raises(RewardError, match="KeyError: 'answer'"):
        run.result()
    assert run.state == "FAILED"
    assert client.step == 0


def test_a_run_can_be_paused_stepped_and_stopped(client, paused):
    run = train(client, steps=1000)
    run.pause()
    assert paused.wait()
    done = run.steps_done
    paused.clear()
    run.step(2)
    assert paused.wait()
    assert run.steps_done == done + 2
    run.stop()
    assert run.result().state == "STOPPED"
    assert client.sample("12+34=", max_new_tokens=1).result().texts


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


# rollouts on the disk


def test_every_step_leaves_its_rollouts_on_the_disk_with_rewards_and_advantages(client):
    run = train(client, checksum, steps=2)
    run.result()
    found = events(client, Rollouts)
    assert [(event.run_id, event.step, event.rollouts) for event in found] == [
        (run.run_id, 1, 16),
        (run.run_id, 2, 16),
    ]
    batch = stored(client)[-1]
    assert batch.mean_reward == client.history["reward"][-1]
    assert [len(group.rollouts) for group in batch.groups] == [4] * 4
    assert any(trajectory.advantage for trajectory in batch)
    assert {trajectory.policy_version for trajectory in batch} == {1}


def test_the_rollouts_of_a_step_that_could_not_be_scored_are_there_to_look_at(client):
    with pytest.raises(RewardError):
        train(client, lambda prompt, response: {}["answer"]).result()
    (batch,) = stored(client)
    assert {trajectory.reward_error for trajectory in batch} == {"KeyError: 'answer'"}


# rewards that fail, and others in their place


def broken(prompt, response, meta=None):
    raise ZeroDivisionError("no")


def test_a_reward_that_fails_on_more_than_half_pauses_the_run_until_it_is_mended(client, paused):
    trainer = trainer_of(client, checksum)
    run = trainer.run(steps=4, show=False)
    run.pause()
    assert paused.wait()
    paused.clear()
    trainer.set_reward(broken)
    done = run.steps_done
    run.resume()
    assert paused.wait()
    assert run.steps_done == done + 1, "the step without a reward counts, and takes no update"
    (alarm,) = (alarm for alarm in events(client, Alarm) if alarm.name == "reward_errors")
    assert (alarm.level, alarm.step) == ("red", done + 1)
    assert "failed on 16 of 16" in alarm.message
    assert "ZeroDivisionError: no" in alarm.message
    row = rows(client)[-1].values
    assert not {"reward", "entropy_trained", "policy/approx_kl"} & set(row)
    assert row["rewards/broken/errors"] == 16
    trainer.set_reward(checksum)
    run.resume()
    assert run.result().state == "FINISHED"
    assert client.step == 3


def test_a_reward_that_fails_on_most_rollouts_still_trains_on_the_rest_before_the_pause(client, paused):
    calls = iter(range(1000))

    def mostly_broken(prompt, response, meta=None):
        return checksum(prompt, response) if next(calls) % 4 == 0 else 1 / 0

    run = train(client, mostly_broken, algo=REINFORCE(baseline="none"), steps=3)
    assert paused.wait()
    assert (run.steps_done, client.step) == (1, 1)
    run.stop()
    run.result()


def test_a_script_that_nobody_watches_fails_instead_of_waiting_for_ever(client):
    calls = iter(range(1000))
    run = train(
        client, lambda prompt, response: 1.0 if next(calls) % 4 == 0 else 1 / 0, on_reward_errors="fail"
    )
    with pytest.raises(RewardError, match=r"75% of the rollouts of step 1.*ZeroDivisionError"):
        run.result()


def test_another_reward_takes_over_and_the_row_says_where(client, paused):
    trainer = trainer_of(client, checksum)
    run = trainer.run(steps=5, show=False)
    run.pause()
    assert paused.wait()
    done = run.steps_done
    trainer.set_reward("exact_match")
    paused.clear()
    run.step(1)
    assert paused.wait()
    trainer.set_reward(checksum)
    run.resume()
    run.result()
    versions = client.history["reward_version"].tolist()
    assert versions == [1.0] * done + [2.0] + [1.0] * (4 - done)
    names = [{t.reward_version for t in batch} for batch in stored(client)]
    assert names[done] != names[-1]
    assert client.history["rewards/exact_match/mean"].size == 1


def test_the_best_checkpoint_is_the_best_under_the_present_reward(client, paused):
    trainer = trainer_of(client, lambda prompt, response, meta=None: 100 + checksum(prompt, response))
    run = trainer.run(steps=6, checkpoint_every=1, keep_last=1, keep_best="reward", show=False)
    run.pause()
    assert paused.wait()
    done = run.steps_done
    trainer.set_reward(checksum)
    run.resume()
    run.result()
    saved = {event.step: event.artifact_id for event in events(client, CheckpointSaved)}
    gone = {event.artifact_id for event in events(client, ArtifactDeleted)}
    since = client.history["reward"][done:]
    best = done + 1 + int(since.argmax())
    assert client.history["reward"][:done].min() > since.max()
    assert [step for step, artifact_id in saved.items() if artifact_id not in gone] == sorted({best, 6})


def test_a_run_in_which_no_update_took_a_step_says_so_in_its_result(client):
    result = train(client, lambda prompt, response, meta=None: 1.0, steps=2).result()
    assert (result.steps, result.steps_done) == (0, 2)
    assert (
        "no weight has moved: in 2 of 2 steps no answer scored better or worse than its baseline"
        in result.reason
    )


@pytest.mark.parametrize(("reward", "alarms"), [(checksum, 0), (lambda prompt, response, meta=None: 0.7, 1)])
def test_single_answers_are_without_signal_only_where_the_running_baseline_sees_none(client, reward, alarms):
    trainer = trainer_of(client, reward, algo=REINFORCE("reinforce"), prompts_per_step=8, group_size=1)
    result = trainer.run(steps=5, show=False).result()
    assert len(alarms_named("no_signal", client)) == alarms
    assert (result.steps == 0) == bool(alarms)


def test_held_out_answers_are_scored_by_the_reward_of_their_step(client):
    trainer = trainer_of(client, lambda prompt, response, meta=None: 100.0 + len(response), eval_prompts=SUMS)
    update = trainer.algo.update

    def replaced_meanwhile(batch, policy):
        trainer.set_reward(checksum)
        return update(batch, policy)

    trainer.algo.update = replaced_meanwhile
    trainer.run(steps=1, show=False).result()
    assert client.history["eval/reward"].min() >= 100


def test_stored_rollouts_are_scored_anew_without_sampling_or_training(client):
    trainer = trainer_of(client, lambda prompt, response: 1.0)
    trainer.run(steps=3, show=False).result()
    found = trainer.rescore(last=2, reward=checksum)
    assert found.steps == (2, 3)
    assert len(found.after) == 32
    assert (found.before.frac_zero_signal, found.errors) == (1.0, 0)
    assert found.gained_signal == 1 - found.after.frac_zero_signal > 0
    assert [t.reward for t in found.after] == [checksum(t.prompt, t.response) for t in found.before]
    assert trainer.rescore(last=1).after.mean_reward == 1.0, "the trainer's own reward when none is given"
    assert client.step == 0


def test_rescoring_before_any_run_says_what_to_do(client):
    with pytest.raises(ValidationError, match="start a run first"):
        trainer_of(client).rescore()


def raises_or_hangs(prompt, response, meta=None, *, on, seconds):
    import time

    if prompt == on:
        time.sleep(seconds)
        raise ZeroDivisionError("no")
    return 1.0


@pytest.mark.parametrize(("seconds", "shown"), [(0, "ZeroDivisionError: no"), (60, "longer than 2.5 s")])
def test_a_reward_that_raises_or_hangs_in_its_process_scores_nothing_and_is_seen(client, seconds, shown):
    """B11."""
    reward = resolve_reward(raises_or_hangs, on=SUMS[0]["prompt"], seconds=seconds)
    train(client, reward, steps=1, prompts_per_step=8, group_size=2, reward_timeout=2.5).result()
    batch = stored(client)[0]
    failed = [trajectory for trajectory in batch if trajectory.reward is None]
    assert [trajectory.prompt for trajectory in failed] == [SUMS[0]["prompt"]] * 2
    assert all(shown in trajectory.reward_error for trajectory in failed)
    assert client.history["rewards/raises_or_hangs/errors"].tolist() == [2]
    assert client.history["rewards/raises_or_hangs/timeouts"].tolist() == [2 if seconds else 0]
    assert client.history["reward"].tolist() == [1.0]


# alarms


def huge(prompt, response, meta=None):
    return 1e38 * (sum(map(ord, response)) % 3)


@pytest.mark.parametrize("algo", [REINFORCE(), PPO(ppo_epochs=2)], ids=["REINFORCE", "PPO"])
def test_a_loss_that_is_no_number_ends_the_run_before_any_step_and_names_the_rollouts(client, algo):
    run = train(client, huge, algo=algo)
    with pytest.raises(NonFiniteLossError, match="No weight has moved"):
        run.result()
    assert (client.step, client.policy_version) == (0, 0)
    (alarm,) = [event for event in events(client, Alarm) if event.name == "nan"]
    assert (alarm.level, alarm.run_id, alarm.step) == ("red", run.run_id, 1)
    batch = stored(client)[0]
    assert alarm.rollouts == tuple(np.flatnonzero([bool(t.advantage) for t in batch]))
    assert client.sample("12+34=", max_new_tokens=1).result().texts, "the client lives on"


def test_equal_rewards_sound_the_no_signal_alarm_once(client):
    run = train(client, lambda prompt, response: 1.0, steps=8)
    run.result()
    (alarm,) = events(client, Alarm)
    assert (alarm.name, alarm.level, alarm.step, alarm.run_id) == ("no_signal", "red", 6, run.run_id)
    assert "solved" in alarm.remedy


def test_answers_that_are_all_cut_sound_the_truncation_alarm_and_the_next_run_does_so_again(client):
    trainer = trainer_of(client, checksum, algo=REINFORCE(mask_truncated=False), max_new_tokens=2)
    runs = []
    for _ in range(2):
        runs.append(trainer.run(steps=2, show=False))
        runs[-1].result()
    found = [event for event in events(client, Alarm) if event.name == "truncation"]
    assert [(alarm.run_id, alarm.level) for alarm in found] == [(run.run_id, "red") for run in runs]


# going on


def without_times(row):
    return {name: value for name, value in row.values.items() if not name.startswith("time/")}


def test_a_run_that_was_resumed_has_the_rows_it_would_have_had(client, service):
    """B8, B9: weights, baselines, prompts, seeds, counters, and what the alarms remember."""

    def trainer(client):
        return trainer_of(client, checksum, algo=REINFORCE(baseline="ema"), seed=3)

    whole = trainer(client)
    whole.run(steps=6, show=False).result()
    other, third = (service.create_training_client(CONFIG) for _ in range(2))
    half = trainer(other)
    half.set_reward(checksum)
    half.run(steps=3, checkpoint_every=3, show=False).result()
    saved = service.list_artifacts(other.training_client_id)[0].artifact_id
    resumed = trainer(third)
    resumed.run(steps=6, resume_from=saved, show=False).result()
    assert [row.step for row in rows(third)] == [4, 5, 6]
    assert [without_times(row) for row in rows(third)] == [without_times(row) for row in rows(client)[3:]]
    assert resumed.position() == whole.position()


def test_a_run_that_was_rolled_back_takes_the_same_steps_again_and_keeps_both_texts(client, paused, service):
    started, seen = threading.Event(), []

    def pausing(prompt, response, meta=None):
        seen.append(prompt)
        if len(seen) == 4 * 16:  # the last rollout of step 4
            assert started.wait()
            run.pause()
        return checksum(prompt, response)

    run = trainer_of(client, pausing).run(steps=6, checkpoint_every=2, show=False)
    started.set()
    assert paused.wait()
    (saved,) = [
        artifact for artifact in service.list_artifacts(client.training_client_id) if artifact.step == 2
    ]
    run.rollback(saved.artifact_id).result()
    run.resume()
    run.result()
    found = [without_times(row) | {"policy_version": 0} for row in rows(client)]
    assert [row.step for row in rows(client)] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert found[2:4] == found[4:6]
    paths = [event.path for event in events(client, Rollouts)]
    assert len(set(paths)) == len(paths) == 8


def test_versions_of_a_reward_keep_their_numbers_over_a_rollback(client):
    trainer = trainer_of(client)
    assert [trainer.number_of(version) for version in ("a", "b", "c", "a")] == [1, 2, 3, 1]
    trainer.seek(trainer.position() | {"reward_versions": ("a",)})
    assert [trainer.number_of(version) for version in ("a", "c")] == [1, 3]


# the guide's loop


@pytest.mark.parametrize("mock", [True, False], ids=["MockRolloutSampler", "PolicySampler"])
def test_the_guides_loop_runs_as_written(mock, service, capsys):
    training_client = service.create_training_client(model_ref="builtin:tiny")

    reward_fn = resolve_reward("keyword_contains", keywords=["solution", "answer"])
    algo = REINFORCE(REINFORCEConfig(use_baseline=True, normalize_advantages=True, entropy_coef=0.01))
    sampler = (
        MockRolloutSampler(max_new_tokens=64) if mock else PolicySampler(training_client, max_new_tokens=64)
    )
    prompts, moved = ["Solve the equation x + 2 = 5", "What is 3 * 4?"], []

    warns = contextlib.nullcontext() if mock else pytest.warns(UserWarning, match="chat template")
    with warns:  # the built-in model has one, and the guide's prompts are texts
        for _epoch in range(10 if mock else 2):
            batch = sampler.generate_trajectories(prompts)
            for traj in batch:
                traj.reward = reward_fn(traj.prompt, traj.response)

            result = algo.update(batch, training_client)
            moved.append(result.approx_kl)
            print(f"Mean reward: {batch.mean_reward:.3f}")

    assert result.notes == (("off-policy: mock data",) if mock else ())
    assert moved[0] > 0 and all(map(math.isnan, moved[1:10]))  # of updates as small as these, one in ten
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
    assert [trajectory.policy_version for trajectory in islice(later.result(), 1)] == [1]
    assert update.policy_version == 1


@pytest.mark.parametrize("algo", ["reinforce", REINFORCE])
def test_what_is_no_algorithm_is_refused_at_once(client, algo):
    with pytest.raises(ValidationError, match="algo is an algorithm such as REINFORCE"):
        RLVRTrainer(client, SUMS, "exact_match", algo, **SMALL)


def test_prompts_may_come_from_a_generator(client):
    trainer = RLVRTrainer(client, (row for row in SUMS), "exact_match", **SMALL)
    assert trainer.run(steps=1, show=False).result().state == "FINISHED"


@pytest.mark.parametrize("mode", ["pause", "fail"])
def test_a_watched_part_that_always_fails_takes_no_reward_away_and_stops_nothing(client, mode):
    def watched(prompt, response, meta=None):
        raise ValueError("not today")

    run = train(client, [Part("exact_match"), Part(watched, weight=0)], steps=2, on_reward_errors=mode)
    run.result(timeout=60)
    assert [event for event in events(client, Alarm) if event.name == "reward_errors"] == []
    assert client.history["rewards/watched/errors"].tolist() == [16, 16]
    assert not np.isnan(client.history["reward"]).any()


def test_a_part_with_weight_that_fails_still_pauses_and_says_which(client, paused):
    def broken(prompt, response, meta=None):
        raise ValueError("not today")

    calls = iter(range(10**6))
    mostly = [
        Part("exact_match"),
        Part(lambda p, r: 1.0 if next(calls) % 4 == 0 else broken(p, r), name="mostly"),
    ]
    run = train(client, mostly, steps=2)
    paused.wait()
    [alarm] = [event for event in events(client, Alarm) if event.name == "reward_errors"]
    assert "failed on 12 of 16" in alarm.message
    assert "mostly: ValueError: not today" in alarm.message
    run.stop()


def test_functions_written_for_trl_are_told_the_step(client):
    seen = []

    def reward(completions, trainer_state, **columns):
        seen.append((trainer_state.global_step, trainer_state.max_steps))
        return [float(len(text)) for text in completions]

    train(client, reward, steps=2).result(timeout=60)
    assert seen == [(0, 2), (1, 2)]


def test_a_dict_of_rewards_trains_and_each_has_its_curve(client):
    train(client, {"exact_match": 1.0, "levenshtein": 0.5}, steps=1).result(timeout=60)
    row = {
        name: client.history[name][-1]
        for name in ("reward", "rewards/exact_match/mean", "rewards/levenshtein/mean")
    }
    assert row["reward"] == pytest.approx(
        row["rewards/exact_match/mean"] + 0.5 * row["rewards/levenshtein/mean"]
    )


def test_a_helper_that_is_changed_in_mid_run_is_marked_as_another_version(client):
    variables = {"__name__": "__main__", "POINTS": 1.0}
    exec("def reward(prompt, response, meta=None):\n    return POINTS * len(response)", variables)
    trainer = trainer_of(client, variables["reward"])
    trainer.run(steps=1, show=False).result(timeout=60)
    variables["POINTS"] = 2.0
    trainer.run(steps=1, show=False).result(timeout=60)
    assert client.history["reward_version"].tolist() == [1, 2]
