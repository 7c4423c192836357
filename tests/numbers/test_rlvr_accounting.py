"""What counts in an update and in its metrics, as identities: a number is the same where it must not change.

Nothing is pinned here but the algebra: a batch without its unscored rollouts is the batch; the mean gradient of any
number of minibatches is the gradient of the whole; pass@k is an average over all subsets.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from tensafe_nb import datasets
from tensafe_nb.config import OptimizerConfig, SamplingConfig, TrainingConfig
from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr import PPO, REINFORCE, PolicySampler, PPOConfig, TrajectoryBatch, ValueOptions
from tensafe_nb.rlvr.algorithms import measurement
from tensafe_nb.rlvr.algorithms.measurement import Pace
from tensafe_nb.rlvr.algorithms.options import REINFORCEConfig
from tensafe_nb.rlvr.algorithms.packing import entropy_of, loss_mask, pack, unpack
from tensafe_nb.rlvr.algorithms.private import group_weights
from tensafe_nb.rlvr.scoring.scorer import FunctionReport, ScoreReport
from tensafe_nb.rlvr.watch.evaluation import HeldOut, pass_at_k
from tensafe_nb.rlvr.watch.metrics import rollout_metrics
from tests.unit.rlvr.clients import EngineClient

SGD = OptimizerConfig(name="sgd", momentum=0.0, learning_rate=0.01, weight_decay=0.0)
SUMS = TrainingConfig(model_ref="builtin:sums", optimizer=SGD)
STILL = SUMS.replace(optimizer=SGD.replace(learning_rate=1e-12))


def sampled(client, prompts=6, group_size=4, seed=0, **options):
    sampler = PolicySampler(client, group_size, max_new_tokens=4, seed=seed, **options)
    batch = sampler.generate_trajectories(datasets.sums(prompts, seed=seed))
    for number, rollout in enumerate(batch):
        rollout.reward = (0.3 * number) % 1.0
    return batch


def without(batch, left_out):
    """Return the batch as it would be had these rollouts never been drawn."""
    groups = [
        type(g)(g.prompt_id, g.prompt, [t for t in g.rollouts if id(t) not in left_out], g.meta)
        for g in batch.groups
    ]
    return TrajectoryBatch([group for group in groups if group.rollouts], batch.sampling)


class GradientClient(EngineClient):
    """Keeps the gradient that each optimiser step was taken with."""

    def __init__(self, config=STILL):
        super().__init__(config)
        self.gradients = []

    def optim_step(self):
        self.gradients.append(self.gradient())
        return super().optim_step()

    def gradient(self):
        """Of all that is trained, the value head too."""
        zero = torch.zeros_like
        return torch.cat([(zero(p) if p.grad is None else p.grad).flatten() for p in self.engine.parameters])


# unscored rollouts stand outside

ALGORITHMS = {
    "rloo": lambda: REINFORCE("rloo"),
    "a running mean": lambda: REINFORCE("reinforce"),
    "scale batch": lambda: REINFORCE(baseline="group", scale="batch", aggregation="token_mean"),
    "grpo": lambda: PPO("grpo"),
    "dr_grpo": lambda: PPO("dr_grpo"),
    "gspo": lambda: PPO("gspo", ppo_epochs=2),
    "an entropy bonus": lambda: PPO("grpo", entropy_coef=0.1),
    "reinforce_pp": lambda: REINFORCE("reinforce_pp", kl_coef=0.0),
    "reinforce_pp_baseline": lambda: REINFORCE("reinforce_pp_baseline", kl_coef=0.0),
    "a KL in the reward": lambda: REINFORCE("reinforce_pp", kl_coef=0.1),
    "a KL in the loss": lambda: REINFORCE("rloo", kl_coef=0.1, kl_in="loss"),
    "a value head": lambda: PPO("ppo_value", ppo_epochs=2, value_head=ValueOptions(warmup=0, lam=0.9)),
    "a value head that warms up": lambda: PPO("ppo_value", value_head=ValueOptions(warmup=1)),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_batch_without_its_unscored_rollouts_is_the_same_batch(name):
    found = []
    for drop in (False, True):
        client = GradientClient(SUMS.replace(value_head="value head" in name))
        batch = sampled(client)
        unscored = {
            id(batch[number]) for number in (0, 5, 6, 20, 21, 22, 23)
        }  # single ones, and a whole prompt
        for rollout in batch:
            rollout.reward = None if id(rollout) in unscored else rollout.reward
        used = without(batch, unscored) if drop else batch
        result = ALGORITHMS[name]().update(used, client).result()
        scored = [t.advantage for t in used if t.reward is not None]
        assert not any(np.any(t.advantage) for t in used if t.reward is None)
        found.append((scored, client.gradients, result))
    (kept, gradients, whole), (alone, other_gradients, part) = found
    for some, other in zip(kept, alone, strict=True):
        assert some == pytest.approx(other, rel=1e-5, abs=1e-6)
    for some, other in zip(gradients, other_gradients, strict=True):
        assert (some - other).norm() <= 1e-4 * other.norm()
    assert whole.tokens == part.tokens
    assert whole.policy_loss == pytest.approx(part.policy_loss, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("aggregation", ["const", "sum"])
def test_private_weights_of_a_prompt_depend_on_its_own_rollouts_alone(aggregation):
    batch, config = sampled(EngineClient(SUMS)), PPOConfig(aggregation=aggregation)
    before = group_weights(batch, loss_mask(batch, True), config)[:4]
    for rollout in list(batch)[4:]:
        rollout.reward = None
    assert np.array_equal(group_weights(batch, loss_mask(batch, True), config)[:4], before)
    batch[0].reward = None
    after = group_weights(batch, loss_mask(batch, True), config)[:4]
    assert not after[0].any()
    assert after.sum() <= before.sum(), "an unscored rollout must not make a prompt weigh more"


# the normaliser


@pytest.mark.parametrize("aggregation", ["const", "seq_mean", "token_mean"])
@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("quiet", [0, 3, 6], ids=lambda quiet: f"{quiet} prompts without signal")
def test_the_mean_gradient_of_any_minibatches_is_that_of_the_whole(aggregation, parts, quiet):
    found = []
    for minibatches in (1, parts):
        client = GradientClient()
        batch = sampled(client, prompts=8)
        for group in batch.groups[:quiet]:
            for rollout in group.rollouts:
                rollout.reward = 1.0
        PPO("grpo", aggregation=aggregation, minibatches=minibatches, mask_truncated=False).update(
            batch, client
        )
        found.append(torch.stack(client.gradients))
    whole, several = found
    assert len(several) == min(parts, 8 - quiet)
    assert (several.mean(0) - whole[0]).norm() <= 1e-4 * whole[0].norm()


# pass@k


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_answer(samples):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        answers = [number < right for number in range(samples)]
        exhaustive = np.mean([any(chosen) for chosen in itertools.combinations(answers, k)])
        assert pass_at_k(samples, right, k) == pytest.approx(exhaustive, abs=1e-12)


def test_pass_at_k_is_unbiased_for_fewer_answers_than_were_sampled():
    p, samples, k = 0.2, 6, 3
    weights = [np.prod([1.0 * (samples - i) / (i + 1) for i in range(c)]) * p**c * (1 - p) ** (samples - c)
               for c in range(samples + 1)]  # fmt: skip
    expected = sum(weight * pass_at_k(samples, c, k) for c, weight in enumerate(weights))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 2)])
def test_pass_at_k_needs_k_samples(samples, right, k):
    with pytest.raises(ValidationError, match="pass@"):
        pass_at_k(samples, right, k)


def held_out_metrics(scores, true=None, threshold=0.5, **options):
    """Measure held-out answers with (reward, score of the part `exact`) each, a list for every prompt."""
    client = EngineClient(SUMS)
    samples = len(scores[0])
    sampling = SamplingConfig(max_new_tokens=4, num_samples=samples)
    held_out = HeldOut(client, ["1+1="] * len(scores), sampling, "never", threshold=threshold, **options)
    batch = sampled(client, prompts=len(scores), group_size=samples)
    for rollout, (reward, exact) in zip(batch, itertools.chain(*scores), strict=True):
        rollout.reward, rollout.reward_parts = reward, {} if exact is None else {"exact": exact}
    report = ScoreReport(0, 0, 0, 0, {"exact": FunctionReport(0.25, 0.0)}, true=true)
    return held_out.measure(batch, sampled(client, prompts=len(scores), group_size=1), lambda batch: report)


def test_an_answer_is_right_by_the_true_part_whatever_the_others_pay():
    wrong_in_form, right_out_of_form = (0.6, 0.0), (0.4, 1.0)
    scores = [[wrong_in_form] * 4, [wrong_in_form] * 3 + [right_out_of_form]]
    by_aim, by_sum = held_out_metrics(scores, true="exact"), held_out_metrics(scores)
    assert {name: by_aim[f"eval/pass@{name}"] for name in (1, 2, 4)} == {1: 0.125, 2: 0.25, 4: 0.5}
    assert by_sum["eval/pass@4"] == 1.0
    assert by_aim["eval/rewards/exact"] == 0.25
    assert by_aim["eval/rewards/true"] == 0.125


def test_the_threshold_and_the_ks_are_ones_own():
    scores = [[(0.3, None), (0.7, None), (0.9, None)]]
    assert held_out_metrics(scores, threshold=0.8, pass_at=(1, 3))["eval/pass@1"] == pytest.approx(1 / 3)
    assert "eval/pass@2" not in held_out_metrics(scores, pass_at=(1, 3))
    assert {"eval/pass@1", "eval/pass@2", "eval/pass@3"} <= set(held_out_metrics(scores))
    for ks in [(4,), (0,), (True,)]:
        with pytest.raises(ValidationError, match="eval_samples=3"):
            held_out_metrics(scores, pass_at=ks)


def test_an_answer_that_was_not_scored_is_no_wrong_one():
    scores = [[(None, None), (1.0, None), (0.0, None)], [(None, None)] * 3]
    found = held_out_metrics(scores, pass_at=(1, 2, 3))
    assert (found["eval/pass@1"], found["eval/pass@2"]) == (0.5, 1.0)
    assert np.isnan(found["eval/pass@3"]), "no prompt has three answers to tell it from"


# entropy


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"fixed_length": True}], ids=str)
def test_the_samplers_entropy_is_the_exact_one_of_the_same_positions(options):
    client = EngineClient(SUMS)
    batch = sampled(client, **options)
    scored = client.engine.compute_logprobs(pack(list(batch), {}), batch.sampling.temperature)
    width = int(batch.lengths.max())
    exact = unpack(list(batch), scored.entropy, width).sum() / batch.lengths.sum()
    assert entropy_of(batch) == pytest.approx(exact, rel=1e-4)


def test_the_entropy_of_a_cut_distribution_is_that_of_what_can_be_drawn():
    client = EngineClient(TrainingConfig(model_ref="builtin:tiny"))
    with pytest.warns(UserWarning, match="top_k"):
        sampler = PolicySampler(client, 4, 6, top_k=2, fixed_length=True, seed=0, chat="never")
    batch = sampler.generate_trajectories(["a"])
    assert 0 < entropy_of(batch) <= np.log(2) + 1e-6
    greedy = client.engine.sample(["a"], SamplingConfig(max_new_tokens=4, temperature=0.0))
    assert [sequence.entropy for sequence in greedy.sequences] == [0.0]


@pytest.mark.parametrize("rewards", ["mixed", "equal", "one unscored"])
def test_entropy_is_that_of_the_whole_batch_whatever_was_rewarded(rewards):
    client = EngineClient(STILL)
    batch = sampled(client)
    for rollout in batch if rewards == "equal" else ():
        rollout.reward = 1.0
    if rewards == "one unscored":
        batch[3].reward = None
    weights = batch.lengths / batch.lengths.sum()
    expected = sum(weight * rollout.entropy for weight, rollout in zip(weights, batch, strict=True))
    result = PPO("grpo").update(batch, client).result()
    assert result.entropy == pytest.approx(expected)
    assert rollout_metrics(batch)["entropy"] == pytest.approx(expected)
    assert (result.skipped is None) == (rewards != "equal")


def test_the_trained_parts_entropy_has_a_name_of_its_own():
    client = EngineClient(STILL)
    batch = sampled(client)
    for rollout in batch.groups[0].rollouts:
        rollout.reward = 1.0
    taught = [t for group in batch.groups[1:] for t in group.rollouts if not t.truncated]
    result = PPO("grpo").update(batch, client).result()
    expected = np.average([t.entropy for t in taught], weights=[len(t.tokens) for t in taught])
    assert result.metrics["entropy_trained"] == pytest.approx(expected, rel=1e-4)


def test_rollouts_of_a_sampler_that_does_not_say_have_no_entropy():
    batch = sampled(EngineClient(SUMS))
    batch[7].entropy = None
    assert entropy_of(batch) is None


# how far an update moved the policy


def moved(client, batch, algo, mask_truncated=True):
    """Return what the update reports, and KL(old ‖ new) and the largest log-ratio over all it trained on."""
    rows, data = list(batch), pack(list(batch), {})
    mask = loss_mask(batch, mask_truncated)
    before = unpack(rows, client.engine.compute_logprobs(data).logprobs, mask.shape[1])
    result = algo.update(batch, client).result()
    mask = mask * np.array([bool(np.any(t.advantage)) for t in rows])[:, None]
    difference = (unpack(rows, client.engine.compute_logprobs(data).logprobs, mask.shape[1]) - before) * mask
    return result, (np.expm1(difference) - difference).sum() / mask.sum(), np.abs(difference).max()


MOVES = [(1, 1), (2, 1), (1, 3), (3, 2)]


@pytest.mark.parametrize(("epochs", "minibatches"), MOVES)
def test_on_all_rows_the_reported_move_is_the_move_after_the_last_step(epochs, minibatches, monkeypatch):
    monkeypatch.setattr(measurement, "SHARE", 10.0)
    client = EngineClient(SUMS)
    algo = PPO("grpo", ppo_epochs=epochs, minibatches=minibatches)
    result, kl, furthest = moved(client, sampled(client, prompts=12), algo)
    assert result.approx_kl == pytest.approx(kl, rel=1e-3)
    reported = result.metrics["policy/log_ratio_max"]  # between two steps a token may have been further still
    assert (
        reported == pytest.approx(furthest, rel=1e-3)
        if epochs * minibatches == 1
        else reported > 0.99 * furthest
    )


@pytest.mark.parametrize("epochs", [1, 2, 4])
def test_a_sample_within_the_budget_tells_the_move(epochs):
    client = EngineClient(SUMS)
    batch = sampled(client, prompts=32, group_size=8)
    for rollout in batch:
        rollout.reward = float(rollout.response == rollout.meta["answer"])
    sent = []
    scoring = client.compute_logprobs
    client.compute_logprobs = lambda data, *a, **k: sent.append(len(data)) or scoring(data, *a, **k)
    result, kl, _ = moved(client, batch, PPO("grpo", ppo_epochs=epochs))
    trained = sum(len(data) for data, *_ in client.batches)
    assert result.approx_kl == pytest.approx(kl, rel=0.3)
    read_before = sent[:-1] if epochs > 1 else []
    assert sent[-1] <= 0.02 * (3 * trained + sum(read_before)), (
        "2 % of an update, a gradient being three passes"
    )


def test_what_the_sampler_knew_and_what_is_read_for_it_give_the_same_move(monkeypatch):
    monkeypatch.setattr(measurement, "SHARE", 10.0)
    reported = []
    for forgotten in (False, True):
        client = EngineClient(SUMS)
        batch = sampled(client)
        if forgotten:
            for rollout in batch:
                rollout.policy_version = None
        reported.append(REINFORCE("rloo").update(batch, client).result().approx_kl)
        assert client.operations.count("logprobs") == 1 + forgotten
    assert reported[0] == pytest.approx(reported[1], rel=1e-3)
    assert reported[0] > 0


def test_of_small_updates_one_in_ten_is_measured_and_the_others_claim_nothing():
    client, algo = EngineClient(SUMS), REINFORCE("rloo")
    results = [algo.update(sampled(client), client).result() for _ in range(11)]
    assert [not math.isnan(result.approx_kl) for result in results] == [True, *[False] * 9, True]
    assert ["policy/log_ratio_max" in result.metrics for result in results] == [True, *[False] * 9, True]
    assert client.operations.count("logprobs") == 2


def test_updates_that_can_bear_it_are_all_measured_and_smaller_ones_together():
    pace = Pace()
    assert [pace.is_due(tokens) for tokens in (20_000, 12_000, 5_000, 5_000, 5_000, 5_000)] == [
        True, True, False, False, True, False,
    ]  # fmt: skip


def test_which_update_is_measured_next_survives_a_checkpoint():
    client, algo, other = EngineClient(SUMS), REINFORCE("rloo"), REINFORCE("rloo")
    for _ in range(3):
        algo.update(sampled(client), client).result()
    other.load_state_dict(algo.state_dict())
    assert other.pace == algo.pace != Pace()


def test_a_value_head_that_warms_up_has_not_moved_the_policy():
    client = EngineClient(SUMS.replace(value_head=True))
    result = PPO("ppo_value", value_head=ValueOptions(warmup=1)).update(sampled(client), client).result()
    assert result.approx_kl == 0
    assert client.operations.count("logprobs") == 1, "the values; nothing is measured"


# rollouts of an older policy


def test_rollouts_of_another_version_are_noted_and_counted():
    client = EngineClient(SUMS)
    batch = sampled(client)
    fresh = REINFORCE("rloo").update(batch, client).result()
    again = REINFORCE("rloo").update(batch, client).result()
    assert (fresh.notes, fresh.metrics["staleness/max"]) == ((), 0.0)
    assert (again.metrics["staleness/mean"], again.metrics["staleness/max"]) == (1.0, 1.0)
    (note,) = again.notes
    assert "24 of 24" in note and "not corrected" in note
    (note,) = REINFORCE("rloo", tis_cap=2.0).update(batch, client).result().notes
    assert "corrected by tis_cap=2" in note


def test_half_a_stale_batch_is_half_as_old():
    client = EngineClient(SUMS)
    batch = sampled(client)
    for rollout in list(batch)[:12]:
        rollout.policy_version = -4
    metrics = REINFORCE("rloo").update(batch, client).result().metrics
    assert (metrics["staleness/mean"], metrics["staleness/max"]) == (2.0, 4.0)


def test_with_tis_the_gradient_of_a_stale_batch_is_that_of_importance_sampling():
    """∇(ρA) = ρ A ∇log π with ρ = π_now / π_then: REINFORCE times a factor that no cap reaches."""
    client = GradientClient(SUMS)
    batch = sampled(client)
    REINFORCE("rloo").update(batch, client)  # the policy has moved on
    client.gradients.clear()
    REINFORCE("rloo", tis_cap=1e9).update(batch, client)
    (sent, _, _), (found,) = client.batches[-1], client.gradients
    other = GradientClient()
    other.engine.model.causal.load_state_dict(client.engine.model.causal.state_dict())
    extras = {name: value for name, value in sent.extras.items() if name != "sampler_logprobs"}
    extras["old_logprobs"] = sent.extras["sampler_logprobs"]
    again = type(sent)(sent.input_ids, sent.attention_mask, sent.labels, extras)
    # the step of the corrected update is undone: its gradient was taken at the weights before it
    for parameter, gradient in zip(other.engine.parameters, split_like(found, other), strict=True):
        parameter.data += SGD.learning_rate * gradient
    other.forward_backward(again, "policy_is", {"temperature": 1.0})
    assert (other.gradient() - found).norm() <= 1e-3 * found.norm()


def split_like(flat, client):
    """Cut a flat gradient into the shapes of the parameters."""
    at = 0
    for parameter in client.engine.parameters:
        yield flat[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()


def test_a_correction_without_what_the_sampler_said_is_refused():
    client = EngineClient(SUMS)
    batch = sampled(client)
    batch[0].logprobs = None
    with pytest.raises(ValidationError, match="tis_cap"):
        REINFORCE("rloo", tis_cap=2.0).update(batch, client)
    assert client.operations == ["sample"]


# another reward


def test_an_algorithm_lets_go_of_what_another_reward_has_taught():
    client = EngineClient(SUMS.replace(value_head=True))
    algo = REINFORCE("reinforce")
    algo.update(sampled(client), client)
    assert algo.ema.value is not None
    algo.forget_reward()
    assert algo.ema.value is None
    critic = PPO("ppo_value", value_head=ValueOptions(warmup=1))
    names = []
    for _ in range(2):
        critic.update(sampled(client), client)
        names.append(client.batches[-1][1])
    critic.forget_reward()
    critic.update(sampled(client), client)
    assert [*names, client.batches[-1][1]] == ["policy_value", "policy_clip", "policy_value"]


def test_the_running_baseline_is_of_rewards_with_their_penalty_inside():
    client = EngineClient(SUMS)
    algo = REINFORCE("reinforce", kl_coef=0.5)
    plain = REINFORCE("reinforce")
    for _ in range(2):
        batch = sampled(client)
        algo.update(batch, client)
        plain.ema.update(batch.rewards)
    assert algo.ema.value < plain.ema.value, "the second batch had moved from the reference, and paid for it"


def test_checkpoints_of_before_have_one_count_for_updates_and_warm_up():
    algo = PPO("ppo_value")
    algo.load_state_dict({"total": 0.0, "ema_updates": 3, "updates": 3, "has_reference": False})
    assert (algo.updates, algo.head_updates) == (3, 3)
    assert REINFORCEConfig() == REINFORCE().config


def test_a_move_is_not_claimed_where_another_update_got_in_between():
    """Two updates queued at once: when the second is made, the client still shows the version of the first's start."""

    class Behind(EngineClient):
        policy_version = 0  # what a client shows while steps wait in its queue

    client = Behind(SUMS)
    batch = sampled(client)
    first, second = (REINFORCE("rloo").update(batch, client).result() for _ in range(2))
    assert first.approx_kl > 0
    assert np.isnan(second.approx_kl)
    assert second.metrics["staleness/max"] == 1.0 and second.notes
