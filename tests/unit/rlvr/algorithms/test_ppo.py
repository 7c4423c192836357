"""PPO and its kin on the engine: passes, minibatches, the KL stop, the reference, the value head, presets, refusals."""

import numpy as np
import pytest
import torch

from tensafe_nb.config import LoRAConfig, OptimizerConfig
from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr import (
    PPO,
    REINFORCE,
    PolicySampler,
    PPOConfig,
    REINFORCEConfig,
    get_presets,
    register_advantage,
    register_preset,
)
from tests.unit.rlvr.clients import TINY, EngineClient

PROMPTS = ["def", "class Counter(dict):\n", "import os, sys", "x = "]
SGD = OptimizerConfig(name="sgd", learning_rate=0.05, momentum=0.0, weight_decay=0.0)


def rollouts(client, group_size=4, **options):
    batch = PolicySampler(client, group_size, 6, seed=0, chat="never", **options).generate_trajectories(
        PROMPTS
    )
    for number, trajectory in enumerate(batch):
        trajectory.reward = float(number % 3 == 0)
    return batch


def trained(algo, config=None, **options):
    client = EngineClient(config or TINY.replace(optimizer=SGD))
    result = algo.update(rollouts(client, **options), client).result()
    return client, result


def assert_same_weights(first, second, tolerance=0.0):
    for (name, a), b in zip(first.weights().items(), second.weights().values(), strict=True):
        assert (a - b).abs().max() <= tolerance * a.abs().max(), name


@pytest.mark.parametrize(
    "other", [{"loss": "clip"}, {"loss": "cispo"}, {"ratio": "token", "clip_range": 0.1}]
)
def test_one_pass_over_fresh_rollouts_is_reinforce(other):
    reinforce, _ = trained(REINFORCE(baseline="group", mask_truncated=False))
    ppo, result = trained(PPO(advantage="group", mask_truncated=False, **other))
    assert_same_weights(reinforce, ppo, tolerance=1e-5)
    assert (result.clip_ratio, result.epochs_run, result.early_stopped) == (0.0, 1, False)
    assert ppo.operations == ["sample", "forward_backward", "optim_step", "logprobs"], (
        "nothing is read before it"
    )


def test_an_option_that_cannot_act_is_named_beside_the_options():
    assert repr(PPO(clip_range=0.2, target_kl=0.1)).endswith("# no effect in this run: clip_range, target_kl")
    assert "no effect" not in repr(PPO(clip_range=0.2, ppo_epochs=2))


def test_several_passes_move_the_ratio_away_from_one():
    client, result = trained(PPO(ppo_epochs=3, mask_truncated=False))
    assert client.operations[1:] == ["logprobs", *["forward_backward", "optim_step"] * 3, "logprobs"]
    assert result.epochs_run == 3 and result.approx_kl > 0 and client.step == 3
    assert result.metrics["clip_ratio/region_mean"] == pytest.approx(
        result.metrics["clip_ratio/low_mean"] + result.metrics["clip_ratio/high_mean"]
    )
    assert result.metrics["sampling/mismatch_kl"] < 1e-6


def test_minibatches_are_whole_groups_and_each_is_a_step():
    client, result = trained(PPO(minibatches=2, mask_truncated=False))
    sent = [len(batch) for batch, *_ in client.batches]
    assert sum(sent) == 16 and all(size % 4 == 0 for size in sent) and client.step == 2
    assert result.tokens == sum(int((batch.labels != -100).sum()) for batch, *_ in client.batches)


def test_target_kl_ends_the_passes_without_throwing_anything_away():
    far = TINY.replace(optimizer=SGD.replace(learning_rate=5.0))
    client, result = trained(PPO(ppo_epochs=4, target_kl=1e-3, mask_truncated=False), far)
    assert result.early_stopped and result.epochs_run == 1
    measuring = ["logprobs"] * 2  # against the target, and how far it went in the end
    assert client.operations[1:] == ["logprobs", "forward_backward", "optim_step", *measuring]
    _, patient = trained(PPO(ppo_epochs=2, target_kl=10.0, mask_truncated=False))
    assert patient.epochs_run == 2 and not patient.early_stopped


def test_dropout_in_the_training_path_is_noticed_before_any_weight_moves():
    config = TINY.replace(lora_config=LoRAConfig(rank=4, dropout=0.5))
    client = EngineClient(config)
    for name, parameter in client.engine.model.trainable:
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    before, batch = client.weights(), rollouts(client)
    with pytest.raises(ValidationError, match="LoRAConfig\\(dropout=0\\)"):
        PPO(ppo_epochs=2, mask_truncated=False).update(batch, client)
    assert all(torch.equal(value, before[name]) for name, value in client.weights().items())


@pytest.mark.parametrize("lora", [LoRAConfig(rank=4), None], ids=["lora", "full"])
@pytest.mark.parametrize("placement", [{"kl_in": "loss"}, {"kl_in": "reward"}], ids=["loss", "reward"])
def test_a_kl_penalty_keeps_the_policy_closer_to_where_it_began(lora, placement):
    config = TINY.replace(
        lora_config=lora, optimizer=SGD.replace(learning_rate=0.01 if lora is None else 0.05)
    )

    def drift(**options):
        client, algo = EngineClient(config), REINFORCE(baseline="group", mask_truncated=False, **options)
        client.freeze_reference()
        algo._reference_of = client.training_client_id
        batch = rollouts(client)
        for _ in range(6):
            result = algo.update(batch, client).result()
        now = client.compute_logprobs(client.batches[0][0]).result().logprobs
        then = client.compute_logprobs(client.batches[0][0], reference=True).result().logprobs
        return np.abs(now - then).max(), result

    free, without = drift()
    held, result = drift(kl_coef=0.3, **placement)
    assert held < free
    assert without.kl is None and (placement["kl_in"] == "reward" or result.kl > 0)


def test_the_reference_is_the_base_for_a_fresh_adapter_and_a_copy_for_one_that_has_trained():
    fresh = EngineClient(TINY.replace(lora_config=LoRAConfig(rank=4)))
    REINFORCE(kl_coef=0.1, mask_truncated=False).update(rollouts(fresh), fresh)
    assert "freeze_reference" not in fresh.operations
    assert fresh.engine.reference.weights is None
    REINFORCE(kl_coef=0.1, mask_truncated=False).update(
        rollouts(fresh), fresh
    )  # another run, on what was learnt
    assert fresh.operations.count("freeze_reference") == 1
    full, algo = EngineClient(), REINFORCE(kl_coef=0.1, mask_truncated=False)
    for _ in range(2):
        algo.update(rollouts(full), full)
    assert full.operations.count("freeze_reference") == 1, "the reference stays where it was"


def test_without_signal_a_kl_penalty_in_the_loss_still_pulls_back():
    client = EngineClient(TINY.replace(optimizer=SGD))
    algo = PPO(advantage="group", kl_coef=1.0, kl_in="loss", mask_truncated=False)
    algo.update(rollouts(client), client)
    same = rollouts(client)
    for trajectory in same:
        trajectory.reward = 1.0
    result = algo.update(same, client).result()
    assert result.skipped is None and result.kl > 0 and result.param_delta_norm > 0


VALUE = TINY.replace(
    value_head=True, lora_config=LoRAConfig(rank=4), optimizer=OptimizerConfig(learning_rate=1e-2)
)


def test_a_value_head_warms_up_alone_and_then_learns_beside_the_policy():
    client = EngineClient(VALUE)
    algo = PPO("ppo_value", ppo_epochs=2, value_head={"warmup": 2}, mask_truncated=False)
    before, losses = client.weights(), []
    for number in range(6):
        result = algo.update(rollouts(client), client).result()
        losses.append(result.value_loss)
        if number == 1:
            assert all(torch.equal(value, before[name]) for name, value in client.weights().items())
    assert {name for _, name, _ in client.batches[:4]} == {"policy_value"}
    assert {name for _, name, _ in client.batches[4:]} == {"policy_clip"}
    assert losses[-1] < losses[0]
    assert not all(torch.equal(value, before[name]) for name, value in client.weights().items())
    assert "value/loss" in result.metrics and "value/clip_ratio" in result.metrics


def test_the_value_loss_does_not_disturb_the_policy():
    client = EngineClient(VALUE)
    client.engine.model.value_head.weight.data.normal_()
    REINFORCE(mask_truncated=False).update(rollouts(client), client)
    adapter = [p.detach().clone() for name, p in client.engine.model.trainable if "lora" in name]
    batch, _, _ = client.batches[0]
    extras = {name: batch.extras[name] for name in ("weights",)} | {"returns": batch.extras["weights"]}
    data = type(batch)(batch.input_ids, batch.attention_mask, batch.labels, extras)
    client.forward_backward(data, "policy_value", {})
    gradients = {name: p.grad for name, p in client.engine.model.trainable}
    assert all(gradient is None for name, gradient in gradients.items() if "lora" in name)
    assert gradients["value_head.weight"] is not None and len(adapter) > 0


def test_gae_gives_every_token_an_advantage_of_its_own():
    client = EngineClient(VALUE)
    batch = rollouts(client)
    PPO("ppo_value", value_head={"lam": 0.9, "warmup": 0}, mask_truncated=False).update(batch, client)
    assert all(len(trajectory.advantage) == len(trajectory.tokens) for trajectory in batch)
    flat = np.concatenate([trajectory.advantage for trajectory in batch])
    assert flat.mean() == pytest.approx(0, abs=1e-6) and flat.std(ddof=1) == pytest.approx(1, abs=1e-3)


def test_gae_without_a_value_head_says_how_to_get_one():
    client = EngineClient()
    with pytest.raises(ValidationError, match="value_head=True"):
        PPO(advantage="gae").update(rollouts(client), client)


def test_auto_takes_groups_then_the_value_head_then_a_running_mean():
    config, one, four = PPOConfig(), EngineClient(), frozenset({"value_head"})
    single, grouped = rollouts(one, group_size=1), rollouts(one)
    assert [config.method(grouped, four), config.method(single, four)] == ["group", "gae"]
    assert config.method(single, frozenset()) == "ema"


def test_an_advantage_of_ones_own_is_used_and_checked():
    @register_advantage("halves", overwrite=True)
    def halves(rewards, groups, mask):
        return np.where(np.isfinite(rewards), rewards / 2, np.nan)

    client = EngineClient()
    batch = rollouts(client)
    REINFORCE(advantage="halves", mask_truncated=False).update(batch, client)
    assert [trajectory.advantage for trajectory in batch] == [trajectory.reward / 2 for trajectory in batch]
    with pytest.raises(ValidationError, match=r"no advantage named 'halvs'.*'halves'"):
        REINFORCE(advantage="halvs")

    batch[0].reward = None  # unscored: NaN from the function is no advantage, and no error
    REINFORCE(advantage="halves", mask_truncated=False).update(batch, client)
    assert batch[0].advantage == 0

    register_advantage("wrong", overwrite=True)(lambda rewards, groups, mask: rewards[:2])
    with pytest.raises(ValidationError, match=r"'wrong' returned shape \(2,\)"):
        REINFORCE(advantage="wrong").update(batch, client)


@pytest.mark.parametrize("name", sorted(get_presets()))
def test_every_preset_updates(name):
    preset = get_presets()[name]
    algo = (PPO if isinstance(preset, PPOConfig) else REINFORCE)(name, mask_truncated=False)
    client = EngineClient(VALUE)
    result = algo.update(rollouts(client), client).result()
    assert result.skipped is None and result.tokens > 0


def test_presets_can_be_added_and_belong_to_their_algorithm():
    register_preset("mine", PPOConfig(ppo_epochs=3), overwrite=True)
    assert PPO("mine").config.ppo_epochs == 3
    with pytest.raises(ValidationError, match="one of PPO"):
        REINFORCE("grpo")
    with pytest.raises(ValidationError, match="Did you mean 'dr_grpo'"):
        PPO("dr_grop")
    with pytest.raises(ValidationError, match="already"):
        register_preset("grpo", PPOConfig())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kl_in": "loss", "kl_estimator": "k1"}, "no gradient in expectation"),
        ({"ratio": "sequence", "advantage": "gae"}, "not gae"),
        ({"ratio": "sequence", "loss": "cispo"}, "not cispo"),
        ({"advantage": "gae", "scale": "group"}, "whitens by itself"),
        ({"loss": "cispo", "clip_range": 0.2}, "both bounds"),
        ({"advantage": "reinforce_pp", "scale": "batch"}, "leave baseline and scale out"),
        ({"loss": "cispo", "clip_range": (5, 0)}, "below the largest"),
        ({"clip_range": (2, 3)}, "below must be under 1"),
        ({"ppo_epoch": 4}, "ppo_epochs"),
    ],
)
def test_options_that_contradict_each_other_are_refused_with_what_to_change(options, reason):
    with pytest.raises(ValidationError, match=reason):
        PPOConfig(**options)


def test_rollouts_of_another_sampler_are_compared_and_capped():
    client = EngineClient(TINY.replace(optimizer=SGD))
    batch = rollouts(client)
    for trajectory in batch:
        trajectory.logprobs = [logprob - 0.7 for logprob in trajectory.logprobs]  # as if sampled elsewhere
    result = REINFORCE(REINFORCEConfig(tis_cap=1.5), mask_truncated=False).update(batch, client).result()
    assert result.metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(0.7, abs=1e-3)
    assert result.metrics["sampling/importance_sampling_ratio/capped"] == 1, "all of them"
    plain, _ = trained(REINFORCE(mask_truncated=False))
    triples = zip(*(c.weights().values() for c in (client, plain, EngineClient())), strict=True)
    ratios = [((a - s).norm() / (b - s).norm()).item() for a, b, s in triples if (b - s).norm() > 0]
    assert np.allclose(ratios, 1.5, rtol=1e-2), "every token counts one and a half times, not twice"


def test_the_smallest_and_the_largest_ratio_to_the_sampler_are_told():
    client = EngineClient(TINY.replace(optimizer=SGD))
    batch = rollouts(client)
    for row, trajectory in enumerate(batch):
        shift = 0.5 if row == 0 else -0.7
        trajectory.logprobs = [logprob + shift for logprob in trajectory.logprobs]
    result = REINFORCE(mask_truncated=False).update(batch, client).result()
    ratio = {name: result.metrics[f"sampling/importance_sampling_ratio/{name}"] for name in ("min", "max")}
    assert ratio == pytest.approx({"min": np.exp(-0.5), "max": np.exp(0.7)}, rel=1e-3)


@pytest.mark.parametrize("algo", [REINFORCE("rloo"), PPO("dapo", overlong=0)])
def test_rollouts_in_fewer_bits_are_corrected_for_as_by_tis_and_the_difference_is_told(algo):
    results, clients = [], []
    for config in (algo.config, algo.config.replace(tis_cap=2.0)):
        client = EngineClient(TINY.replace(optimizer=SGD))
        batch = rollouts(client, precision="int8")
        assert batch.sampling.precision == "int8"
        results.append(type(algo)(config.replace(mask_truncated=False)).update(batch, client).result())
        clients.append(client)
    by_itself, asked_for = results
    assert by_itself.notes == ("sampled in int8, corrected by tis_cap=2",)
    assert asked_for.notes == ()
    assert_same_weights(*clients)
    assert clients[0].operations == ["sample", "logprobs", "forward_backward", "optim_step", "logprobs"], (
        "the sampler's logprobs are not those of the policy before the update"
    )
    found = by_itself.metrics
    assert 0 < found["sampling/mismatch_kl"] < 0.01
    assert found["sampling/importance_sampling_ratio/capped"] == 0
    assert (
        found["sampling/importance_sampling_ratio/min"] < 1 < found["sampling/importance_sampling_ratio/max"]
    )


def test_state_comes_back():
    algo, other = PPO("ppo_value", mask_truncated=False), PPO("ppo_value")
    client = EngineClient(VALUE)
    algo.update(rollouts(client), client)
    other.load_state_dict(algo.state_dict())
    assert other.state_dict() == algo.state_dict() and other.updates == 1


def test_cispo_says_how_often_it_cut_the_factor_below_and_above():
    _, result = trained(
        PPO("cispo", clip_range=(0.99, 1.01), ppo_epochs=3, mask_truncated=False),
        TINY.replace(optimizer=SGD.replace(learning_rate=1.0)),
    )
    low, high = (result.metrics[f"clip_ratio/{side}_mean"] for side in ("low", "high"))
    assert low > 0 and high > 0
    assert result.clip_ratio == pytest.approx(low + high)
