"""When an alarm sounds, when it keeps quiet, and what it says."""

import json
import math

import numpy as np
import pytest

from tensafe_nb.config import SamplingConfig
from tensafe_nb.protocol.codec import decode, encode
from tensafe_nb.rlvr import RolloutGroup, Trajectory, TrajectoryBatch
from tensafe_nb.rlvr.watch.alarms import Alarms
from tensafe_nb.rlvr.watch.metrics import Goal
from tensafe_nb.rlvr.watch.rules import TEN, Memory, reward_fell

MIXED, GOOD, BAD = (0.0, 1.0), (1.0, 1.0), (0.0, 0.0)
HEALTHY = {"grad_norm": 1.0, "param_delta_norm": 0.1, "policy/approx_kl": 0.0}


def batch_of(*groups, cut=0, errors=0, advantage=1.0):
    """Rollouts with these rewards, each prompt its own baseline: the first `cut` are truncated, `errors` failed."""
    batch = TrajectoryBatch(
        [
            RolloutGroup(f"g{n}", "p", [Trajectory("p", "r", tokens=[1] * 3, reward=r) for r in rewards])
            for n, rewards in enumerate(groups)
        ],
        SamplingConfig(max_new_tokens=16),
    )
    signal = [group.has_signal for group in batch.groups for _ in group.rollouts]
    for number, trajectory in enumerate(batch):
        trajectory.finish_reason = "length" if number < cut else "stop"
        trajectory.advantage = advantage if signal[number] else 0.0
        if number < errors:
            trajectory.reward, trajectory.reward_error = None, "ZeroDivisionError: division by zero"
    return batch


def watch(steps, alarms=None):
    """Feed (row, batch) one after the other; return (step, name, level) of what was announced."""
    alarms = alarms or Alarms()
    events = []
    for step, (row, batch) in enumerate(steps, 1):
        row = {"reward": batch.mean_reward, **HEALTHY, **row}
        events += alarms.observe("tc-1/1", step, row, batch)
    return [(event.step, event.name, event.level) for event in events]


def only(row, batch, alarms=None):
    """The one alarm of a single step."""
    (event,) = (alarms or Alarms()).observe("tc-1/1", 7, {**HEALTHY, **row}, batch)
    return event


def test_a_healthy_run_is_quiet():
    assert watch([({"entropy": 1.0}, batch_of(MIXED, GOOD, MIXED))] * 60) == []


# truncation


def test_more_than_half_cut_twice_running_is_amber_and_once_is_not():
    cut, fine = ({}, batch_of(MIXED, MIXED, cut=3)), ({}, batch_of(MIXED, MIXED))
    assert watch([cut, fine, cut]) == []
    assert watch([cut, cut]) == [(2, "truncation", "amber")]


def test_everything_cut_is_red_at_once_and_names_the_way_out():
    event = only({}, batch_of(MIXED, MIXED, cut=4, advantage=0.0))
    assert (event.name, event.level, event.step, event.run_id) == ("truncation", "red", 7, "tc-1/1")
    assert "100% of the answers were cut at max_new_tokens=16" in event.message
    assert "max_new_tokens, to 32" in event.remedy
    assert event.rollouts == (0, 1, 2, 3)


def test_the_message_knows_how_long_answers_are_that_end():
    alarms = Alarms()
    alarms.observe("r", 1, dict(HEALTHY), batch_of(MIXED, MIXED, cut=3))
    assert "took up to 3 tokens" in only({}, batch_of(MIXED, MIXED, cut=3), alarms).message


# signal


def test_signal_is_judged_over_24_groups_however_many_steps_they_take():
    quiet, mixed = ({}, batch_of(BAD)), ({}, batch_of(MIXED))
    assert watch([quiet] * 23) == []
    assert watch([quiet] * 24) == [(24, "no_signal", "red")]
    assert watch([mixed] * 4 + [quiet] * 20) == [(24, "no_signal", "amber")]
    assert watch([mixed] * 5 + [quiet] * 19) == []


def test_a_step_of_more_groups_than_that_is_judged_by_itself():
    assert watch([({}, batch_of(*[BAD] * 32))]) == [(1, "no_signal", "red")]
    assert watch([({}, batch_of(*[BAD] * 32)), ({}, batch_of(*[MIXED] * 32))]) == [(1, "no_signal", "red")]


def test_a_rise_from_amber_to_red_is_announced_too():
    steps = [({}, batch_of(MIXED))] * 4 + [({}, batch_of(BAD))] * 24
    assert watch(steps) == [(24, "no_signal", "amber"), (28, "no_signal", "red")]


@pytest.mark.parametrize(
    ("groups", "words"),
    [([GOOD] * 24, "solved"), ([BAD] * 24, "easier prompts"), ([GOOD, BAD] * 12, "solved sometimes")],
)
def test_what_helps_depends_on_whether_all_is_good_or_bad(groups, words):
    event = only({}, batch_of(*groups))
    assert words in event.remedy
    assert event.rollouts == tuple(range(32))  # the first of 48


# learning


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"grad_norm": 0.0, "param_delta_norm": 0.0}, "gradient is 0"),
        ({"param_delta_norm": 0.0}, "step is"),
    ],
)
def test_signal_without_any_change_of_a_weight_is_red(row, words):
    event = only(row, batch_of(MIXED))
    assert (event.name, event.level) == ("no_learning", "red")
    assert words in event.message
    assert event.rollouts == (0, 1)


def test_that_only_cut_answers_could_have_taught_something_is_said():
    batch = batch_of(MIXED, MIXED, cut=2)
    batch[2].advantage = batch[3].advantage = 0.0
    idle = {"grad_norm": 0.0, "param_delta_norm": 0.0}
    event = only(idle | {"completions/masked_ratio": 0.5}, batch)
    assert "was cut" in event.message
    assert "mask_truncated=False" in event.remedy
    assert "was cut" not in only(idle, batch).message, "cut answers are in the loss: they are no reason"


def test_a_step_without_signal_that_moves_nothing_is_as_it_should_be():
    assert watch([({"grad_norm": 0.0, "param_delta_norm": 0.0}, batch_of(GOOD))]) == []


# entropy


def test_three_times_the_first_entropies_is_an_explosion():
    entropies = [0.2] * 5 + [0.5] * 5 + [0.8] * 5
    steps = [({"entropy": entropy}, batch_of(MIXED)) for entropy in entropies]
    assert watch(steps) == [(12, "entropy", "red")]  # the mean of 5 steps has passed 0.6


def test_a_tenth_is_a_collapse_unless_the_reward_is_at_its_ceiling():
    falling = [0.2] * 5 + [0.001] * 6
    assert watch([({"entropy": e}, batch_of(MIXED)) for e in falling]) == [(10, "entropy", "amber")]
    solved = [({"entropy": e}, batch_of(MIXED if e > 0.1 else GOOD)) for e in falling]
    assert watch(solved) == []


def test_steps_without_an_update_have_no_entropy_and_do_not_count():
    steps = [
        ({"entropy": 0.2}, batch_of(MIXED)),
        ({"entropy": math.nan}, batch_of(GOOD)),
        ({}, batch_of(GOOD)),
    ]
    alarms = Alarms()
    watch(steps * 4, alarms)
    assert alarms.memory.first_entropies == [0.2] * 4


# sampler, KL, rewards


@pytest.mark.parametrize(
    ("row", "gap", "level"),
    [
        ({"sampling/mismatch_kl": 0.02}, 1e-3, "red"),
        ({"sampling/sampling_logp_difference/mean": 2e-3}, 1e-3, "amber"),
        ({"sampling/sampling_logp_difference/mean": 2e-3}, 2e-2, None),
        ({"sampling/mismatch_kl": 0.005}, 1e-3, None),
    ],
)
def test_a_sampler_that_disagrees_with_the_training_path_is_noticed(row, gap, level):
    found = Alarms(gap).observe("r", 1, {**HEALTHY, **row}, batch_of(MIXED))
    assert [(event.name, event.level) for event in found] == ([("sampler_mismatch", level)] if level else [])


@pytest.mark.parametrize(("kl", "level"), [(0.005, None), (0.02, "red")])
def test_rollouts_in_fewer_bits_may_differ_as_long_as_their_distribution_hardly_does(kl, level):
    batch = batch_of(MIXED)
    batch.sampling = batch.sampling.replace(precision="int8")
    row = {"sampling/mismatch_kl": kl, "sampling/sampling_logp_difference/mean": 0.05}
    found = Alarms().observe("r", 1, {**HEALTHY, **row}, batch)
    assert [(event.name, event.level) for event in found] == ([("sampler_mismatch", level)] if level else [])
    assert not found or "precision='exact'" in found[0].remedy


@pytest.mark.parametrize(
    ("row", "level"),
    [
        ({"policy/approx_kl": 0.5}, "amber"),
        ({"policy/log_ratio_max": 8.5}, "red"),
        ({"policy/approx_kl": 0.25, "policy/log_ratio_max": 5.5}, None),  # as in runs that learn well
    ],
)
def test_an_update_that_moves_the_policy_far_is_noticed(row, level):
    found = Alarms().observe("r", 1, {**HEALTHY, **row}, batch_of(MIXED))
    assert [(event.name, event.level) for event in found] == ([("kl", level)] if level else [])


def test_updates_that_move_the_policy_far_on_average_are_noticed_after_five():
    step = ({"policy/approx_kl": 0.25}, batch_of(MIXED))
    assert watch([step] * 7) == [(5, "kl", "amber")]
    assert watch([step, ({"policy/approx_kl": 0.1}, batch_of(MIXED))] * 5) == []


@pytest.mark.parametrize(("passes", "words"), [(1.0, "warmup_steps"), (3.0, "ppo_epochs")])
def test_what_helps_against_a_far_move_fits_the_passes_there_were(passes, words):
    remedy = only({"policy/approx_kl": 1.0, "policy/epochs_run": passes}, batch_of(MIXED)).remedy
    assert words in remedy
    assert ("target_kl" in remedy) == (passes > 1)


def test_rollouts_of_another_policy_version_are_noticed_by_their_own_name():
    row = {"staleness/mean": 2.0, "staleness/max": 4.0, "sampling/mismatch_kl": 0.5}
    event = only(row, batch_of(MIXED))
    assert (event.name, event.level) == ("stale", "amber")
    assert "tis_cap" in event.remedy
    assert watch([({"staleness/mean": 0.0, "staleness/max": 0.0}, batch_of(MIXED))]) == []


@pytest.mark.parametrize("masked", [True, False])
def test_cut_answers_are_said_to_be_left_out_of_the_loss_only_where_they_are(masked):
    row = {"completions/masked_ratio": 1.0 if masked else 0.0}
    event = only(row, batch_of(MIXED, cut=2))
    assert event.name == "truncation"
    assert ("left out of the loss" in event.message) is masked


def test_prompts_are_solved_when_the_true_part_says_so_not_when_the_form_is_paid():
    batch = batch_of(*[(0.6, 0.6)] * 24)
    for rollout in batch:
        rollout.reward_parts = {"form": 1.0, "exact": 0.0}
    (by_reward,) = Alarms().observe("r", 1, HEALTHY, batch)
    (by_aim,) = Alarms().observe("r", 1, HEALTHY, batch, Goal("exact"))
    assert "The prompts are solved" in by_reward.remedy
    assert "easier prompts" in by_aim.remedy


def test_another_reward_begins_with_an_empty_memory_of_rewards_alone():
    alarms = Alarms()
    watch([({"entropy": 0.2}, batch_of(BAD))] * 30, alarms)
    alarms.forget_reward()
    assert (alarms.memory.signals, alarms.memory.last_rewards) == ([], [])
    assert (alarms.memory.lowest, alarms.memory.highest) == (None, None)
    assert len(alarms.memory.first_entropies) == 5
    found = watch([({"entropy": 0.2}, batch_of(BAD))] * 24, alarms)
    assert found == [(24, "no_signal", "red")], "announced anew, once there is enough to say it of"


@pytest.mark.parametrize(("errors", "level"), [(1, None), (2, "amber"), (10, "amber"), (11, "red")])
def test_failed_rewards_are_amber_above_5_percent_and_red_above_half(errors, level):
    found = Alarms().observe("r", 1, HEALTHY, batch_of(*[MIXED] * 10, errors=errors))
    assert [(event.name, event.level) for event in found] == ([("reward_errors", level)] if level else [])
    if level:
        assert f"failed on {errors} of 20" in found[0].message
        assert "ZeroDivisionError" in found[0].message
        assert "set_reward" in found[0].remedy
        assert found[0].rollouts == tuple(range(errors))


# announcing


def test_a_trouble_that_lasts_is_announced_once_and_again_after_it_was_over():
    bad, fine = ({"policy/approx_kl": 0.5}, batch_of(MIXED)), ({}, batch_of(MIXED))
    assert watch([bad] * 10) == [(1, "kl", "amber")]
    assert watch([bad, fine, fine] * 5) == [(1, "kl", "amber")]  # it comes and goes: still the same trouble
    assert watch([bad] + [fine] * 5 + [bad]) == [(1, "kl", "amber"), (7, "kl", "amber")]


def test_a_level_rises_at_once_and_falls_after_five_milder_steps():
    red, amber = (
        ({"policy/log_ratio_max": 9.0}, batch_of(MIXED)),
        ({"policy/approx_kl": 0.5}, batch_of(MIXED)),
    )
    assert watch([amber, red, amber, red, amber]) == [(1, "kl", "amber"), (2, "kl", "red")]
    assert watch([red, *[amber] * 6, red]) == [(1, "kl", "red"), (6, "kl", "amber"), (8, "kl", "red")]


def test_the_memory_survives_a_checkpoint_and_what_goes_on_is_announced_anew():
    steps = [({"entropy": 0.2}, batch_of(MIXED))] * 5 + [({"entropy": 0.2}, batch_of(BAD))] * 19
    whole, first, second = Alarms(), Alarms(), Alarms()
    watch(steps[:20], first)
    second.load_state_dict(decode(json.loads(json.dumps(encode(first.state_dict()), allow_nan=False))))
    assert watch(steps[20:] + steps[5:15], second)
    watch(steps + steps[5:15], whole)
    assert second.memory == whole.memory
    second.forget_announcements()
    assert watch([({}, batch_of(BAD))], second) == [(1, "no_signal", "red")]


def test_an_alarm_is_an_event_that_can_be_logged():
    event = only({"policy/approx_kl": 0.5}, batch_of(MIXED))
    assert decode(json.loads(json.dumps(encode(event), allow_nan=False))) == event


# whole runs, shaped like the published logs that the thresholds come from (one group per step)


def run_of(entropy, reward, steps=500):
    """One group per step; a step has signal while the reward lies between 0.05 and 0.95."""
    for step in range(1, steps + 1):
        level = reward(step)
        group = MIXED if 0.05 < level < 0.95 and step % 2 else (GOOD if level >= 0.5 else BAD)
        yield {"entropy": entropy(step)}, batch_of(group)


def test_a_run_that_dies_of_a_kl_penalty_is_called_before_and_after():
    """Entropy .23 → 10.5, reward .75 → 0 between steps 51 and 66."""
    found = watch(
        run_of(
            lambda step: 0.23 if step < 20 else min(10.5, 0.23 * 1.13 ** (step - 20)),
            lambda step: 0.75 if step < 51 else max(0.0, 0.75 - 0.05 * (step - 50)),
        )
    )
    assert [(name, level) for _, name, level in found if level == "red"] == [
        ("entropy", "red"),
        ("no_signal", "red"),
    ]
    steps = {name: step for step, name, level in found if level == "red"}
    assert 25 <= steps["entropy"] <= 45  # before the reward falls
    assert 75 <= steps["no_signal"] <= 95  # 24 groups after the last that had signal


def test_a_run_that_stays_stable_is_left_in_peace():
    found = watch(
        run_of(lambda step: 0.23 + 0.05 * math.sin(step), lambda step: 0.75 + 0.1 * math.sin(step / 9))
    )
    assert found == []


# a fallen reward


def raised_at(rewards):
    """The update after which a fallen reward is announced; None when it never is."""
    alarms, batch = Alarms(), batch_of(MIXED)
    for step, reward in enumerate(rewards, 1):
        if any(
            a.name == "reward_fell"
            for a in alarms.observe("tc-1/1", step, {**HEALTHY, "reward": reward}, batch)
        ):
            return step
    return None


def how_many_raise_it(rewards):
    """How many of these runs (runs, updates) raise it, looked at after every ten updates as a run is."""
    count = 0
    for run in rewards:
        memory = Memory()
        for number, reward in enumerate(run.tolist(), 1):
            memory.take_reward(reward)
            if number % TEN == 0 and reward_fell(memory, {}, None) is not None:
                count += 1
                break
    return count


def wandering(rng, rho, runs, updates):
    """Rewards of which each depends on the one before: a stationary first-order autoregression."""
    values = np.empty((runs, updates))
    values[:, 0] = rng.normal(size=runs)
    for t in range(1, updates):
        values[:, t] = rho * values[:, t - 1] + math.sqrt(1 - rho**2) * rng.normal(size=runs)
    return 0.3 + 0.2 * values


KINDS = ("normal", "right or wrong", "few prompts", "rare", "heavy tails", "wandering")


@pytest.mark.parametrize(
    ("kind", "updates"),
    [
        pytest.param(kind, updates, marks=pytest.mark.soak if updates == 250 and kind in KINDS[:4] else ())
        for kind in KINDS
        for updates in (20, 60, 250)
    ],
)
def test_at_most_one_in_a_hundred_runs_that_do_not_learn_is_said_to_have_fallen(kind, updates):
    rng = np.random.default_rng([updates, *kind.encode()])
    shape = (500, updates)
    makers = {
        "normal": lambda: 0.05 + 0.3 * rng.normal(size=shape),
        "right or wrong": lambda: rng.binomial(128, 0.3, size=shape) / 128,
        "few prompts": lambda: rng.binomial(4, rng.beta(0.5, 0.5, size=(*shape, 4))).mean(-1) / 4,
        "rare": lambda: rng.binomial(16, 0.02, size=shape) / 16,
        "heavy tails": lambda: 1 + rng.standard_t(3, size=shape),
        "wandering": lambda: wandering(rng, 0.5, *shape),
    }
    assert how_many_raise_it(makers[kind]()) <= 5


@pytest.mark.parametrize(
    ("reward_at", "latest"),
    [
        (lambda t: 0.8 if t < 10 else 0.3, 20),
        (lambda t: 0.5 if t < 50 else 0.2, 80),
        (lambda t: max(0.1, 0.5 - 0.004 * t), 120),
        (lambda t: -0.2 if t < 30 else -0.9, 60),
    ],
    ids=["at once", "later", "slowly", "below zero"],
)
def test_a_reward_that_falls_is_announced_once_with_its_remedy(reward_at, latest):
    rng = np.random.default_rng(7)
    rewards = [reward_at(t) + 0.04 * rng.normal() for t in range(200)]
    alarms, batch, told = Alarms(), batch_of(MIXED), []
    for step, reward in enumerate(rewards, 1):
        told += alarms.observe("tc-1/1", step, {**HEALTHY, "reward": reward}, batch)
    (alarm,) = [found for found in told if found.name == "reward_fell"]
    assert alarm.step <= latest
    assert "first ten updates" in alarm.message and "rollback" in alarm.remedy


def test_a_steady_fall_is_not_taken_for_wandering():
    rng = np.random.default_rng(3)
    falling = rng.binomial(64, np.linspace(0.6, 0.2, 100), size=(100, 100)) / 64
    assert how_many_raise_it(falling) >= 90


def test_a_fall_of_less_than_a_fifth_is_no_alarm_however_certain():
    assert raised_at([0.90] * 10 + [0.75] * 60) is None
    assert raised_at([0.90] * 10 + [0.70] * 60) == 20


def test_the_tens_survive_a_checkpoint_and_another_reward_begins_anew():
    before, batch = Alarms(), batch_of(MIXED)
    for step in range(1, 16):
        before.observe("tc-1/1", step, {**HEALTHY, "reward": 0.9}, batch)
    after = Alarms()
    after.load_state_dict(decode(json.loads(json.dumps(encode(before.state_dict())))))
    told = [
        a.name for s in range(16, 61) for a in after.observe("tc-1/1", s, {**HEALTHY, "reward": 0.1}, batch)
    ]
    assert told.count("reward_fell") == 1
    before.forget_reward()
    assert [
        a for s in range(16, 60) for a in before.observe("tc-1/1", s, {**HEALTHY, "reward": 0.1}, batch)
    ] == []


def test_what_a_measured_update_showed_holds_until_the_next_one_is_measured():
    far = {"policy/approx_kl": 0.6, "policy/log_ratio_max": 9.0}
    small = {name: value for name, value in HEALTHY.items() if name != "policy/approx_kl"}
    alarms, told = Alarms(), []
    for step, row in enumerate([far, *[{}] * 9] * 3):
        told += alarms.observe("tc-1/1", step, {**small, **row}, batch_of(MIXED))
    assert [(alarm.name, alarm.step) for alarm in told] == [("kl", 0)]
