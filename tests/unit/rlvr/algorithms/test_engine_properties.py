"""B1 to B7 of the RLVR design, section 9.2: sampler, batch and update against the engine itself."""

import numpy as np
import pytest
import torch

from tensafe_nb.config import LoRAConfig, OptimizerConfig, SamplingConfig
from tensafe_nb.engine.engine import no_tick
from tensafe_nb.engine.models import load as models
from tensafe_nb.engine.sampling import sampler as sampling
from tensafe_nb.losses import LossOutputs, resolve_loss
from tensafe_nb.protocol.results import OptimStepResult
from tensafe_nb.rlvr import (
    PPO,
    REINFORCE,
    PolicySampler,
    REINFORCEConfig,
    RolloutGroup,
    Trajectory,
    TrajectoryBatch,
)
from tensafe_nb.rlvr.algorithms.packing import pack
from tensafe_nb.rlvr.rewards.reward import resolve_reward
from tensafe_nb.rlvr.scoring.scorer import score
from tests.close import assert_close
from tests.unit.rlvr.clients import TINY, EngineClient, policy_batch

PROMPTS = ["def", "class Counter(dict):\n", "import os, sys"]  # of different lengths


@pytest.fixture(scope="module")
def client():
    """Shared by the tests that change no weights."""
    return EngineClient()


def rollouts(client, group_size=4, temperature=1.0, rewards=None, **options):
    sampler = PolicySampler(client, group_size, 8, temperature, seed=0, chat="never", **options)
    batch = sampler.generate_trajectories(PROMPTS)
    for number, trajectory in enumerate(batch):
        trajectory.reward = float(number % 3 == 0) if rewards is None else rewards
    return batch


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_b1_the_samplers_logprobs_are_those_of_the_training_forward(client, temperature):
    batch = rollouts(client, temperature=temperature)
    for trajectory in batch:
        trajectory.advantage = 0.0
    rows = pack(list(batch), {})
    labelled = rows.labels != -100
    for scored_at, name in ((temperature, "logprobs"), (1.0, "raw_logprobs")):
        trained = client.engine.compute_logprobs(rows, temperature=scored_at).logprobs[labelled]
        sampled = np.concatenate([getattr(trajectory, name) for trajectory in batch])
        assert_close(trained, sampled, at_least=1)


def padded_on_the_left(prompts):
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
    return ids, (torch.arange(width) >= width - torch.tensor([[len(p)] for p in prompts])).long()


@torch.no_grad()
def without_cache(causal, prompt, tokens):
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(causal(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


def test_b2_greedy_decoding_equals_generate_and_a_loop_without_cache(client):
    model = client.engine.model
    prompts = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    greedy = SamplingConfig(max_new_tokens=12, temperature=0, ignore_end=True)
    own = [list(sequence.tokens) for sequence in sampling.sample(model, prompts, greedy, 0, no_tick)]
    ids, mask = padded_on_the_left(prompts)
    generated = model.causal.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        use_cache=True,
        max_new_tokens=12,
        min_new_tokens=12,
        pad_token_id=0,
    )
    ends = sorted(model.end_tokens)
    assert not any(set(row) & set(ends) for row in own)  # else min_new_tokens would have forbidden them
    assert own == generated[:, ids.shape[1] :].tolist()
    assert own == [without_cache(model.causal, prompt, 12) for prompt in prompts]


def test_b3_a_rollout_is_the_same_whoever_else_is_in_the_batch(client):
    alone = PolicySampler(client, 2, 8, seed=3, chat="never").generate_trajectories(PROMPTS[:1])
    together = PolicySampler(client, 2, 8, seed=3, chat="never").generate_trajectories(PROMPTS[::-1])
    for one, other in zip(alone, together.groups[-1].rollouts, strict=True):
        assert one.tokens == other.tokens
        assert_close(one.logprobs, other.logprobs, at_least=1)


def test_b4_no_top_k_leaks_into_sampling(client):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    causal = LlamaForCausalLM(config).eval()
    torch.nn.init.zeros_(causal.lm_head.weight)  # every token equally likely
    causal.generation_config.top_k = 50
    model = models.LoadedModel(causal, None, client.tokenizer, torch.device("cpu"), torch.float32, split=True)
    drawn = sampling.sample(model, [[5]], SamplingConfig(max_new_tokens=1, num_samples=5000), 0, no_tick)
    assert len({sequence.tokens[0] for sequence in drawn}) > 900


def test_b5_prompt_and_padding_have_no_gradient_and_the_end_token_has():
    stops = Trajectory("", "", prompt_tokens=[5, 6, 7], tokens=[8, 1], advantage=1.0)  # 1 ends
    goes_on = Trajectory("", "", prompt_tokens=[5], tokens=[8, 9, 10, 11, 12], advantage=-1.0)
    advantages = np.array([[1.0] * 5, [-1.0] * 5])
    batch = pack([stops, goes_on], {"weights": np.ones((2, 5)), "advantages": advantages})
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 0], [5, 8, 9, 10, 11]]
    assert batch.labels.tolist() == [[-100, -100, 8, 1, -100], [8, 9, 10, 11, 12]]
    hidden = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.from_numpy(batch.labels)
    outputs = LossOutputs(hidden, torch.nn.Linear(4, 16), labels, torch.from_numpy(batch.attention_mask))
    where = batch.labels != -100
    tensors = {name: torch.from_numpy(value[where]) for name, value in batch.extras.items()}
    tensors |= {"labels": labels[torch.from_numpy(where)], "input_ids": labels}
    resolve_loss("policy_reinforce")(outputs, tensors).total.backward()
    has_gradient = hidden.grad.abs().sum(-1) > 0
    assert has_gradient.tolist() == [[False, False, True, True, False], [True] * 5]


def gradient_of(config, batch, micro_batch_tokens):
    client = EngineClient(TINY.replace(micro_batch_tokens=micro_batch_tokens))
    kwargs = {"entropy_coef": config.entropy_coef}
    result = client.forward_backward(policy_batch(batch, config), "policy_reinforce", kwargs).result()
    gradients = [p.grad.flatten() for p in client.engine.model.causal.parameters() if p.grad is not None]
    return result, torch.cat(gradients)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean", "const"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_b6_micro_batching_changes_neither_loss_nor_gradient(client, aggregation, entropy_coef):
    batch = rollouts(client)
    assert batch.clipped_ratio > 0
    batch[0].finish_reason = "stop"  # as if it had stopped there: some rows count, truncated ones are masked
    batch[5].finish_reason = "stop"
    config = REINFORCEConfig(aggregation=aggregation, entropy_coef=entropy_coef)
    whole, expected = gradient_of(config, batch, 16_384)
    width = policy_batch(batch, config).shape[1]
    for rows in (1, 2):
        result, gradient = gradient_of(config, batch, rows * width)
        assert_close(result.loss, whole.loss, at_least=1)  # a mean of terms of size 1 that cancel
        assert_close(gradient, expected)
        assert result.metrics == pytest.approx(whole.metrics, rel=1e-5, abs=1e-5)


def test_b6_sum_holds_relative_to_its_size(client):
    batch = rollouts(client)
    config = REINFORCEConfig(aggregation="sum", mask_truncated=False)
    whole, expected = gradient_of(config, batch, 16_384)
    result, gradient = gradient_of(config, batch, 1)
    assert result.loss == pytest.approx(whole.loss, rel=1e-5)
    assert_close(gradient, expected)


def test_b7_only_the_adapter_changes_and_it_does_change():
    client = EngineClient(TINY.replace(lora_config=LoRAConfig(rank=4)))
    before = client.weights()
    result = REINFORCE(mask_truncated=False).update(rollouts(client), client).result()
    after = client.weights()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    total = sum((after[name] - before[name]).square().sum() for name in changed).sqrt().item()
    assert result.param_delta_norm == pytest.approx(total, rel=1e-5)
    assert result.grad_norm > 0
    assert (result.step, result.policy_version, result.skipped) == (1, 1, None)


@pytest.mark.parametrize("baseline", ["rloo", "group"])
def test_b7_equal_rewards_leave_every_weight_bit_identical(baseline):
    client = EngineClient()
    algo = REINFORCE(baseline=baseline, mask_truncated=False)
    algo.update(rollouts(client), client).result()  # Adam now has a momentum to drift by
    before, client.operations = client.weights(), []
    result = algo.update(rollouts(client, rewards=0.3), client).result()
    after = client.weights()
    assert result.skipped == "no signal"
    assert client.operations == ["sample"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (result.step, result.grad_norm, result.param_delta_norm) == (1, 0.0, 0.0)
    assert result.entropy > 0, "the sampler knew it, though nothing was trained"


def test_b7_with_an_entropy_bonus_equal_rewards_still_make_a_step():
    client = EngineClient()
    algo = REINFORCE(entropy_coef=0.01, mask_truncated=False)
    result = algo.update(rollouts(client, rewards=0.3), client).result()
    assert result.skipped is None
    assert result.param_delta_norm > 0


def test_a_step_makes_what_was_rewarded_more_likely_and_the_rest_less():
    client = EngineClient(TINY.replace(optimizer=OptimizerConfig(name="sgd", learning_rate=0.1, momentum=0)))
    batch = rollouts(client, group_size=8)
    score(batch, resolve_reward(lambda prompt, response: len(response) % 2))
    REINFORCE(mask_truncated=False).update(batch, client).result()
    rows = pack(list(batch), {})
    now = client.engine.compute_logprobs(rows).logprobs.sum(1)
    before = np.array([sum(trajectory.raw_logprobs) for trajectory in batch])
    advantage = np.array([trajectory.advantage for trajectory in batch])
    assert ((now - before) * advantage).sum() > 0


def test_a_fixed_length_rollout_is_no_truncation(client):
    batch = rollouts(client, fixed_length=True)
    assert batch.clipped_ratio == 0
    assert batch.lengths.tolist() == [8] * len(batch)


def test_a_batch_of_groups_made_by_hand_works_like_a_sampled_one():
    client = EngineClient()
    prompt = client.tokenizer("def")["input_ids"]
    made = [Trajectory("def", "", prompt_tokens=prompt, tokens=[4 + n], reward=float(n)) for n in range(2)]
    batch = TrajectoryBatch([RolloutGroup("g", "def", made)], SamplingConfig(max_new_tokens=1))
    assert REINFORCE().update(batch, client).result().tokens == 2


@pytest.mark.parametrize(
    "algo",
    [
        REINFORCE(baseline="none"),
        PPO(advantage="none"),
        PPO(advantage="none", loss="cispo", clip_range=(0, 5)),
    ],
    ids=["REINFORCE", "PPO", "CISPO"],
)
def test_the_gradient_of_an_update_is_the_exact_policy_gradient_by_enumeration(algo):
    """Every one-token answer once, its reward weighed by its probability: the sum is the expectation."""
    client = EngineClient()
    causal, size = client.engine.model.causal, client.engine.model.vocab_size
    prompt = client.tokenizer("def")["input_ids"]
    values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    policy = causal(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    objective = -(policy * values).sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(objective, list(causal.parameters()))])
    rewards = (policy * values * size).tolist()
    answers = [Trajectory("", "", prompt_tokens=prompt, tokens=[a], reward=r) for a, r in enumerate(rewards)]
    batch = TrajectoryBatch([RolloutGroup("g", "", answers)], SamplingConfig(max_new_tokens=1))
    found = []

    def optim_step():
        found.append(client.gradient())
        return client._done("optim_step", OptimStepResult(1, 0.0, 0.0, 1, 0.0))

    client.optim_step = optim_step
    algo.update(batch, client).result()
    assert expected.abs().max() > 1e-3
    assert_close(found[0], expected, within=1e-4)
