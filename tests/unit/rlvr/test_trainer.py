"""RLVRTrainer and the guide's loop, on the built-in model that half knows how to add."""

import contextlib
import math
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

from tensafe_nb import datasets
from tensafe_nb.errors import RewardError, ValidationError
from tensafe_nb.events import Alarm
from tensafe_nb.protocol.codec import decode, encode
from tensafe_nb.rlvr import (
    PPO,
    REINFORCE,
    MockRolloutSampler,
    Part,
    PolicySampler,
    PPOConfig,
    REINFORCEConfig,
    RLVRTrainer,
    get_presets,
    resolve_reward,
)
from tensafe_nb.service import ServiceClient
from tests.unit.rlvr.trainers import (
    CONFIG,
    SMALL,
    SUMS,
    alarms_named,
    checksum,
    events,
    rows,
    stored,
    train,
    trainer_of,
)


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
    never_asked = SimpleNamespace(policy_version=0)  # a training client that does nothing
    options = {"training_client": never_asked, "prompts": SUMS, "reward": "exact_match"} | changes
    with pytest.raises(ValidationError, match=message):
        RLVRTrainer(**options)


# runs


def test_what_is_no_training_client_is_refused_by_name():
    with pytest.raises(
        ValidationError, match=r"training_client='tc-1' must be a training client: service\.create"
    ):
        RLVRTrainer("tc-1", ["1+1="], "exact_match")


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
        "num_tokens", "prompts/seen", "prompts/solve_rate", "time/sample", "time/reward", "time/update", "time/total",
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


def test_a_run_that_samples_in_fewer_bits_learns_from_them_and_is_evaluated_exactly(client, monkeypatch):
    asked = []
    sample = type(client).sample
    monkeypatch.setattr(
        type(client),
        "sample",
        lambda self, *args, **how: (asked.append(how["sampling"]), sample(self, *args, **how))[1],
    )
    train(client, steps=1, precision="int8", eval_prompts=SUMS[:2]).result()
    assert {one.precision for one in asked if one.num_samples == 4} == {"int8"}
    assert {one.precision for one in asked if one.num_samples == 1} == {"exact"}
    (row,) = (row.values for row in rows(client) if "reward" in row.values)
    assert 0 < row["sampling/mismatch_kl"] < 0.01
    assert row["sampling/importance_sampling_ratio/capped"] == 0
    assert [batch.sampling.precision for batch in stored(client)] == ["int8", "exact", "exact"], "evaluated"
    assert not alarms_named("sampler_mismatch", client)


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
    RLVRTrainer(
        client, SUMS, "exact_match", eval_prompts=SUMS, eval_samples=2, eval_pass_at=np.array([2]), **SMALL
    )


@pytest.mark.parametrize("steps", ["1", None, 1.5])
def test_a_number_of_steps_that_is_none_is_refused(client, steps):
    with pytest.raises(ValidationError, match=r"RLVRTrainer\.run: steps=.* must be a whole number"):
        RLVRTrainer(client, SUMS, "exact_match", **SMALL).run(steps=steps, show=False)


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


@pytest.mark.parametrize(
    ("algo", "kind", "config"),
    [
        ("reinforce", REINFORCE, REINFORCEConfig()),
        ("rloo", REINFORCE, get_presets()["rloo"]),
        ("ppo", PPO, PPOConfig()),
        ("grpo", PPO, get_presets()["grpo"]),
        (PPOConfig(ppo_epochs=3), PPO, PPOConfig(ppo_epochs=3)),
        (None, REINFORCE, REINFORCEConfig()),
    ],
)
def test_an_algorithm_can_be_given_by_its_name_or_its_options(client, algo, kind, config):
    trainer = RLVRTrainer(client, SUMS, "exact_match", algo, **SMALL)
    assert (type(trainer.algo), trainer.algo.config) == (kind, config)


@pytest.mark.parametrize(
    ("name", "nearest"), [("grp", "grpo"), ("GRPO", "grpo"), ("reinforce++", "reinforce")]
)
def test_an_unknown_algorithm_is_refused_with_the_nearest_name(client, name, nearest):
    with pytest.raises(ValidationError, match=f"no algorithm .*Did you mean '{nearest}'"):
        RLVRTrainer(client, SUMS, "exact_match", name, **SMALL)


def test_several_rewards_can_be_given_as_a_list(client):
    def short(prompt, response, meta=None):
        return float(len(response) < 3)

    run = RLVRTrainer(client, SUMS, ["exact_match", short], "grpo", **SMALL).run(steps=1, show=False)
    metrics = run.result().metrics
    assert {"rewards/exact_match/mean", "rewards/short/mean"} <= set(metrics)


@pytest.mark.parametrize("algo", [3, REINFORCE, {"type": "grpo"}])
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
