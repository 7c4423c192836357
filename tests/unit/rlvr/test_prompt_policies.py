"""Runs whose prompts are chosen by what they scored: replaced, counted, resumed exactly, refused where private."""

import numpy as np
import pytest

from tensafe_nb.config import DPConfig
from tensafe_nb.errors import ValidationError
from tensafe_nb.events import Rollouts
from tensafe_nb.rlvr import PPO, AdaptivePrompts, DynamicSampling, RLVRTrainer, TrajectoryBatch
from tests.unit.rlvr.test_loop import without_times
from tests.unit.rlvr.trainers import CONFIG, SUMS, checksum, events, rows, stored, trainer_of


def of_the_prompt(prompt, response, meta=None):
    """All answers to some of the prompts score the same."""
    return 1.0 if int(meta["answer"]) % 3 == 0 else float(len(response) + sum(map(ord, response)) % 5)


def test_prompts_without_signal_are_replaced_counted_and_what_is_left_says_so(client):
    trainer = trainer_of(
        client, of_the_prompt, prompt_policy=DynamicSampling(rounds=2), prompts_per_step=3, seed=1
    )
    result = trainer.run(steps=4, show=False).result()
    assert result.steps_done == 4
    found = rows(client)
    thrown = [row.values["resample/groups"] for row in found]
    assert sum(thrown) > 0
    assert all(row.values["resample/rounds"] <= 2 for row in found)
    for row, batch, count in zip(found, stored(client), thrown, strict=True):
        assert (len(batch.groups), batch.thrown_away) == (3, count)
        assert row.values["reward"] == pytest.approx(batch.mean_reward)
        assert row.values["rewards/of_the_prompt/mean"] == pytest.approx(batch.mean_reward)
    sampled = 3 * 4 + sum(thrown)
    assert trainer.prompts.record.times.sum() == trainer.prompts.position == sampled
    kept = sum(len(t.prompt_tokens) + len(t.tokens) for batch in stored(client) for t in batch)
    assert found[-1].values["num_tokens"] > kept  # what was thrown away was seen, too


def test_what_no_round_could_replace_stays_in_the_batch(client):
    trainer = trainer_of(client, lambda prompt, response, meta=None: 1.0, prompt_policy="dynamic")
    trainer.run(steps=1, show=False).result()
    (row,) = rows(client)
    assert (row.values["resample/groups"], row.values["resample/rounds"]) == (12, 3)
    assert row.values["frac_reward_zero_std"] == 1
    assert len(stored(client)[0].groups) == 4


def test_every_group_says_how_often_it_was_answered_and_what_share_was_right(client):
    trainer_of(client, of_the_prompt, prompts_per_step=8).run(steps=2, show=False).result()
    first, second = stored(client)
    assert {(group.answered, group.solve_rate) for group in first.groups} == {(0, None)}
    rates = {group.prompt_id: group.p_hat for group in first.groups}
    assert {group.prompt_id: group.solve_rate for group in second.groups} == pytest.approx(rates)
    assert {group.answered for group in second.groups} == {1}
    assert [row.values["prompts/seen"] for row in rows(client)] == [1, 1]


@pytest.mark.parametrize(
    "policy", ["curriculum", AdaptivePrompts(floor=0.2), DynamicSampling(base="adaptive")]
)
def test_a_run_that_chooses_by_rewards_goes_on_exactly_where_it_stood_in_a_fork_too(client, service, policy):
    def trainer(client):
        return trainer_of(
            client, of_the_prompt, prompt_policy=policy, prompts_per_step=4, temperature=2.0, seed=5
        )

    whole = trainer(client)
    whole.run(steps=6, checkpoint_every=3, show=False).result()
    saved = min(service.list_artifacts(client.training_client_id), key=lambda one: one.step).artifact_id
    fork, third = client.fork(saved), service.create_training_client(CONFIG)
    for other in (fork, third):
        resumed = trainer(other)
        resumed.run(steps=6, resume_from=saved, show=False).result()
        assert [row.step for row in rows(other)][-3:] == [4, 5, 6]
        # a state that was loaded twice has a version of its own
        again, once = (
            [without_times(r) | {"policy_version": 0} for r in rows(c)[-3:]] for c in (other, client)
        )
        assert again == once
        assert resumed.position() == whole.position()


def test_another_reward_forgets_what_the_old_one_measured(client):
    trainer = trainer_of(client, of_the_prompt, prompts_per_step=8)
    trainer.run(steps=1, show=False).result()
    before = trainer.prompts.record.times.copy()
    trainer.set_reward(checksum)
    trainer.run(steps=1, show=False).result()
    assert np.array_equal(trainer.prompts.record.times, before + 1)
    assert (trainer.prompts.record.scored == 4).all()


@pytest.mark.parametrize("policy", ["adaptive", "curriculum", "dynamic", DynamicSampling(base="uniform")])
def test_a_private_client_refuses_to_choose_by_what_private_answers_scored(service, policy):
    private = service.create_training_client(
        CONFIG.replace(dp_config=DPConfig(noise_multiplier=1.0, dataset_size=8, sampling="worst_case"))
    )
    with pytest.raises(ValidationError, match="chooses prompts by what private answers scored"):
        trainer_of(private, prompt_policy=policy)
    with pytest.raises(ValidationError, match="chooses prompts by what private answers scored"):
        trainer_of(private, algo="dapo")
    assert repr(trainer_of(private, prompt_policy="uniform").prompts.policy) == "UniformPrompts()"


def test_the_preset_dapo_is_whole(client):
    trainer = trainer_of(client, of_the_prompt, algo="dapo", max_new_tokens=5)
    config = trainer.algo.config
    assert (config.bounds, config.aggregation, config.kl_coef) == ((0.2, 0.28), "token_mean", 0)
    assert trainer.prompts.policy == DynamicSampling(rounds=3, on="true")
    assert [(part.name, part.weight, part.true) for part in trainer.reward.parts] == [
        ("of_the_prompt", 1.0, True),
        ("overlong", 1.0, False),
    ]
    trainer.run(steps=2, show=False).result()
    values = rows(client)[0].values
    assert {"rewards/overlong/mean", "rewards/true", "resample/groups"} <= set(values)
    assert values["completions/masked_ratio"] == 0
    for t in stored(client)[0]:
        assert t.reward_parts["overlong"] == -max(0, len(t.tokens) - 4)
    trainer.set_reward("exact_match")
    assert [part.name for part in trainer.reward.parts] == ["exact_match", "overlong"]


def test_dapo_keeps_a_true_part_and_a_punishment_of_ones_own(client):
    parts = [
        {"reward": "exact_match", "true": True},
        {"reward": "format_compliance", "kwargs": {"tags": ["a"]}},
    ]
    shaped = trainer_of(client, parts, algo="dapo").reward
    assert (shaped.parts[0].name, shaped.true) == ("exact_match", "exact_match")
    assert [p.name for p in shaped.parts][2] == "overlong"
    own = {"exact_match": 1.0, "mine": lambda prompt, response, meta=None: 0.0}
    assert len(trainer_of(client, own, algo=PPO("dapo", overlong=0)).reward.parts) == 2
    with pytest.raises(ValidationError, match="overlong=0"):
        trainer_of(client, algo="dapo", fixed_length=True)


def test_dapo_takes_other_prompts_where_one_asks_for_them(client):
    adaptive = trainer_of(client, algo="dapo", prompt_policy="adaptive").prompts.policy
    assert adaptive == DynamicSampling(base=AdaptivePrompts(), on="true")
    own = DynamicSampling(rounds=7)
    assert trainer_of(client, algo="dapo", prompt_policy=own).prompts.policy is own


def test_columns_and_a_template_are_named_where_the_trainer_is_made_and_held_out_is_never_trained_on(client):
    given = [
        {"sum": row["prompt"], "right": f"because\n#### {row['answer']}", "id": n}
        for n, row in enumerate(SUMS)
    ]
    trainer = RLVRTrainer(
        client,
        given,
        "exact_match",
        prompt="sum",
        answer="right",
        answer_after="####",
        template="{sum}",
        held_out=0.3,
        prompts_per_step=2,
        group_size=2,
        max_new_tokens=4,
    )
    held = {spec["prompt"] for spec in trainer.held_out.specs}
    trained = {spec["prompt"] for spec in trainer.prompts.specs}
    assert held
    assert not held & trained
    assert held | trained == {row["prompt"] for row in SUMS}
    trainer.run(steps=8, show=False).result()
    seen = {
        (event.held_out, t.prompt)
        for event in events(client, Rollouts)
        for t in TrajectoryBatch.load(client.history.rollouts_file(event))
    }
    assert {prompt for held_out, prompt in seen if held_out} == held
    assert {prompt for held_out, prompt in seen if not held_out} == trained
    assert "eval/reward" in client.history


def test_held_out_and_eval_prompts_exclude_each_other(client):
    with pytest.raises(ValidationError, match="not both"):
        trainer_of(client, held_out=0.1, eval_prompts=SUMS)
    with pytest.raises(ValidationError, match="leaves none to hold out"):
        trainer_of(client, held_out=1e-9)
