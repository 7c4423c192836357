"""It teaches: from the built-in model that half knows how to add, rewards alone make it add sums it has never seen.

Sampled accuracy alone could rise by sharpening what the model knew already, so greedy accuracy must rise too, and
pass@8 is reported beside them. A control that takes the same steps at a learning rate of nothing stays where it was.
"""

import random
import time

import pytest

from tensafe_nb import datasets
from tensafe_nb.config import OptimizerConfig, TrainingConfig
from tensafe_nb.rlvr import PPO, REINFORCE, RLVRTrainer

pytestmark = pytest.mark.soak

STEPS = 400
ALGORITHMS = {
    "REINFORCE with rloo": (lambda: REINFORCE(baseline="rloo"), STEPS),
    "GRPO": (lambda: PPO("grpo"), STEPS),
    "PPO with a value head": (lambda: PPO("ppo_value", ppo_epochs=2), STEPS // 2),
}
HELDOUT = datasets.sums(977, seed=0, split="heldout")


def trainer_of(service, seed, learning_rate, steps, algo, **options):
    optimizer = OptimizerConfig(
        learning_rate=learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        max_grad_norm=1.0,
        schedule="linear",
        warmup_steps=5,
        total_steps=steps * algo.config.passes,
    )
    value_head = getattr(algo.config, "advantage", None) == "gae"
    config = TrainingConfig(
        model_ref="builtin:sums", optimizer=optimizer, seed=seed, value_head=value_head
    )  # all weights
    return RLVRTrainer(
        service.create_training_client(config),
        datasets.sums(9000, seed=seed),
        "exact_match",
        algo,
        prompts_per_step=32,
        group_size=8,
        max_new_tokens=4,
        eval_prompts=HELDOUT,
        eval_samples=8,
        seed=seed,
        **options,
    )


def line(label, values):
    names = ("eval/reward", "eval/greedy", "eval/pass@8")
    return f"{label:>16}" + "".join(f"   {name.removeprefix('eval/')} {values[name]:.3f}" for name in names)


def trained(service, capsys, seed, learning_rate=3e-4, steps=STEPS, algo=None, **options):
    """Return what was measured before and after, and the history; print the seconds in between."""
    trainer = trainer_of(service, seed, learning_rate, steps, algo or REINFORCE(baseline="rloo"), **options)
    before = trainer.evaluate()
    start = time.perf_counter()
    trainer.run(steps=steps, show=False).result()
    seconds = time.perf_counter() - start
    history = trainer.training_client.history
    before, after = ({name: history[name][at] for name in before} for at in (0, -1))
    with capsys.disabled():
        print(f"\n{line(f'seed {seed}, before', before)}\n{line(f'after {seconds:.0f} s', after)}")
    return before, after, history


@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_rewards_alone_teach_the_model_to_add(service, capsys, name, seed):
    algo, steps = ALGORITHMS[name]
    before, after, history = trained(service, capsys, seed, steps=steps, algo=algo())
    assert before["eval/reward"] < 0.6
    assert after["eval/reward"] >= 0.80
    assert after["eval/greedy"] >= before["eval/greedy"] + 0.10
    assert after["eval/pass@8"] >= before["eval/pass@8"]
    assert history["param_delta_norm"].min() > 0


@pytest.mark.timeout(600)
def test_rollouts_in_fewer_bits_teach_as_much(service, capsys):
    _, exact, _ = trained(service, capsys, seed=0, steps=STEPS // 2)
    for precision in ("bfloat16", "int8"):
        before, after, history = trained(service, capsys, seed=0, steps=STEPS // 2, precision=precision)
        kl, capped = (
            history[f"sampling/{name}"] for name in ("mismatch_kl", "importance_sampling_ratio/capped")
        )
        with capsys.disabled():
            print(
                f"\n{precision:>16}   KL to the policy that trains {kl.mean():.5f}, ratios cut {capped.mean():.2%}"
            )
        assert after["eval/reward"] >= before["eval/reward"] + 0.15
        assert after["eval/reward"] >= exact["eval/reward"] - 0.04
        assert 0 < kl.mean() < 0.01


def test_without_a_learning_rate_nothing_is_learned(service, capsys):
    before, after, history = trained(service, capsys, seed=0, learning_rate=1e-12, steps=40)
    for name in before:
        assert after[name] == pytest.approx(before[name], abs=0.01)
    rewards = history["reward"]
    noise = rewards.std(ddof=1) * (2 / 10) ** 0.5  # of the difference between two means of ten steps
    assert abs(rewards[-10:].mean() - rewards[:10].mean()) <= 3 * noise


def drift(service, **options):
    """Return the mean distance from the base's log-probabilities, over held-out answers, after 120 steps."""
    trainer = trainer_of(service, 0, 3e-4, 120, PPO("grpo", **options))
    client = trainer.training_client
    client.freeze_reference()
    trainer.run(steps=120, show=False).result()
    rows = client.batches([{"prompt": row["prompt"], "completion": row["answer"]} for row in HELDOUT[:200]])
    scores = [(client.compute_logprobs(b), client.compute_logprobs(b, reference=True)) for b in rows]
    moved = [abs(now.logprobs - then.logprobs)[now.logprobs != 0].mean() for now, then in scores]
    return float(sum(moved) / len(moved)), client.history["reward"][-10:].mean()


def test_a_kl_penalty_keeps_the_policy_closer_to_its_base(service, capsys):
    free, reward = drift(service)
    held, held_reward = drift(service, kl_coef=1.0, kl_in="loss")
    with capsys.disabled():
        print(
            f"\n from the base: {free:.3f} nats without, {held:.3f} with KL; reward {reward:.3f}, {held_reward:.3f}"
        )
    assert held < 0.8 * free


# two sums in one conversation


def pairs(count, seed, split="train"):
    asked = datasets.sums(2 * count, seed=seed, split=split)
    return [{"sums": [first, second]} for first, second in zip(asked[::2], asked[1::2], strict=True)]


def shown_how_to_go_on(client, seed, steps=250, rows=64):
    """Train on conversations whose answers are the model's own, as often wrong as they were.

    It has never seen a text go on behind an answer, so that a second one is never right and no reward can prefer
    anything. Of this it learns where a second sum stands, and of adding nothing.
    """
    asked = datasets.sums(3000, seed=seed + 1)
    drawn = client.sample([row["prompt"] for row in asked], max_new_tokens=4, seed=seed).result().sequences
    read = client.tokenizer([row["prompt"] for row in asked], add_special_tokens=False)["input_ids"]
    turns = [
        (ids, list(one.tokens)) for ids, one in zip(read, drawn, strict=True) if one.finish_reason == "stop"
    ]
    begin, draw = list(drawn[0].prompt_tokens)[: -len(read[0])], random.Random(seed)
    for _ in range(steps):
        batch = {"input_ids": [], "labels": []}
        for _ in range(rows):
            ids, labels = [*begin], [-100] * len(begin)
            for question, answer in draw.sample(turns, 2):
                ids += question + answer
                labels += [-100] * len(question) + answer
            batch["input_ids"].append(ids[:-1])
            batch["labels"].append(labels[1:])
        client.forward_backward(batch)
        taken = client.optim_step()
    taken.result()
    return client.save_state(include_optimizer=False).result().artifact_id


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rewards_alone_teach_two_sums_in_one_conversation(service, capsys, seed):
    config = TrainingConfig(
        model_ref="builtin:sums",
        optimizer=OptimizerConfig(learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.0, max_grad_norm=1.0),
        seed=seed,
    )
    begun = shown_how_to_go_on(service.create_training_client(config), seed)
    client = service.create_training_client(
        config.replace(optimizer=config.optimizer.replace(learning_rate=3e-4))
    )
    client.load_state(begun)
    trainer = RLVRTrainer(
        client,
        pairs(4500, seed),
        environment="sums",
        algo=REINFORCE(baseline="rloo", mask_truncated=False),
        prompts_per_step=32,
        group_size=8,
        max_new_tokens=4,
        eval_prompts=pairs(300, 0, "heldout"),
        eval_samples=2,
        reward_timeout=60.0,
        seed=seed,
    )
    start, cpu = time.perf_counter(), time.process_time()
    trainer.run(steps=75, show=False).result()
    taken = f"{time.perf_counter() - start:.0f} s, {time.process_time() - cpu:.0f} s of CPU"
    names = ("eval/reward", "eval/greedy", "eval/rewards/sums/sum 1", "eval/rewards/sums/sum 2")
    before, after = ({name: client.history[name][at] for name in names} for at in (0, -1))
    with capsys.disabled():
        for when, values in (("before", before), (f"after {taken}", after)):
            shown = "   ".join(f"{name.rpartition('/')[2]} {value:.3f}" for name, value in values.items())
            print(f"\n seed {seed}, {when}: {shown}", end="")
    assert after["eval/reward"] >= before["eval/reward"] + 0.2
    assert after["eval/greedy"] >= before["eval/greedy"] + 0.1, "not by sharpening alone"
    assert after["eval/rewards/sums/sum 1"] >= before["eval/rewards/sums/sum 1"] + 0.1
    assert after["eval/rewards/sums/sum 2"] >= before["eval/rewards/sums/sum 2"] + 0.1
