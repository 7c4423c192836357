"""Prompts, as a user gave them: read from any source of rows, checked against the model, dealt step by step."""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from tensafe_nb.config import SamplingConfig
from tensafe_nb.data import OnBadRows, read_prompt
from tensafe_nb.data.columns import PromptColumns
from tensafe_nb.data.labels import TextTokens, check_context, encode_prompt
from tensafe_nb.data.layouts import refuse_media
from tensafe_nb.data.messages import is_chat, template_options
from tensafe_nb.data.rows import check_on_bad_rows, located, open_rows
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.results import Message, Prompt
from tensafe_nb.rlvr.policy import PolicyClient
from tensafe_nb.rlvr.rollouts.choosing import PromptPolicy, PromptRecord, UniformPrompts, chosen_by

logger = logging.getLogger(__name__)

FIELDS = {"question", "answer", "metadata"}
MOST_ENTRIES = 1_000_000  # the iteration of some of its data sets has no end
PromptSpec: TypeAlias = str | Sequence[Message] | Mapping[str, Any]
AS_THEY_ARE = PromptColumns()
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
                raise no_prompt(spec)
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


def no_prompt(spec: Mapping[str, Any]) -> ValidationError:
    """Return the error for a dict without a prompt, with the column that is likely to be one."""
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
        f"Say which column it is: prompt={as_given(name)}, in RLVRTrainer(…) or data.read_rows(…)."
    )


def prompt_items(prompts: Any) -> list[PromptItem]:
    """Read the prompts a user gave; see `prompt_specs`."""
    return [PromptItem.of(spec) for spec in prompt_specs(prompts)]


def prompt_specs(
    prompts: Any,
    on_bad_rows: OnBadRows = "raise",
    fits: Callable[[Any], object] = lambda _: None,
    what: str = "prompts",
    read: Callable[[Any], Any] = PromptItem.of,
    columns: PromptColumns = AS_THEY_ARE,
) -> list[PromptSpec]:
    """Read prompts from wherever rows are read from, and check each.

    Args:
        prompts: A list, a file, a frame, a data set, …: see `data.batches`. Each a text, messages, or a row of columns.
        on_bad_rows: "skip" leaves out what cannot be read or does not fit, and says so.
        fits: Raises a ValidationError for a prompt that does not fit.
        what: What they are called in an error.
        read: Reads one; environments take rows that need no prompt.
        columns: Which of their columns is asked, and which answers.

    Returns:
        The prompts as they were given, or as the columns make them.

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
            spec = columns.of(spec)
            fits(read(spec))
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


def asked(spec: PromptSpec) -> Any:
    """Return what a prompt asks, without its further columns: a question with two answers is held out whole."""
    return spec.get("prompt", spec.get("messages", spec)) if isinstance(spec, Mapping) else spec


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
    texts = TextTokens(tokenizer)

    def fits(item: PromptItem) -> None:
        length = len(encode_prompt(tokenizer, item.sent(chat), texts))
        check_context("it", length, sampling.max_new_tokens, context)

    return fits


class PromptCursor:
    """Deals prompts, as a policy chooses them, and keeps what was measured of each.

    Args:
        prompts: What to deal, from any source of rows.
        count: How many at a time.
        seed: Fixes the order.
        policy: What chooses; without one, every prompt is dealt as often as any other.
        read: Reads one, as for `prompt_specs`.

    Attributes:
        record: The prompts, and what was measured of them.
        taken: Numbers of the prompts that were dealt last.

    Raises:
        ValidationError: No prompts, or what is none.
    """

    def __init__(
        self,
        prompts: Any,
        count: int,
        seed: int,
        policy: PromptPolicy | None = None,
        read: Callable[[Any], Any] = PromptItem.of,
    ) -> None:
        self.record = PromptRecord(prompt_specs(prompts, read=read), seed)
        if count < 1:
            raise ValidationError(f"prompts_per_step is {count}: a step needs at least one prompt.")
        self.policy: PromptPolicy = UniformPrompts() if policy is None else policy
        self.taken: list[int] = []
        self._count = count

    @property
    def specs(self) -> Sequence[PromptSpec]:
        """The prompts."""
        return self.record.prompts

    @property
    def position(self) -> int:
        """Prompts dealt so far: beside what was measured, all there is to save."""
        return self.record.dealt

    @position.setter
    def position(self, dealt: int) -> None:
        self.record.dealt = dealt

    def take(self, instead_of: int | None = None) -> list[PromptSpec]:
        """Return the prompts of the next step, or further ones for the present step.

        Args:
            instead_of: So many for the present step, in place of some that taught nothing.
        """
        record = self.record
        if instead_of is None:
            record.in_step = []
        self.taken = chosen_by(self.policy, record, self._count if instead_of is None else instead_of)
        record.in_step += self.taken
        record.dealt += len(self.taken)
        return [record.prompts[number] for number in self.taken]


def gym_prompts(dataset: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the questions of a reasoning-gym data set, as prompts for `RLVRTrainer`.

    The data set is also their reward. Its default `score_answer` pays len(answer)/len(response) for a response
    that merely contains the answer: a model will find that out.

    Args:
        dataset: What `reasoning_gym.create_dataset(name, size=…, seed=…)` returned.

    Returns:
        Dicts with `prompt`, and the columns `answer` and `metadata` that scoring needs.

    Example:
        >>> dataset = reasoning_gym.create_dataset("spell_backward", size=256, seed=0)
        >>> trainer = RLVRTrainer(tc, gym_prompts(dataset), dataset)
    """
    entries = list(itertools.islice(dataset, MOST_ENTRIES)) if isinstance(dataset, Iterable) else None
    if entries is None or not all(isinstance(entry, Mapping) and entry.keys() >= FIELDS for entry in entries):
        raise ValidationError(
            f"gym_prompts: a data set of reasoning_gym has entries with {', '.join(sorted(FIELDS))}; this is "
            f"{as_given(dataset)}."
        )
    return [
        {"prompt": entry["question"], "answer": entry["answer"], "metadata": dict(entry["metadata"])}
        for entry in entries
    ]
