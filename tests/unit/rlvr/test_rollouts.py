"""Trajectories, their groups, and the two samplers."""

import math

import numpy as np
import pytest

from tensafe_nb.config import SamplingConfig
from tensafe_nb.errors import ValidationError
from tensafe_nb.futures import FutureHandle, completed
from tensafe_nb.rlvr import MockRolloutSampler, PolicySampler, RolloutGroup, Trajectory, TrajectoryBatch
from tensafe_nb.rlvr.rollouts import PromptItem
from tensafe_nb.types import SampledSequence, SampleResult


def batch_of(*groups, tokens=2, **fields):
    return TrajectoryBatch(
        [
            RolloutGroup(
                f"g{number}",
                "p",
                [Trajectory("p", "r", reward=reward, tokens=[1] * tokens, **fields) for reward in rewards],
            )
            for number, rewards in enumerate(groups)
        ],
        SamplingConfig(max_new_tokens=4),
    )


def test_a_batch_is_a_list_of_the_trajectories_of_all_groups():
    batch = batch_of([1, 2], [3])
    assert len(batch) == 3
    assert [trajectory.reward for trajectory in batch] == [1, 2, 3]
    assert batch[-1].reward == 3
    assert [trajectory.reward for trajectory in batch[1:]] == [2, 3]
    assert batch[0] in batch


def test_statistics_are_computed_when_read():
    batch = batch_of([0, 0], [0, 0])
    assert batch.mean_reward == 0
    for trajectory in batch:
        trajectory.reward = 2.0
    batch[0].reward = 0.0
    assert batch.mean_reward == 1.5
    assert batch.std_reward == pytest.approx(1.0)
    assert batch.reward_std_by_group.tolist() == pytest.approx([math.sqrt(2), 0])
    assert batch.frac_zero_signal == 0.5


def test_unscored_rollouts_are_left_out_of_every_statistic():
    batch = batch_of([1, None], [3, 5], [None, None])
    assert batch.mean_reward == 3
    assert np.isnan(batch.reward_std_by_group[[0, 2]]).all()
    assert batch.frac_zero_signal == 0.5  # the group with nothing scored is no group here
    assert np.isnan(batch.rewards).tolist() == [False, True, False, False, True, True]
    assert (batch.groups[1].mean, batch.groups[1].std) == (4, pytest.approx(math.sqrt(2)))


def test_with_nothing_scored_the_mean_is_nan_and_still_formats():
    batch = batch_of([None, None])
    assert f"{batch.mean_reward:.3f}" == "nan"
    assert math.isnan(batch.std_reward)
    assert math.isnan(batch.frac_zero_signal)


def test_lengths_and_truncation_are_read_from_the_tokens_and_the_finish_reason():
    batch = batch_of([1, 1], [1, 1])
    batch[0].finish_reason = "length"
    batch[1].finish_reason = "fixed"
    assert batch.lengths.tolist() == [2, 2, 2, 2]
    assert batch.clipped_ratio == 0.25


def test_the_mock_says_in_its_repr_that_it_is_one_and_so_does_its_batch():
    sampler = MockRolloutSampler(max_new_tokens=64)
    assert "Mock" in repr(sampler)
    assert "mock data" in repr(sampler.generate_trajectories(["What is 3 * 4?"]))


def test_the_mock_repeats_itself_with_the_same_seed_and_varies_within_a_batch():
    def responses(seed):
        return [
            t.response for t in MockRolloutSampler(group_size=16, seed=seed).generate_trajectories(["a", "b"])
        ]

    assert responses(0) == responses(0) != responses(1)
    assert len(set(responses(0))) > 4
    with_keyword = ["answer" in text or "solution" in text for text in responses(0)]
    assert any(with_keyword)
    assert not all(with_keyword)


def test_the_mock_keeps_to_the_limit_and_marks_what_it_cut():
    batch = MockRolloutSampler(max_new_tokens=3, group_size=16).generate_trajectories(["a"])
    assert max(len(trajectory.response.split()) for trajectory in batch) == 3
    assert batch.clipped_ratio > 0


class OneTokenClient:
    """Answers every prompt with its own number."""

    training_client_id = "tc-test"

    def __init__(self):
        self.calls = []

    def sample(self, prompts, sampling):
        self.calls.append((prompts, sampling))
        sequences = tuple(
            SampledSequence(index, f"{index}", (7, 8), (index, 1), (-1.0, -2.0), (-1.5, -2.5), "stop", 99)
            for index in range(len(prompts))
            for _ in range(sampling.num_samples)
        )
        return completed(SampleResult(sequences, 5), operation="sample", training_client_id="tc-test")


def test_the_policy_sampler_groups_what_the_client_sampled_by_prompt():
    sampler = PolicySampler(OneTokenClient(), group_size=2, max_new_tokens=4)
    batch = sampler.generate_trajectories(["first", {"prompt": "second", "answer": "046"}])
    assert [len(group.rollouts) for group in batch.groups] == [2, 2]
    last = batch[-1]
    assert (last.prompt, last.response, last.meta) == ("second", "1", {"answer": "046"})
    assert (last.prompt_tokens, last.tokens, last.policy_version, last.seed) == ([7, 8], [1, 1], 5, 99)
    assert (last.logprobs, last.raw_logprobs) == ([-1.0, -2.0], [-1.5, -2.5])


def test_the_policy_sampler_sends_every_sampling_parameter():
    client = OneTokenClient()
    PolicySampler(client, group_size=2, max_new_tokens=4, stop="\n", seed=3).generate_trajectories(["a"])
    (_, sampling), *_ = client.calls
    fields = sampling.model_dump()
    assert fields.pop("seed") is not None
    assert fields == {
        "max_new_tokens": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "num_samples": 2,
        "stop": ("\n",),
        "ignore_end": False,
    }


def test_a_seeded_policy_sampler_repeats_its_seeds_but_none_twice():
    def seeds(seed):
        client = OneTokenClient()
        sampler = PolicySampler(client, seed=seed)
        for _ in range(3):
            sampler.generate_trajectories(["a"])
        return [sampling.seed for _, sampling in client.calls]

    assert seeds(0) == seeds(0) != seeds(1)
    assert len(set(seeds(0))) == 3
    assert seeds(None) == [None] * 3


def test_submit_returns_a_handle_that_lends_the_batchs_statistics():
    handle = PolicySampler(OneTokenClient(), group_size=2).submit(["a"])
    assert isinstance(handle, FutureHandle)
    assert handle.clipped_ratio == 0
    assert len(handle.result()) == 2


def test_cutting_the_distribution_warns():
    with pytest.warns(UserWarning, match="biased"):
        PolicySampler(OneTokenClient(), top_p=0.9)


def test_chat_messages_are_sent_as_they_are_and_shown_to_the_reward_as_text():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3 * 4?"}]
    client = OneTokenClient()
    batch = PolicySampler(client, group_size=1).generate_trajectories(
        [messages, {"prompt": messages, "answer": 12}]
    )
    assert client.calls[0][0] == [messages, messages]
    assert [trajectory.prompt for trajectory in batch] == ["Be brief.\n3 * 4?"] * 2
    assert batch[1].meta == {"answer": 12}


def test_the_prompt_id_depends_on_the_prompt_and_its_columns_alone():
    ids = [
        PromptItem.of(spec).prompt_id for spec in ("a", {"prompt": "a"}, {"prompt": "a", "answer": 1}, "b")
    ]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    "prompts", [[], ["a", ""], [3], [{"text": "a"}], [[{"role": "user"}]], "a", [[1, 2]]]
)
def test_what_is_no_prompt_is_refused(prompts):
    with pytest.raises(ValidationError, match="prompt"):
        MockRolloutSampler().generate_trajectories(prompts)
