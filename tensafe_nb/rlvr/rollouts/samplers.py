"""Who samples: the policy behind a training client, or a mock; and how the prompts a user gave are read."""

import hashlib
import json
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from tensafe_nb.checks import checked
from tensafe_nb.config import SamplingConfig
from tensafe_nb.data import OnBadRows, read_prompt
from tensafe_nb.data.labels import encode_prompt
from tensafe_nb.data.layouts import refuse_media
from tensafe_nb.data.messages import is_chat, template_options
from tensafe_nb.data.rows import check_on_bad_rows, located, open_rows
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.futures import FutureHandle, combine
from tensafe_nb.protocol.results import Message, Prompt, SampledSequence, SampleResult
from tensafe_nb.rlvr.rollouts.trajectories import (
    MOCK,
    PolicyClient,
    RolloutGroup,
    Trajectory,
    TrajectoryBatch,
)

logger = logging.getLogger(__name__)

PromptSpec: TypeAlias = str | Sequence[Message] | Mapping[str, Any]
Chat: TypeAlias = Literal["auto", "never", "always"]


@dataclass(frozen=True, slots=True)
class PromptItem:
    """A prompt as it is sent, as the reward sees it, and its further columns.

    Attributes:
        content: A text, or messages with their content as text.
        text: The same as one text.
        meta: The further columns.
        options: What the chat template takes beside the messages, tools for instance; they stay columns as well.
    """

    content: str | Sequence[Message]
    text: str
    meta: dict[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: PromptSpec) -> "PromptItem":
        """Read a text, a list of chat messages, or a dict with `prompt` (or `messages`) and further columns.

        Raises:
            ValidationError: It is none of these.
        """
        meta: dict[str, Any] = {}
        content: Any = spec
        if isinstance(spec, Mapping):
            name = "prompt" if "prompt" in spec or "messages" not in spec else "messages"
            if name not in spec:
                raise _no_prompt(spec)
            content = spec[name]
            meta = {column: value for column, value in spec.items() if column != name}
        refuse_media(meta)
        read = read_prompt(content, meta)
        if isinstance(read, str):
            return cls(read, read, meta)
        messages: list[Message] = list(read["messages"] if isinstance(read, Mapping) else read)  # type: ignore[arg-type]
        text = "\n".join(message["content"] for message in messages if message["content"] is not None)
        return cls(messages, text, meta, template_options(meta))

    @property
    def messages(self) -> list[Message] | None:
        """The chat messages, where those were given."""
        return None if isinstance(self.content, str) else [dict(message) for message in self.content]

    @property
    def prompt_id(self) -> str:
        """A name that depends on the prompt and its columns alone."""
        written = json.dumps([self.content, self.meta], sort_keys=True, default=str)
        return hashlib.sha256(written.encode()).hexdigest()[:12]

    def sent(self, chat: Chat) -> Prompt:
        """Return what the policy is asked; with chat="always", a text is the message of a user."""
        messages: Any = self.content
        if isinstance(messages, str):
            return [{"role": "user", "content": messages}] if chat == "always" else messages
        return {"messages": messages, **self.options} if self.options else messages


def _no_prompt(spec: Mapping[str, Any]) -> ValidationError:
    names = sorted(map(str, spec))
    if {"role", "content"} <= set(names):
        return ValidationError("it is one message: a chat is a list of messages, [message].")
    texts = [name for name in spec if isinstance(spec[name], str) or is_chat(spec[name])]
    likely = next(
        (name for name in ("question", "problem", "instruction", "query", "input") if name in texts), None
    )
    name = likely or (texts[0] if texts else "…")
    return ValidationError(
        f"a prompt given as a dict needs 'prompt'; it has {names}. "
        f"Name it: [{{**row, 'prompt': row[{as_given(name)}]}} for row in rows]."
    )


def prompt_items(prompts: Any) -> list[PromptItem]:
    """Read the prompts a user gave; see `prompt_specs`."""
    return [PromptItem.of(spec) for spec in prompt_specs(prompts)]


def prompt_specs(
    prompts: Any,
    on_bad_rows: OnBadRows = "raise",
    fits: Callable[[PromptItem], object] = lambda _: None,
    what: str = "prompts",
) -> list[PromptSpec]:
    """Read prompts from wherever rows are read from, and check each.

    Args:
        prompts: A list, a file, a frame, a data set, …: see `data.batches`. Each a text, messages, or a row of columns.
        on_bad_rows: "skip" leaves out what cannot be read or does not fit, and says so.
        fits: Raises a ValidationError for a prompt that does not fit.
        what: What they are called in an error.

    Returns:
        The prompts as they were given.

    Raises:
        ValidationError: There are none, or one cannot be read; says which.
    """
    check_on_bad_rows(on_bad_rows)
    rows = open_rows(prompts, what)
    specs: list[PromptSpec] = []
    left_out: list[str] = []
    for number, (line, spec) in enumerate(rows.each):
        try:
            if isinstance(spec, ValidationError):
                raise spec
            fits(PromptItem.of(spec))
        except ValidationError as error:
            placed = located(error, rows, number, line)
            if on_bad_rows == "raise":
                raise placed from error
            left_out.append(str(placed))
        else:
            specs.append(spec)
    if not specs:
        raise ValidationError(f"There are no {what}: give at least one. {''.join(left_out[:1])}".rstrip())
    if left_out:
        of = len(left_out) + len(specs)
        logger.warning("%d of %d %s were left out; the first: %s", len(left_out), of, what, left_out[0])
    return specs


def check_fit(
    client: PolicyClient, specs: Sequence[PromptSpec], sampling: SamplingConfig, chat: Chat, what: str
) -> None:
    """Refuse prompts that the model cannot read, or that leave no room for an answer, before one is dealt.

    Raises:
        ValidationError: Says which row.
    """
    fits = fitting(client, sampling, chat)
    for number, spec in enumerate(specs):
        try:
            fits(PromptItem.of(spec))
        except ValidationError as error:
            raise ValidationError(
                f"{what}: row {number}: {error} (on_bad_rows='skip' leaves such rows out.)",
                details={"row": number},
            ) from error


def fitting(client: PolicyClient, sampling: SamplingConfig, chat: Chat) -> Callable[[PromptItem], None]:
    """Return a check of one prompt against tokenizer, template and context; waits for the model to be loaded."""
    tokenizer, context = client.tokenizer, getattr(client, "context", None)

    def fits(item: PromptItem) -> None:
        length = len(encode_prompt(tokenizer, item.sent(chat)))
        if context is not None and length + sampling.max_new_tokens > context:
            raise ValidationError(
                f"it has {length} tokens; with max_new_tokens={sampling.max_new_tokens} that is more than the "
                f"model's context of {context}. Shorten one of them."
            )

    return fits


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
        stop: Sequence[str] = (),
        fixed_length: bool = False,
        chat: Chat = "auto",
        seed: int | None = None,
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
            stop=tuple(stop) if not isinstance(stop, str) else (stop,),
            ignore_end=fixed_length,
        )
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
    sampled = client.sample([item.sent(chat) for item in items], sampling=sampling)
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
            messages=item.messages,
        )


class PromptCursor:
    """Deals prompts: shuffled anew in every epoch, none twice before all have been dealt.

    Args:
        prompts: What to deal, from any source of rows.
        count: How many at a time.
        seed: Fixes the order.

    Raises:
        ValidationError: No prompts, or what is none.
    """

    def __init__(self, prompts: Any, count: int, seed: int) -> None:
        self.specs = prompt_specs(prompts)
        if count < 1:
            raise ValidationError(f"prompts_per_step is {count}: a step needs at least one prompt.")
        self._count, self._seed = count, seed
        self.position = 0  # prompts dealt so far: all there is to save

    def take(self) -> list[PromptSpec]:
        """Return the next prompts."""
        start, self.position = self.position, self.position + self._count
        return [self.specs[index] for index in self._order(start, self.position)]

    def _order(self, start: int, stop: int) -> Iterator[int]:
        size = len(self.specs)
        for epoch in range(start // size, (stop - 1) // size + 1):
            order = np.random.default_rng([self._seed, epoch]).permutation(size)
            yield from order[max(start - epoch * size, 0) : stop - epoch * size].tolist()
