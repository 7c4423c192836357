"""Answers as OpenAI's clients read them: of a chat and of a text, whole and piece by piece."""

import itertools
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

from tensafe_nb.protocol.results import SampledPiece, SampledSequence, SampleResult, TopLogprobs
from tensafe_nb.rlvr.tools.formats import ToolFormat
from tensafe_nb.server.openai.requests import ChatRequest, CompletionRequest
from tensafe_nb.server.openai.tokens import TokenTexts
from tensafe_nb.server.openai.tools import calls_of

REASONS = {"stop": "stop", "stop_string": "stop", "length": "length", "fixed": "length", None: None}


class Usage(BaseModel):
    """Tokens that were read, each prompt once, and drawn."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class LikelyToken(BaseModel):
    """A token and its log-probability at temperature 1, over the whole vocabulary."""

    token: str
    logprob: float
    bytes: list[int]


class DrawnToken(LikelyToken):
    """A token that was drawn, and the likeliest of its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(BaseModel):
    """Of each token that was drawn, the end token among them."""

    content: list[DrawnToken]


class CalledFunction(BaseModel):
    """What is called, and with what: a JSON object, as a text."""

    name: str
    arguments: str


class CalledTool(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    """What the model said; null beside calls of tools, where that is all."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[CalledTool] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatAnswer(BaseModel):
    """Answers to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(BaseModel):
    """Of each token, the prompt's among them where that is echoed."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextAnswer(BaseModel):
    """Completions of texts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class AnswerWriter(ABC):
    """Writes the answer to one request.

    Attributes:
        kind: Of an answer.
        chunk: Of a piece of one.
        prefix: Of its id.
    """

    kind: ClassVar[str]
    chunk: ClassVar[str]
    prefix: ClassVar[str]

    def __init__(self, model: str, texts: TokenTexts) -> None:
        self._texts, self._head = (
            texts,
            {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time())},
        )
        self._head["model"] = model

    @abstractmethod
    def choice(self, number: int, sequence: SampledSequence, result: SampleResult) -> dict[str, Any]:
        """Return sequence `number` of a result as a choice."""

    @abstractmethod
    def begun(self, number: int) -> dict[str, Any] | None:
        """Return what is told of a choice before anything of it is drawn."""

    @abstractmethod
    def told(self, piece: SampledPiece) -> dict[str, Any] | None:
        """Return what a piece adds to its choice; None where that is to be told later."""

    def whole(self, result: SampleResult, usage: dict[str, int], fingerprint: str) -> dict[str, Any]:
        """Return the answer."""
        choices = [self.choice(number, one, result) for number, one in enumerate(result.sequences)]
        about = {"object": self.kind, "system_fingerprint": fingerprint}
        return {**self._head, **about, "choices": choices, "usage": usage}

    def part(self, *choices: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Return a chunk of a stream."""
        return {**self._head, "object": self.chunk, "choices": choices, **more}


class ChatWriter(AnswerWriter):
    """Writes answers in a chat.

    Args:
        asked: The request.
        texts: Of the model's tokens.
        tools: How the model writes calls of tools; None where it has none to call.
    """

    kind, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, asked: ChatRequest, texts: TokenTexts, tools: ToolFormat | None) -> None:
        super().__init__(asked.model, texts)
        self._with_logprobs, self._tools = bool(asked.logprobs), tools
        self._kept: dict[int, list[SampledPiece]] = {}  # until it is known whether they are calls

    def choice(self, number: int, sequence: SampledSequence, result: SampleResult) -> dict[str, Any]:
        """Return an answer."""
        content, calls = self._read(sequence.text)
        message = {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})
        reason = "tool_calls" if calls else REASONS[sequence.finish_reason]
        return {
            "index": number,
            "message": message,
            "logprobs": self._logprobs([sequence]),
            "finish_reason": reason,
        }

    def begun(self, number: int) -> dict[str, Any]:
        """Return the head of an answer."""
        delta = {"role": "assistant", "content": ""}
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}

    def told(self, piece: SampledPiece) -> dict[str, Any] | None:
        """Return further text; where there are tools, the whole at its end, which may be calls."""
        pieces = [piece]
        if self._tools is not None:
            pieces = self._kept.setdefault(piece.sequence, [])
            pieces.append(piece)
            if piece.finish_reason is None:
                return None
        content, calls = self._read("".join(one.text for one in pieces))
        delta: dict[str, Any] = {} if content is None else {"content": content}
        if calls:
            delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
        reason = "tool_calls" if calls else REASONS[piece.finish_reason]
        return {
            "index": piece.sequence,
            "delta": delta,
            "logprobs": self._logprobs(pieces),
            "finish_reason": reason,
        }

    def _read(self, said: str) -> tuple[str | None, list[dict[str, Any]]]:
        return (said, []) if self._tools is None else calls_of(self._tools, said)

    def _logprobs(self, drawn: Sequence[SampledPiece | SampledSequence]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        parts = [self._texts.for_chat(one.tokens, one.raw_logprobs, one.top_logprobs) for one in drawn]
        return {"content": list(itertools.chain(*parts))}


class TextWriter(AnswerWriter):
    """Writes completions of texts.

    Args:
        asked: The request.
        texts: Of the model's tokens.
        prompts: The tokens of each prompt.
    """

    kind, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, asked: CompletionRequest, texts: TokenTexts, prompts: Sequence[Sequence[int]]) -> None:
        super().__init__(asked.model, texts)
        self._asked, given = asked, asked.prompts()
        self._prompts = [
            one if isinstance(one, str) else texts.text(ids) for one, ids in zip(given, prompts, strict=True)
        ]
        self._ids = prompts
        self._offsets: dict[int, int] = {}  # characters of a choice's text that were told, by its number

    def choice(self, number: int, sequence: SampledSequence, result: SampleResult) -> dict[str, Any]:
        """Return a completion, behind its prompt where that is to be echoed."""
        at, asked = sequence.prompt_index, self._asked
        drawn = 0 if asked.max_tokens == 0 else len(sequence.tokens)
        tokens, logprobs = list(sequence.tokens[:drawn]), list[float | None](sequence.raw_logprobs[:drawn])
        tops, text = list(sequence.top_logprobs[:drawn]), sequence.text if drawn else ""
        if asked.echo:
            tokens, text = [*self._ids[at], *tokens], self._prompts[at] + text
            if asked.logprobs is not None:
                logprobs = [*result.prompt_logprobs[at], *logprobs]
            if asked.logprobs:
                tops = [*result.top_prompt_logprobs[at], *tops]
        offset = 0 if asked.echo else len(self._prompts[at])
        return {
            "index": number,
            "text": text,
            "logprobs": self._logprobs(tokens, logprobs, tops, offset),
            "finish_reason": REASONS[sequence.finish_reason] if drawn else "length",
        }

    def begun(self, number: int) -> dict[str, Any] | None:
        """Return the prompt where it is to be echoed."""
        prompt = self._prompts[number // self._asked.samples]
        self._offsets[number] = len(prompt)
        if not self._asked.echo:
            return None
        return {"index": number, "text": prompt, "logprobs": None, "finish_reason": None}

    def told(self, piece: SampledPiece) -> dict[str, Any]:
        """Return further text."""
        nothing = self._asked.max_tokens == 0
        offset = self._offsets[piece.sequence]
        self._offsets[piece.sequence] += len(piece.text)
        return {
            "index": piece.sequence,
            "text": "" if nothing else piece.text,
            "logprobs": self._logprobs(piece.tokens, piece.raw_logprobs, piece.top_logprobs, offset),
            "finish_reason": REASONS[piece.finish_reason],
        }

    def _logprobs(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None],
        tops: Sequence[TopLogprobs],
        offset: int,
    ) -> dict[str, Any] | None:
        return None if self._asked.logprobs is None else self._texts.for_text(tokens, logprobs, tops, offset)
