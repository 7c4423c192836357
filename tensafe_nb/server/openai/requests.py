"""What OpenAI's clients may ask for, field by field: what is not done here is refused by its name, never dropped."""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import CoreSchema, core_schema

from tensafe_nb.config import MIN_TEMPERATURE, Positive, SamplingConfig, Seed
from tensafe_nb.data.prompts import read_prompts
from tensafe_nb.protocol.results import Prompt
from tensafe_nb.server.openai.tools import with_arguments_read

MOST_TOP_LOGPROBS = 20
COMPLETION_TOKENS = 16  # of a completion whose request names no number, as OpenAI has it
LABELS = ("user", "safety_identifier", "prompt_cache_key", "metadata")  # taken, and nothing depends on them


class OnlyNeutral:
    """Marks a field that is taken where it asks for nothing: as null, or as one of some values.

    Args:
        why: What is not done here.
        neutral: The values.
    """

    def __init__(self, why: str, *neutral: Any) -> None:
        self._why, self._allowed = why, [None, *neutral]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {"enum": self._allowed}

    def _check(self, value: Any) -> Any:
        for one in self._allowed:
            if value == one and isinstance(value, bool) == isinstance(one, bool):
                return value
        raise ValueError(f"{self._why}: leave it out")


class StreamOptions(BaseModel):
    """What a stream holds besides."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None


class SamplingRequest(BaseModel):
    """What both ways of asking have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(min_length=1, max_length=512)
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, lt=1 << 31)
    n: int | None = Field(default=None, ge=1, le=128)
    seed: Seed | None = None
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[Any, OnlyNeutral("no penalties are applied here", 0)] = None
    presence_penalty: Annotated[Any, OnlyNeutral("no penalties are applied here", 0)] = None
    logit_bias: Annotated[Any, OnlyNeutral("no logits are shifted here", {})] = None
    store: Annotated[Any, OnlyNeutral("nothing is stored here for later", False)] = None
    service_tier: Annotated[Any, OnlyNeutral("there is one tier here", "auto", "default")] = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None

    @pydantic.field_validator("temperature")
    @classmethod
    def _temperature_is_zero_or_not_tiny(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < MIN_TEMPERATURE:
            raise ValueError(f"a temperature is 0 (the most likely token) or at least {MIN_TEMPERATURE}")
        return value

    @pydantic.model_validator(mode="after")
    def _stream_options_are_of_a_stream(self) -> "SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are of a stream: stream=true")
        return self

    @property
    def samples(self) -> int:
        """How many completions of each prompt."""
        return self.n or 1

    @property
    def unused(self) -> list[str]:
        """Labels that were given."""
        return [name for name in LABELS if getattr(self, name) is not None]

    def sampling(self, max_new_tokens: int, seed: int, **more: Any) -> SamplingConfig:
        """Return how to draw."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        return SamplingConfig(
            max_new_tokens=max(1, max_new_tokens),  # where none is wanted, one is drawn and left out
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            num_samples=self.samples,
            stop=tuple(stop),
            seed=seed,
            **more,
        )


class CompletionRequest(SamplingRequest):
    """A text, or several, to go on from."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]],
            Field(min_length=1),
        ]
    )
    max_tokens: int | None = Field(default=None, ge=0, lt=1 << 31)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP_LOGPROBS)
    best_of: Annotated[Any, OnlyNeutral("as many are drawn as are returned, n", 1)] = None
    suffix: Annotated[Any, OnlyNeutral("a text is gone on from, not filled in", "")] = None

    @pydantic.model_validator(mode="after")
    def _fields_go_together(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 draws nothing: only echo=true has something to return then")
        if self.echo and self.stream and self.logprobs is not None:
            raise ValueError(
                "the prompt's logprobs are known at the end: ask for echo with logprobs without stream"
            )
        return self

    def likeliest(self) -> dict[str, Any]:
        """Return what of logprobs is to come with the sample, beside that of each token."""
        top = self.logprobs or 0
        if not self.echo or self.logprobs is None:
            return {"top_logprobs": top}
        return {"top_logprobs": top, "prompt_logprobs": True, "top_prompt_logprobs": top}

    def prompts(self) -> tuple[Prompt, ...]:
        """Return the prompts."""
        return read_prompts(self.prompt)


class ChatRequest(SamplingRequest):
    """Messages to answer."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Annotated[Any, OnlyNeutral("the model calls as many tools as it will", True)] = None
    response_format: Annotated[Any, OnlyNeutral("no form is enforced here", {"type": "text"})] = None
    chat_template_kwargs: dict[str, Any] | None = None

    @pydantic.model_validator(mode="after")
    def _fields_go_together(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs come with logprobs=true")
        if self.max_completion_tokens not in (None, self.max_tokens) and self.max_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are two names of one number: give one")
        return self

    @property
    def may_call_tools(self) -> bool:
        """Whether what the model says is read for calls."""
        return bool(self.tools) and self.tool_choice != "none"

    def likeliest(self) -> dict[str, Any]:
        """Return what of logprobs is to come with the sample, beside that of each token."""
        return {"top_logprobs": self.top_logprobs or 0}

    def prompts(self) -> tuple[Prompt, ...]:
        """Return the conversation as the one prompt that it is.

        Raises:
            ValidationError: Messages that are none, or hold what no model here can see.
        """
        chat: dict[str, Any] = {"messages": [with_arguments_read(message) for message in self.messages]}
        if self.may_call_tools:
            chat["tools"] = self.tools
        if self.chat_template_kwargs:
            chat["chat_template_kwargs"] = self.chat_template_kwargs
        return read_prompts(chat)
