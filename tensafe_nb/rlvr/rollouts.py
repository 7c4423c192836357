"""What was sampled, and who samples it: trajectories grouped by prompt, from the policy or from a mock."""

import hashlib
import json
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, overload

import numpy as np

from tensafe_nb.batch import Array, BatchData
from tensafe_nb.config import SamplingConfig
from tensafe_nb.errors import ValidationError
from tensafe_nb.events import Event
from tensafe_nb.futures import FutureHandle, combine
from tensafe_nb.types import ForwardBackwardResult, Message, OptimStepResult, SampledSequence, SampleResult

MOCK = "mock"
NO_SIGNAL = 1e-6  # rewards of a group that differ by less teach nothing
PromptSpec: TypeAlias = str | Sequence[Message] | Mapping[str, Any]


class PolicyClient(Protocol):
    """What reinforcement learning needs of a training client: the wire contract, embedded or remote."""

    @property
    def training_client_id(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def policy_version(self) -> int: ...
    @property
    def tokenizer(self) -> Any: ...

    def sample(self, prompts: Any, sampling: SamplingConfig) -> FutureHandle[SampleResult]: ...
    def forward_backward(
        self, batch: BatchData, loss_fn: str, loss_kwargs: Mapping[str, Any]
    ) -> FutureHandle[ForwardBackwardResult]: ...
    def optim_step(self) -> FutureHandle[OptimStepResult]: ...
    def publish(self, event: Event) -> Any: ...


@dataclass(slots=True)
class Trajectory:
    """One prompt, one response, and what became of it.

    Attributes:
        prompt: Text as the reward sees it.
        response: Text without stop string and end token.
        meta: The prompt's further columns (answer, …), given to rewards.
        prompt_tokens: The prompt as the model saw it; empty for a mock until it is tokenised in the update.
        tokens: The completion as sampled, end token included.
        logprobs: Per token, under the distribution sampled from.
        raw_logprobs: Per token, at temperature 1 over the whole vocabulary.
        reward: None until scored, and where scoring failed.
        reward_parts: What each part of a composed reward gave, by name.
        reward_error: Why scoring failed.
        reward_version: Which text of which function scored it.
        finish_reason: "stop", "stop_string", "length" or "fixed".
        policy_version: Weights that sampled it; "mock" when none did.
        seed: Of its random stream.
        advantage: Filled in by the update.
        prompt_id: Stable name of the prompt and its columns.
    """

    prompt: str
    response: str
    meta: dict[str, Any] = field(default_factory=dict)
    prompt_tokens: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    raw_logprobs: list[float] | None = None
    reward: float | None = None
    reward_parts: dict[str, float] | None = None
    reward_error: str | None = None
    reward_version: str | None = None
    finish_reason: str = "stop"
    policy_version: int | str | None = None
    seed: int | None = None
    advantage: float | None = None
    prompt_id: str = ""

    @property
    def truncated(self) -> bool:
        """Whether it ran into the token limit."""
        return self.finish_reason == "length"


@dataclass(slots=True)
class RolloutGroup:
    """All rollouts of one prompt. Statistics are over the scored ones."""

    prompt_id: str
    prompt: str
    rollouts: list[Trajectory]
    meta: dict[str, Any] = field(default_factory=dict)
    policy_version: int | str | None = None
    seed: int | None = None

    @property
    def rewards(self) -> Array:
        """(G,) rewards, NaN where unscored."""
        return _rewards(self.rollouts)

    @property
    def mean(self) -> float:
        return mean(_scored(self.rollouts))

    @property
    def std(self) -> float:
        """Bessel's; NaN with fewer than two scored."""
        return bessel_std(_scored(self.rollouts))

    @property
    def has_signal(self) -> bool:
        """Whether the rewards differ."""
        scored = _scored(self.rollouts)
        return scored.size > 1 and bool(np.ptp(scored) > NO_SIGNAL)


@dataclass(slots=True, eq=False, repr=False)
class TrajectoryBatch(Sequence[Trajectory]):
    """All rollouts of a step: a list of trajectories that also knows its groups.

    Statistics are computed when read, since rewards are assigned after sampling; unscored rollouts are left
    out, and with nothing scored they are NaN.

    Attributes:
        groups: One per prompt.
        sampling: How the rollouts were drawn.
    """

    groups: list[RolloutGroup]
    sampling: SamplingConfig

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...
    @overload
    def __getitem__(self, index: slice) -> list[Trajectory]: ...
    def __getitem__(self, index: int | slice) -> Trajectory | list[Trajectory]:
        return list(self)[index]

    def __iter__(self) -> Iterator[Trajectory]:
        return (trajectory for group in self.groups for trajectory in group.rollouts)

    def __len__(self) -> int:
        return sum(len(group.rollouts) for group in self.groups)

    def __repr__(self) -> str:
        mock = ", mock data" if any(trajectory.policy_version == MOCK for trajectory in self) else ""
        return (
            f"<TrajectoryBatch {len(self)} rollouts of {len(self.groups)} prompts, "
            f"mean reward {self.mean_reward:.3f}{mock}>"
        )

    @property
    def rewards(self) -> Array:
        """(N,) rewards, NaN where unscored."""
        return _rewards(self)

    @property
    def mean_reward(self) -> float:
        return mean(_scored(self))

    @property
    def std_reward(self) -> float:
        """Bessel's, over the whole batch: not the spread within groups."""
        return bessel_std(_scored(self))

    @property
    def reward_std_by_group(self) -> Array:
        """(groups,) Bessel std within each group, NaN with fewer than two scored."""
        return np.array([group.std for group in self.groups])

    @property
    def frac_zero_signal(self) -> float:
        """Share of the scored groups whose rewards are all equal."""
        scored = [group for group in self.groups if np.isfinite(group.rewards).any()]
        return mean(np.array([not group.has_signal for group in scored], dtype=float))

    @property
    def lengths(self) -> Array:
        """(N,) tokens per completion, end token included."""
        return np.array([len(trajectory.tokens) for trajectory in self], dtype=np.int64)

    @property
    def clipped_ratio(self) -> float:
        """Share of the rollouts that ran into the token limit."""
        return mean(np.array([trajectory.truncated for trajectory in self], dtype=float))


def mean(values: Array) -> float:
    """Return the mean; NaN of nothing."""
    return float(values.mean()) if values.size else float("nan")


def bessel_std(values: Array) -> float:
    """Return the standard deviation with Bessel's correction; NaN of fewer than two."""
    return float(values.std(ddof=1)) if values.size > 1 else float("nan")


def _rewards(trajectories: Sequence[Trajectory]) -> Array:
    return np.array([float("nan") if t.reward is None else t.reward for t in trajectories], dtype=np.float64)


def _scored(trajectories: Sequence[Trajectory]) -> Array:
    rewards = _rewards(trajectories)
    return rewards[np.isfinite(rewards)]


@dataclass(frozen=True, slots=True)
class PromptItem:
    """A prompt as it is sent, as the reward sees it, and its further columns."""

    content: str | Sequence[Message]
    text: str
    meta: dict[str, Any]

    @classmethod
    def of(cls, spec: PromptSpec) -> "PromptItem":
        """Read a text, a list of chat messages, or a dict with `prompt` and further columns.

        Raises:
            ValidationError: It is none of these.
        """
        meta: dict[str, Any] = {}
        content: Any = spec
        if isinstance(spec, Mapping):
            if "prompt" not in spec:
                raise ValidationError(f"A prompt given as a dict needs 'prompt'; it has {sorted(spec)}.")
            content = spec["prompt"]
            meta = {name: value for name, value in spec.items() if name != "prompt"}
        return cls(content, _prompt_text(content), meta)

    @property
    def prompt_id(self) -> str:
        """A name that depends on the prompt and its columns alone."""
        written = json.dumps([self.content, self.meta], sort_keys=True, default=str)
        return hashlib.sha256(written.encode()).hexdigest()[:12]


def prompt_items(prompts: Sequence[PromptSpec]) -> list[PromptItem]:
    """Read the prompts a user gave.

    Raises:
        ValidationError: There are none, or one cannot be read.
    """
    if isinstance(prompts, str | Mapping):
        raise ValidationError("prompts is a list of prompts: put the one prompt into a list.")
    if not isinstance(prompts, Iterable):
        raise ValidationError(f"prompts is a list of prompts, not {prompts!r}.")
    items = [PromptItem.of(spec) for spec in prompts]
    if not items:
        raise ValidationError("There are no prompts: give at least one.")
    return items


def _prompt_text(content: Any) -> str:
    if isinstance(content, str) and content:
        return content
    if isinstance(content, Sequence) and content and all(_is_message(message) for message in content):
        return "\n".join(message["content"] for message in content)
    raise ValidationError(
        f"A prompt is a text, a list of messages with 'role' and 'content', or a dict with 'prompt' and "
        f"further columns; not {content!r}."
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and {"role", "content"} <= set(message)


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
        seed: Makes the rollouts repeatable; None takes the client's next seed.

    Example:
        >>> sampler = PolicySampler(tc, group_size=8, max_new_tokens=5)
        >>> batch = sampler.generate_trajectories([{"prompt": "12+34=", "answer": "046"}])
        >>> len(batch)
        8
    """

    def __init__(
        self,
        training_client: PolicyClient,
        group_size: int = 8,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        *,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: Sequence[str] = (),
        fixed_length: bool = False,
        seed: int | None = None,
    ) -> None:
        self.sampling = SamplingConfig(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            num_samples=group_size,
            stop=tuple(stop) if not isinstance(stop, str) else (stop,),
            ignore_end=fixed_length,
        )
        if top_p < 1 or top_k > 0:
            warnings.warn(
                "top_p < 1 or top_k > 0 samples from a cut distribution, the update trains the whole one: "
                "expect biased gradients. Leave both at their defaults for training.",
                stacklevel=2,
            )
        self._client = training_client
        self._seed = seed
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
        return self.submit(prompts).result()

    def submit(self, prompts: Sequence[PromptSpec]) -> FutureHandle[TrajectoryBatch]:
        """Queue the sampling and return at once with a handle on the batch."""
        sampling = self.sampling
        if self._seed is not None:
            sampling = sampling.replace(seed=random.Random(f"{self._seed}/{self.draws}").getrandbits(48))
        self.draws += 1
        return submit_rollouts(self._client, prompts, sampling)


def submit_rollouts(
    client: PolicyClient, prompts: Sequence[PromptSpec], sampling: SamplingConfig
) -> FutureHandle[TrajectoryBatch]:
    """Queue `sampling.num_samples` rollouts of each prompt and return at once with a handle on the batch."""
    items = prompt_items(prompts)
    sampled = client.sample([item.content for item in items], sampling=sampling)
    return combine(
        [sampled],
        lambda results: _batch_of(items, results[0], sampling),
        operation="sample",
        result_type=TrajectoryBatch,
    )


def _batch_of(items: Sequence[PromptItem], result: SampleResult, sampling: SamplingConfig) -> TrajectoryBatch:
    groups = [
        RolloutGroup(item.prompt_id, item.text, [], item.meta, result.policy_version, sampling.seed)
        for item in items
    ]
    for sequence in result.sequences:
        group, item = groups[sequence.prompt_index], items[sequence.prompt_index]
        group.rollouts.append(_trajectory_of(item, sequence, result.policy_version))
    return TrajectoryBatch(groups, sampling)


def _trajectory_of(item: PromptItem, sequence: SampledSequence, policy_version: int) -> Trajectory:
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

    def __init__(self, max_new_tokens: int = 64, group_size: int = 4, seed: int = 0) -> None:
        self.sampling = SamplingConfig(max_new_tokens=max_new_tokens, num_samples=group_size, seed=seed)
        self._random = random.Random(seed)

    def __repr__(self) -> str:
        limit = self.sampling.max_new_tokens
        return f"<MockRolloutSampler max_new_tokens={limit}: canned responses, no model>"

    def generate_trajectories(self, prompts: Sequence[PromptSpec]) -> TrajectoryBatch:
        """Return canned responses to the prompts, `group_size` each."""
        return TrajectoryBatch([self._group(item) for item in prompt_items(prompts)], self.sampling)

    def _group(self, item: PromptItem) -> RolloutGroup:
        rollouts = [self._rollout(item) for _ in range(self.sampling.num_samples)]
        return RolloutGroup(item.prompt_id, item.text, rollouts, item.meta, MOCK, self.sampling.seed)

    def _rollout(self, item: PromptItem) -> Trajectory:
        words = self._random.choice(_CANNED).format(number=self._random.randrange(20)).split()
        limit = self.sampling.max_new_tokens
        return Trajectory(
            item.text,
            " ".join(words[:limit]),
            item.meta,
            finish_reason="length" if len(words) > limit else "stop",
            policy_version=MOCK,
            prompt_id=item.prompt_id,
        )
