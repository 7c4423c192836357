"""The tokens of a conversation as it grows: token in, token out.

What was sampled stays as it was sampled. What the environment tells is tokenised by itself and put behind it: the words
as they are for a plain model, and for one with a chat template what the template writes between two answers. Nothing
that stands already is ever rendered anew; a template that would change it is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from tensafe_nb.data.chats import Template, render, template_keywords
from tensafe_nb.data.labels import TextTokens, encode_prompt
from tensafe_nb.data.messages import messages_of
from tensafe_nb.data.values import shortened
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.results import Message, SampledSequence
from tensafe_nb.rlvr.environments.environment import Told
from tensafe_nb.rlvr.rollouts.prompts import Chat
from tensafe_nb.rlvr.rollouts.trajectories import TurnRecord


class UnfitTemplateError(ValidationError):
    """A conversation of several turns cannot be had with this model's chat template, whatever is said in it."""


NO_TEMPLATE = (
    "the environment tells messages, and this model has no chat template: let it yield texts, or "
    "take a model that has one"
)
NO_CHAT = "the environment tells messages, and chat='never' sends none: leave out chat, or let it yield texts"


class Script(Protocol):
    """How what an environment tells becomes tokens, for one conversation."""

    @property
    def options(self) -> Mapping[str, Any] | None:
        """What the chat template is given besides; None where there is none."""

    def messages(self, told: Told) -> list[Message]:
        """Return what is told as messages."""

    def begin(self, told: Sequence[Message]) -> list[int]:
        """Return the tokens of what is told first."""

    def go_on(self, said: SampledSequence, told: Sequence[Message]) -> list[int]:
        """Return the tokens of what is told next, behind those of what was said."""


class TextScript:
    """Texts as they are, one behind the other.

    Args:
        tokens: The model's tokenizer, asked for texts.
        known: The tokens of what was told: first, and later on. The conversations of a group are told much the same.
        refusal: Why nothing else can be told.
    """

    options = None

    def __init__(
        self, tokens: TextTokens, known: dict[tuple[str, bool], list[int]], refusal: str = NO_TEMPLATE
    ) -> None:
        self._tokens, self._known, self._refusal = tokens, known, refusal

    def messages(self, told: Told) -> list[Message]:
        if not isinstance(told, str):
            raise UnfitTemplateError(f"It cannot be played: {self._refusal}.")
        return [{"role": "user", "content": told}]

    def begin(self, told: Sequence[Message]) -> list[int]:
        return self._tokens_of(told[0]["content"], first=True)

    def go_on(self, said: SampledSequence, told: Sequence[Message]) -> list[int]:
        return self._tokens_of(told[0]["content"], first=False)

    def _tokens_of(self, text: str, *, first: bool) -> list[int]:
        if (text, first) not in self._known:
            self._known[text, first] = self._tokens.prompt(text) if first else self._tokens.middle(text)
        return list(self._known[text, first])


class ChatScript:
    """Messages, by the model's chat template.

    Args:
        tokenizer: The model's.
        tokens: The same, asked for texts.
        template: Its chat template.
        options: What else the template is given: tools, and keywords.
        opened: Beginnings of conversations, with their tokens: those of a group are alike.
    """

    def __init__(
        self,
        tokenizer: Any,
        tokens: TextTokens,
        template: Template,
        options: Mapping[str, Any],
        opened: dict[str, tuple[list[int], str]],
    ) -> None:
        self.options: Mapping[str, Any] = options
        self._tokenizer, self._tokens, self._template, self._opened = tokenizer, tokens, template, opened
        self._keywords = template_keywords(options)
        self._messages: list[Message] = []
        self._text = ""  # up to where the policy speaks next

    def messages(self, told: Told) -> list[Message]:
        if isinstance(told, str):
            return [{"role": "user", "content": told}]
        return list(messages_of(told, "what the environment tells"))

    def begin(self, told: Sequence[Message]) -> list[int]:
        self._messages = list(told)
        key = repr((self._messages, self.options))
        if key not in self._opened:
            tokens = encode_prompt(self._tokenizer, {"messages": self._messages, **self.options})
            text = render(self._tokenizer, [dict(one) for one in told], self._keywords, opened=True)
            self._opened[key] = tokens, text
        tokens, self._text = self._opened[key]
        return list(tokens)

    def go_on(self, said: SampledSequence, told: Sequence[Message]) -> list[int]:
        """Return the tokens between what was said and where the policy speaks next.

        Raises:
            UnfitTemplateError: The template shows what stood before, or what was said, otherwise than it was.
        """
        # what the model saw, where that is more than the environment is told
        cut = said.finish_reason in ("stop_string", "fixed")
        whole = self._tokenizer.decode(list(said.tokens), skip_special_tokens=False) if cut else said.text
        self._messages += [{"role": "assistant", "content": whole}, *told]
        text = render(self._tokenizer, [dict(one) for one in self._messages], self._keywords, opened=True)
        core = whole.strip()
        at = text.find(core, len(self._text)) if text.startswith(self._text) else -1
        if at < 0 or text[len(self._text) : at].strip():
            raise self.rewritten(text, whole)
        behind = text[at + len(core) :].removeprefix(whole[len(whole.rstrip()) :])
        stop = self._template.edges(self._keywords).stop
        if said.finish_reason == "stop" and stop:  # the policy has ended its turn itself
            head, found, behind = behind.partition(stop)
            if not found or head.strip():  # and the template ends it otherwise, once it is not the last
                raise self.rewritten(text, whole + stop)
        self._text = text
        return self._tokens.middle(behind)

    def rewritten(self, text: str, whole: str) -> UnfitTemplateError:
        """Return the error for a template that changes what stands already, with what it makes of it."""
        same = next(
            (n for n, (a, b) in enumerate(zip(text, self._text, strict=False)) if a != b), len(self._text)
        )
        at = max(0, same - 20)
        return UnfitTemplateError(
            f"The model's chat template shows earlier turns otherwise once a conversation goes on: it had "
            f"{as_given(shortened((self._text + whole)[at:]))} and makes {as_given(shortened(text[at:]))} of it. "
            f"The model would be trained on other words than it saw. Some templates leave out earlier thoughts, or an "
            f"empty one: give the tokenizer a template that keeps turns as they were said "
            f"(tc.tokenizer.chat_template = …)."
        )


@dataclass(slots=True)
class Transcript:
    """One conversation under way.

    Attributes:
        script: How what is told becomes tokens.
        prompt: Tokens before the policy first speaks.
        tokens: All behind them.
        logprobs: Per token, 0 where the environment speaks.
        raw_logprobs: Likewise.
        mask: Per token, 1 where the policy speaks.
        turns: The messages.
        nats: Sum of the entropies of what was sampled; None where the sampler does not say.
        finish_reason: Of the last turn.
    """

    script: Script
    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    turns: list[TurnRecord] = field(default_factory=list)
    nats: float | None = 0.0
    finish_reason: str = "stop"
    last: SampledSequence | None = None  # what was said last

    @property
    def length(self) -> int:
        """How many tokens were sampled."""
        return sum(self.mask)

    @property
    def spoken(self) -> int:
        """How often the policy has spoken."""
        return sum(turn.role == "assistant" for turn in self.turns)

    def tell(self, told: Told) -> None:
        """Take in what the environment tells.

        Raises:
            UnfitTemplateError: Nothing of the kind can be told to this model.
            ValidationError: This cannot.
        """
        messages, start = self.script.messages(told), len(self.tokens)
        if self.last is None:
            self.prompt = self.script.begin(messages)
        else:
            tokens = self.script.go_on(self.last, messages)
            self.tokens += tokens
            self.logprobs += [0.0] * len(tokens)
            self.raw_logprobs += [0.0] * len(tokens)
            self.mask += [0] * len(tokens)
        stop = len(self.tokens)
        for number, message in enumerate(messages):
            meta = {name: value for name, value in message.items() if name not in ("role", "content")}
            text = message["content"] or ""
            self.turns.append(TurnRecord(message["role"], text, stop if number else start, stop, meta=meta))

    def hear(self, said: SampledSequence) -> None:
        """Take in what the policy said."""
        start = len(self.tokens)
        self.tokens += said.tokens
        self.logprobs += said.logprobs
        self.raw_logprobs += said.raw_logprobs
        self.mask += [1] * len(said.tokens)
        if self.nats is not None:
            self.nats = None if said.entropy is None else self.nats + said.entropy * len(said.tokens)
        self.turns.append(TurnRecord("assistant", said.text, start, len(self.tokens), trained=True))
        self.finish_reason, self.last = said.finish_reason, said

    def of_last_turn(self, reward: float | None, meta: Mapping[str, Any] | None) -> None:
        """Note what the environment says of what the policy said last."""
        spoken = next((turn for turn in reversed(self.turns) if turn.role == "assistant"), None)
        if spoken is None and reward is not None:
            raise ValidationError(
                "a Turn rewards the turn before it, and there is none before the first yield"
            )
        if spoken is not None:
            spoken.reward = reward
            spoken.meta |= meta or {}


class Scripts:
    """Makes the scripts of a model's conversations.

    Args:
        tokenizer: The model's.
        chat: "auto" makes a text the message of a user where the model has a chat template; "always" insists on one;
            "never" sends texts as they are.
    """

    def __init__(self, tokenizer: Any, chat: Chat) -> None:
        self.tokenizer, self._chat = tokenizer, chat
        self._tokens = TextTokens(tokenizer)
        self._opened: dict[str, tuple[list[int], str]] = {}
        self._known: dict[tuple[str, bool], list[int]] = {}

    @cached_property
    def _template(self) -> Template | None:
        if self._chat == "never" or (self._chat == "auto" and self.tokenizer.chat_template is None):
            return None
        return Template(self.tokenizer)

    @property
    def template(self) -> str | None:
        """The chat template that is used, as a text."""
        return None if self._template is None else str(self.tokenizer.chat_template)

    def script(self, options: Mapping[str, Any]) -> Script:
        """Return the script of a conversation; `options` are the row's for the chat template."""
        if self._template is None:
            return TextScript(self._tokens, self._known, NO_CHAT if self._chat == "never" else NO_TEMPLATE)
        return ChatScript(self.tokenizer, self._tokens, self._template, options, self._opened)
