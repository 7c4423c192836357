"""Training with an environment: the trainer's evaluation, resume, algorithms and refusals, and what an update sees."""

import random
import threading

import numpy as np
import pytest

from tensafe_nb import datasets
from tensafe_nb.config import DPConfig, LoRAConfig, OptimizerConfig, SamplingConfig, TrainingConfig
from tensafe_nb.errors import RewardError, ValidationError
from tensafe_nb.events import Rollouts, RunState
from tensafe_nb.rlvr import (
    REINFORCE,
    RLVRTrainer,
    RolloutEnded,
    RolloutGroup,
    Trajectory,
    TrajectoryBatch,
    TurnRecord,
    environment,
    get_presets,
    preview_reward,
)
from tensafe_nb.rlvr.algorithms.advantages import by_turn, token_weights
from tensafe_nb.rlvr.algorithms.packing import loss_mask, pack
from tensafe_nb.rlvr.algorithms.policy_gradient import algorithm_of
from tests.unit.rlvr.trainers import CONFIG, SMALL, rows, stored

SUMS = datasets.sums(16, seed=0)
PAIRS = [{"sums": [first, second]} for first, second in zip(SUMS[::2], SUMS[1::2], strict=True)]


def trainer_of(client, made="sums", **options):
    return RLVRTrainer(client, PAIRS, environment=made, **SMALL | {"reward_timeout": None} | options)


@environment
def checks(row):
    """A reward without a meaning that differs from answer to answer."""
    said = yield row["sums"][0]["prompt"]
    other = yield row["sums"][1]["prompt"]
    return float(sum(map(ord, said + other)) % 7)


def conversation(reward=1.0, turns=(0.5, None)):
    """Two turns of two tokens, between them three of the environment."""
    said = [TurnRecord("assistant", "a", 0, 2, True, turns[0]), TurnRecord("user", "b", 2, 5)]
    return Trajectory(
        "p", "r", {}, [1, 2], [3, 4, 5, 6, 7, 8, 9], [-1.0, -1, 0, 0, 0, -1, -1], reward=reward,
        mask=[1, 1, 0, 0, 0, 1, 1], turns=[*said, TurnRecord("assistant", "c", 5, 7, True, turns[1])], policy_version=0,
    )  # fmt: skip


def test_what_the_environment_said_is_no_label_and_has_no_weight():
    batch = TrajectoryBatch(
        [RolloutGroup("p", "p", [conversation()])], SamplingConfig(max_new_tokens=2), max_tokens=8
    )
    mask = loss_mask(batch, mask_truncated=True)
    assert mask.tolist() == [[1, 1, 0, 0, 0, 1, 1]]
    packed = pack(list(batch), {"weights": mask})
    assert packed.labels.tolist() == [[-100, 3, 4, -100, -100, -100, 8, 9]]
    assert packed.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert token_weights(mask, "const", batch.longest).sum() == pytest.approx(4 / 8)
    assert list(batch.lengths) == [4]


def test_rewards_of_turns_stand_on_the_last_token_of_their_turn_and_add_up():
    batch = [conversation(1.0, (0.5, -0.25)), conversation(None)]
    mask = np.array([batch[0].mask, [0] * 7])
    assert by_turn(np.array([1.0, np.nan]), batch, mask).tolist() == [[0, 0.5, 0, 0, 0, 0, 0.5], [0] * 7]


def test_a_step_publishes_what_came_of_its_conversations(client):
    trainer = trainer_of(client, eval_prompts=PAIRS[:2], algo=REINFORCE(mask_truncated=False))
    trainer.run(steps=2, show=False).result()
    first, *_, last = rows(client)
    assert {"eval/reward", "eval/greedy", "eval/rewards/sums/sum 2"} <= first.values.keys()
    assert {
        "reward",
        "rewards/sums/mean",
        "rewards/sums/sum 1/mean",
        "rewards/sums/errors",
    } <= last.values.keys()
    assert last.values["completions/mean_length"] <= 8
    kept = stored(client)
    assert [turn.text for turn in kept[1][0].turns][::2] == [row["prompt"] for row in kept[1][0].meta["sums"]]
    assert trainer.evaluate() == trainer.evaluate()
    assert trainer.rescore().errors == 0
    assert trainer.rescore().after.mean_reward == trainer.rescore().before.mean_reward
    assert preview_reward(trainer.reward, kept[1], timeout=None).report.scored == len(kept[1])


@environment
def rolls(row):
    """One with a state between turns, and dice of its own."""
    dice = random.randrange(6)
    said = yield row["sums"][0]["prompt"]
    other = yield row["sums"][dice % 2]["prompt"]
    return float((sum(map(ord, said + other)) + dice) % 7)


def test_a_run_goes_on_exactly_where_it_stood_resumed_forked_and_rolled_back(client, service):
    def trainer(client):
        return trainer_of(
            client, rolls, algo=REINFORCE(baseline="ema", mask_truncated=False), prompt_policy="adaptive",
            group_size=2, eval_prompts=PAIRS[:1], eval_every=2, seed=3,
        )  # fmt: skip

    def measured(client, steps=2):
        versions = {"policy_version": 0}  # a state that was loaded twice has one of its own
        newest = [row.values for row in rows(client)[-steps:]]
        return [{k: v for k, v in r.items() if not k.startswith("time/")} | versions for r in newest]

    def said(client, batches=3):  # of two steps, and of an evaluation
        return [[t.tokens for t in batch] for batch in stored(client)[-batches:]]

    whole = trainer(client)
    run = whole.run(steps=4, checkpoint_every=2, show=False)
    run.result()
    fork, third = run.fork(step=2), service.create_training_client(CONFIG)
    saved = min(service.list_artifacts(client.training_client_id), key=lambda one: one.step).artifact_id
    for other in (fork, third):
        resumed = trainer(other)
        resumed.run(steps=4, resume_from=saved, show=False).result()
        assert (said(other), measured(other)) == (said(client), measured(client))
        assert resumed.position() == whole.position()

    rolled = service.create_training_client(CONFIG)
    started = threading.Event()

    def stop_at_3(event):
        if isinstance(event, Rollouts) and event.step == 3 and started.wait():
            run.pause()

    rested = threading.Event()
    enough = rolled.subscribe(stop_at_3)
    rolled.subscribe(lambda e: isinstance(e, RunState) and e.state == "PAUSED" and rested.set())
    run = trainer(rolled).run(steps=4, checkpoint_every=2, show=False)
    started.set()
    assert rested.wait()
    enough()
    run.rollback(min(service.list_artifacts(rolled.training_client_id), key=lambda one: one.step).artifact_id)
    run.resume()
    run.result()
    assert (said(rolled), measured(rolled)) == (said(client), measured(client))


FAST = (
    "grpo",
    "ppo_value",
    "reinforce_pp",
)  # a scalar for each rollout, a value for each token, a return for each


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.soak) for name in [*get_presets(), "ppo"]],
)
def test_every_algorithm_learns_from_conversations(name, service):
    options = algorithm_of(name).config
    value_head = getattr(options, "advantage", None) == "gae"
    client = service.create_training_client(
        TrainingConfig(
            model_ref="builtin:sums", value_head=value_head, optimizer=OptimizerConfig(learning_rate=1e-3)
        )
    )
    trainer = trainer_of(client, checks, algo=options.replace(mask_truncated=False))
    trainer.run(steps=1, show=False).result()
    assert client.history["param_delta_norm"][-1] > 0


def test_dapo_punishes_the_longest_turn_and_asks_the_environment_what_is_right(client):
    @environment
    def patient(row):
        try:
            said = yield row["sums"][0]["prompt"]
            yield row["sums"][1]["prompt"]
        except RolloutEnded:
            return 0.0
        return float(said[:1] == "0")

    trainer = trainer_of(client, patient, algo="dapo", max_new_tokens=5, eval_prompts=PAIRS[:2])
    trainer.run(steps=2, show=False).result()
    batch = stored(client)[0]
    for rollout in batch:
        longest = max(turn.stop - turn.start for turn in rollout.turns if turn.trained)
        assert rollout.reward_parts["overlong"] == -max(0, longest - 4)
        assert rollout.reward == sum(rollout.reward_parts.values())
    values = rows(client)[1].values
    own = np.array([rollout.reward_parts["patient"] for rollout in batch])
    assert values["rewards/true"] == values["rewards/patient/mean"] == pytest.approx(own.mean())
    assert {"rewards/overlong/mean", "resample/groups", "eval/rewards/overlong"} <= {
        *values,
        *rows(client)[0].values,
    }
    again = trainer.rescore()
    assert [r.reward for r in again.after] == [r.reward for r in again.before]
    trainer.set_environment(checks)
    assert trainer.reward.overlong == (5, 1)
    with pytest.raises(ValidationError, match="overlong=0"):
        trainer_of(client, algo="dapo", fixed_length=True)


def test_an_environment_and_a_reward_are_not_both(client):
    with pytest.raises(ValidationError, match="rewards its conversations itself"):
        RLVRTrainer(client, PAIRS, "exact_match", environment="sums")
    with pytest.raises(ValidationError, match="needs a reward"):
        RLVRTrainer(client, PAIRS)
    trainer = trainer_of(client)
    with pytest.raises(ValidationError, match="set_environment"):
        trainer.set_reward("exact_match")
    trainer.set_environment(checks)
    assert trainer.sampler.environment is trainer.reward is checks
    with pytest.raises(ValidationError, match="set_reward"):
        RLVRTrainer(client, SUMS, "exact_match").set_environment(checks)


def test_one_that_fails_always_ends_the_run_with_its_line(client):
    @environment
    def broken(row):
        yield row["sums"][0]["prompt"]
        raise LookupError("no such thing")

    run = trainer_of(client, broken).run(steps=2, show=False)
    with pytest.raises(RewardError, match=r"LookupError: no such thing \(line 4 of broken"):
        run.result()


def test_one_that_is_always_cut_says_what_helps(client):
    @environment
    def goes_on(row):
        while True:
            yield row["sums"][0]["prompt"]

    run = trainer_of(client, goes_on, max_new_tokens=1).run(steps=1, show=False)
    with pytest.raises(RewardError, match=r"16 were cut before it came to an end\. Raise max_new_tokens"):
        run.result()


def test_with_differential_privacy_the_row_is_the_unit_and_no_conversation_knows_of_another(service):
    seen = []

    @environment
    def gossips(row):
        yield row["sums"][0]["prompt"]
        seen.append(row)
        return float(len(seen))

    client = service.create_training_client(
        TrainingConfig(
            model_ref="builtin:sums",
            lora_config=LoRAConfig(rank=2),
            dp_config=DPConfig(sampling="worst_case", dataset_size=8, target_epsilon=None),
        )
    )
    algo = REINFORCE(baseline="rloo", mask_truncated=False)
    trainer = trainer_of(client, gossips, algo=algo, fixed_length=True)
    trainer.run(steps=1, show=False).result()
    (batch,) = stored(client)
    assert set(batch.rewards) == {1.0}, "each has a copy of the environment"
    assert len({t.prompt_id for t in batch}) == 4
    lock = threading.Lock()

    @environment
    def holds(row):
        with lock:
            yield "1+1="

    run = trainer_of(client, holds, algo=algo).run(steps=1, show=False)
    with pytest.raises(ValidationError, match="With differential privacy each conversation"):
        run.result()
