"""The two samplers: a policy behind a training client, and a mock that says it is one."""

import warnings
from types import SimpleNamespace

import pytest

from tensafe_nb.errors import ValidationError
from tensafe_nb.futures import FutureHandle, completed
from tensafe_nb.protocol.results import SampledSequence, SampleResult
from tensafe_nb.rlvr import MockRolloutSampler, PolicySampler
from tensafe_nb.rlvr.rollouts.prompts import PromptItem


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

    training_client_id, capabilities = "tc-test", frozenset()

    def __init__(self, chat_template=None):
        self.calls = []
        self.tokenizer = SimpleNamespace(chat_template=chat_template)

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
        "prompt_logprobs": False,
        "precision": "exact",
        "alone": True,
        "stop_tokens": (),
        "top_logprobs": 0,
        "top_prompt_logprobs": 0,
        "engine": "torch",
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


MESSAGES = [{"role": "user", "content": "3 * 4?"}]


def test_a_text_for_a_chat_model_warns_once_and_is_sent_as_it_is():
    sampler = PolicySampler(client := OneTokenClient("{{ messages }}"))
    with pytest.warns(UserWarning, match='chat="always"') as caught:
        for _ in range(2):
            sampler.generate_trajectories(["3 * 4?"])
    assert len(caught) == 1
    assert client.calls[0][0] == ["3 * 4?"]


@pytest.mark.parametrize(
    ("template", "prompt", "chat"),
    [(None, "3 * 4?", "auto"), ("{{ messages }}", MESSAGES, "auto"), ("{{ messages }}", "3 * 4?", "never")],
)
def test_nothing_is_said_where_there_is_nothing_to_mistake(template, prompt, chat):
    client = OneTokenClient(template)
    with warnings.catch_warnings(action="error"):
        PolicySampler(client, chat=chat).generate_trajectories([prompt])
    assert client.calls[0][0] == [prompt]


def test_on_demand_a_text_becomes_the_message_of_a_user_and_the_reward_sees_the_text():
    client = OneTokenClient("{{ messages }}")
    batch = PolicySampler(client, chat="always").generate_trajectories(
        ["3 * 4?", {"prompt": MESSAGES, "answer": 12}]
    )
    assert client.calls[0][0] == [MESSAGES, MESSAGES]
    assert batch.groups[0].prompt == "3 * 4?"
    assert batch.groups[0].prompt_id == PromptItem.of("3 * 4?").prompt_id


def test_an_unknown_way_to_chat_is_refused():
    with pytest.raises(ValidationError, match="'auto' or 'never' or 'always'"):
        PolicySampler(OneTokenClient(), chat="sometimes")


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
