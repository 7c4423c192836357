"""Samplers of rollouts: the policy behind a training client, and a mock."""

import random
import warnings
from collections.abc import Callable, Sequence
from typing import get_args

from tensafe_nb.checks import checked
from tensafe_nb.config import Precision, SamplingConfig, SamplingEngine, check_engine
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.futures import FutureHandle, combine
from tensafe_nb.protocol.results import SampledSequence, SampleResult
from tensafe_nb.rlvr.policy import PRIVATE, PolicyClient
from tensafe_nb.rlvr.rollouts.prompts import Chat, PromptItem, PromptSpec, prompt_items, prompt_specs
from tensafe_nb.rlvr.rollouts.trajectories import MOCK, RolloutGroup, Trajectory, TrajectoryBatch


class PolicySampler:
    """Samples groups of rollouts from a training client's current weights.

    A sample takes its place in the client's queue: submitted after `optim_step`, it sees the new weights.

    Args:
        training_client: Whose policy to sample.
        group_size: Rollouts per prompt.
        max_new_tokens: Longest completion, in tokens.
        temperature: Divides the logits; 1 samples the policy itself.
        top_p: Below 1 cuts the distribution; the update does not correct for that.
        top_k: Above 0 cuts the distribution likewise.
        stop: Strings that end a completion.
        fixed_length: Go on past end tokens: every completion has `max_new_tokens`, none counts as truncated.
        chat: "auto" sends texts as they are and warns, once, if the model has a chat template; "never" sends them
            without a warning; "always" makes each text the message of a user. Messages always go by the template.
        seed: Makes the rollouts repeatable; None takes the client's next seed.
        precision: Of the weights that sample, as in `SamplingConfig`; an update corrects for what it changes.
        engine: What computes, as in `SamplingConfig`; likewise.

    Example:
        >>> sampler = PolicySampler(tc, group_size=8, max_new_tokens=5)
        >>> batch = sampler.generate_trajectories([{"prompt": "12+34=", "answer": "046"}])
        >>> len(batch)
        8
    """

    @checked
    def __init__(
        self,
        training_client: PolicyClient,
        group_size: int = 8,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        *,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: str | Sequence[str] | None = (),
        fixed_length: bool = False,
        chat: Chat = "auto",
        seed: int | None = None,
        precision: Precision = "exact",
        engine: SamplingEngine = "torch",
    ) -> None:
        if chat not in get_args(Chat):
            raise ValidationError(
                f"chat={as_given(chat)} must be one of {', '.join(map(repr, get_args(Chat)))}."
            )
        self.sampling = SamplingConfig(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            num_samples=group_size,
            stop=stop,  # type: ignore[arg-type]  # it takes a text and None too
            ignore_end=fixed_length,
            alone=True,
            precision=precision,
            engine=engine,
        )
        if engine != "torch":
            check_engine(self.sampling, training_client.config)
        if top_p < 1 or top_k > 0:
            warnings.warn(
                "top_p < 1 or top_k > 0 samples from a cut distribution, the update trains the whole one: "
                "expect biased gradients. Leave both at their defaults for training.",
                stacklevel=3,  # past `checked`
            )
        self.chat = chat
        self._client = training_client
        self._seed = seed
        self._looked = chat != "auto"  # whether texts have been compared with the model's template
        self.draws = 0  # batches drawn so far: all there is to save

    def __repr__(self) -> str:
        return f"PolicySampler({self._client.training_client_id}, {self.sampling!r})"

    def generate_trajectories(self, prompts: Sequence[PromptSpec]) -> TrajectoryBatch:
        """Sample and wait.

        Args:
            prompts: Texts, chat messages, or dicts with `prompt` and further columns.

        Raises:
            ValidationError: A prompt that is none of these.
        """
        specs = prompt_specs(prompts)  # a stream can be read once
        batch = self.submit(specs).result()
        self.warn_of_texts(specs)
        return batch

    def rollouts(
        self, prompts: Sequence[PromptSpec], wait: Callable[[FutureHandle[TrajectoryBatch]], TrajectoryBatch]
    ) -> TrajectoryBatch:
        """Sample, and let `wait` wait."""
        batch = wait(self.submit(prompts))
        self.warn_of_texts(prompts)
        return batch

    def close(self) -> None:
        """End nothing: there is nothing to end."""

    def submit(self, prompts: Sequence[PromptSpec]) -> FutureHandle[TrajectoryBatch]:
        """Queue the sampling and return at once with a handle on the batch."""
        sampling = self.sampling
        if self._seed is not None:
            sampling = sampling.replace(seed=random.Random(f"{self._seed}/{self.draws}").getrandbits(48))
        self.draws += 1
        return submit_rollouts(self._client, prompts, sampling, self.chat)

    def warn_of_texts(self, prompts: Sequence[PromptSpec]) -> None:
        """Warn, once, of texts that go to a chat model as they are; waits for the model to be loaded."""
        looked, self._looked = self._looked, True
        if looked or not any(isinstance(item.content, str) for item in prompt_items(prompts)):
            return
        if getattr(self._client.tokenizer, "chat_template", None) is not None:
            warnings.warn(
                "The model has a chat template, and the prompts are plain texts: they are sent as they are, and a chat "
                'model may answer such a text with endless prose. chat="always" makes each the message of a user; '
                'chat="never" keeps them and this warning away.',
                stacklevel=3,
            )


def submit_rollouts(
    client: PolicyClient, prompts: Sequence[PromptSpec], sampling: SamplingConfig, chat: Chat = "auto"
) -> FutureHandle[TrajectoryBatch]:
    """Queue `sampling.num_samples` rollouts of each prompt and return at once with a handle on the batch."""
    items = prompt_items(prompts)
    private = PRIVATE in client.capabilities
    sampled = client.sample([item.sent(chat) for item in items], sampling=sampling)
    return combine(
        [sampled],
        lambda results: batch_of(items, results[0], sampling, private),
        operation="sample",
        result_type=TrajectoryBatch,
    )


def batch_of(
    items: Sequence[PromptItem], result: SampleResult, sampling: SamplingConfig, private: bool = False
) -> TrajectoryBatch:
    """Return what the core sampled, with each sequence in the group of its prompt."""
    groups = [
        RolloutGroup(item.prompt_id, item.text, [], item.meta, result.policy_version, sampling.seed)
        for item in items
    ]
    for sequence in result.sequences:
        group, item = groups[sequence.prompt_index], items[sequence.prompt_index]
        group.rollouts.append(trajectory_of(item, sequence, result.policy_version))
    return TrajectoryBatch(groups, sampling.as_drawn(result.precision), private)


def trajectory_of(item: PromptItem, sequence: SampledSequence, policy_version: int) -> Trajectory:
    """Return a sampled sequence as a rollout, which is not scored yet."""
    return Trajectory(
        item.text,
        sequence.text,
        item.meta,
        list(sequence.prompt_tokens),
        list(sequence.tokens),
        list(sequence.logprobs),
        list(sequence.raw_logprobs),
        finish_reason=sequence.finish_reason,
        policy_version=policy_version,
        seed=sequence.seed,
        prompt_id=item.prompt_id,
        entropy=sequence.entropy,
        messages=item.messages,
    )


_CANNED = (
    "The answer is {number}.",
    "The solution is {number}.",
    "Let me think step by step. The final answer is {number}.",
    "Here is my solution: {number}",
    "I think it is {number}.",
    "It could be {number}, but I am not sure.",
    "I do not know.",
    "That is a good question.",
)


class MockRolloutSampler:
    """A stand-in for a model: canned responses, for demonstrations and tests without one.

    Its rollouts come from no policy. An update on them is real, and flagged "off-policy: mock data".

    Args:
        max_new_tokens: Longest response, in words; no model, no tokens.
        group_size: Rollouts per prompt.
        seed: The same seed gives the same responses.

    Example:
        >>> MockRolloutSampler(seed=0).generate_trajectories(["What is 3 * 4?"])
        <TrajectoryBatch 4 rollouts of 1 prompts, mean reward nan, mock data>
    """

    @checked
    def __init__(self, max_new_tokens: int = 64, group_size: int = 4, seed: int = 0) -> None:
        self.sampling = SamplingConfig(max_new_tokens=max_new_tokens, num_samples=group_size, seed=seed)
        self._random = random.Random(seed)

    def __repr__(self) -> str:
        limit = self.sampling.max_new_tokens
        return f"<MockRolloutSampler max_new_tokens={limit}: canned responses, no model>"

    def generate_trajectories(self, prompts: Sequence[PromptSpec]) -> TrajectoryBatch:
        """Return canned responses to the prompts, `group_size` each."""
        size, seed = self.sampling.num_samples, self.sampling.seed
        groups = [
            RolloutGroup(
                item.prompt_id, item.text, [self.rollout(item) for _ in range(size)], item.meta, MOCK, seed
            )
            for item in prompt_items(prompts)
        ]
        return TrajectoryBatch(groups, self.sampling)

    def rollout(self, item: PromptItem) -> Trajectory:
        """Return the next canned response, as a rollout of this prompt."""
        words = self._random.choice(_CANNED).format(number=self._random.randrange(20)).split()
        limit = self.sampling.max_new_tokens
        return Trajectory(
            item.text,
            " ".join(words[:limit]),
            item.meta,
            finish_reason="length" if len(words) > limit else "stop",
            policy_version=MOCK,
            prompt_id=item.prompt_id,
            messages=item.messages,
        )
