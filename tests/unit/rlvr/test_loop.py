"""The loop of a run: what a step leaves, rewards that fail, alarms, and going on where a run stood."""

import threading

import numpy as np
import pytest

from tensafe_nb.errors import NonFiniteLossError, RewardError, StorageError, ValidationError
from tensafe_nb.events import Alarm, ArtifactDeleted, CheckpointSaved, Rollouts
from tensafe_nb.rlvr import (
    PPO,
    REINFORCE,
    TrajectoryBatch,
    resolve_reward,
)
from tests.unit.rlvr.trainers import (
    CONFIG,
    SUMS,
    alarms_named,
    checksum,
    events,
    rows,
    stored,
    train,
    trainer_of,
)

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


def test_the_answers_to_held_out_prompts_are_kept_so_that_they_can_be_compared_across_steps(client):
    run = train(client, checksum, steps=4, eval_prompts=SUMS[:2], eval_every=2, eval_samples=2)
    run.result()
    found = [event for event in events(client, Rollouts) if event.held_out]
    assert [(event.step, event.rollouts) for event in found] == [(0, 6), (2, 6), (4, 6)]
    assert sorted(client.history.state.held_out) == [0, 2, 4]
    assert sorted(client.history.state.rollouts) == [1, 2, 3, 4]
    batches = [TrajectoryBatch.load(client.history.rollouts_file(event)) for event in found]
    assert len({tuple(group.prompt_id for group in batch.groups) for batch in batches}) == 1
    for event, batch in zip(found, batches, strict=True):
        sampled = [answer.reward for group in batch.groups for answer in group.rollouts[1:]]
        steps, values = client.history.series("eval/reward")
        assert np.mean(sampled) == pytest.approx(values[list(steps).index(event.step)])


def test_the_rollouts_of_a_step_that_could_not_be_scored_are_there_to_look_at(client):
    with pytest.raises(RewardError):
        train(client, lambda prompt, response: {}["answer"]).result()
    (batch,) = stored(client)
    (error,) = {trajectory.reward_error for trajectory in batch}
    assert error.startswith("KeyError: 'answer' (line 1 of <lambda>: ")


def test_a_disk_that_refuses_rollouts_costs_their_texts_and_an_alarm_and_not_the_run(client, monkeypatch):
    save = TrajectoryBatch.save

    def refused(batch, path):
        if path.name in ("step-000001.jsonl", "step-000002.jsonl"):
            raise StorageError("The rollouts could not be written: No space left on device.")
        return save(batch, path)

    monkeypatch.setattr(TrajectoryBatch, "save", refused)
    run = train(client, checksum, steps=3)
    run.result()
    assert [event.step for event in events(client, Rollouts)] == [3]
    (alarm,) = [each for each in events(client, Alarm) if each.name == "rollouts_not_kept"]
    assert (alarm.step, alarm.level) == (1, "amber")
    assert "No space left" in alarm.message
    assert len(client.history["reward"]) == 3


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
