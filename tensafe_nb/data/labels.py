"""A row's tokens, and which of them are learnt: the completion of a prompt, the assistant's turns of a chat."""

from collections.abc import Mapping, Sequence
from typing import Any

from tensafe_nb.data.layouts import canonical, check_template
from tensafe_nb.errors import ValidationError
from tensafe_nb.types import Prompt


def encode_many(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any
) -> list[tuple[list[int], list[bool]] | ValidationError]:
    """Return of each row its tokens, and which of them are to be learnt; or what is wrong with it.

    Args:
        rows: Canonical ones: {"text"}, {"prompt", "completion"} or {"messages", "tools"?}, see `layouts.canonical`.
        tokenizer: The model's.
    """
    return [_one(row, tokenizer) for row in rows]


def _one(row: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[bool]] | ValidationError:
    try:
        return tokens_of(row, tokenizer)
    except ValidationError as error:
        return error
    except Exception as error:  # noqa: BLE001  # templates and tokenizers raise whatever they like
        return ValidationError(f"this model's tokenizer cannot read it ({type(error).__name__}: {error}).")


def tokens_of(row: Any, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Return a row's tokens, and which of them are to be learnt."""
    if isinstance(row, str):
        row = canonical(row).members[0]
    if "messages" in row:
        return _chat_tokens(row["messages"], tokenizer, row.get("tools"))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if "prompt" in row:
        prompt = list(tokenizer(row["prompt"])["input_ids"])
        completion = list(tokenizer(row["completion"], add_special_tokens=False)["input_ids"]) + end
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)
    tokens = list(tokenizer(row["text"])["input_ids"]) + end
    return tokens, [True] * len(tokens)


def _chat_tokens(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, tools: Any
) -> tuple[list[int], list[bool]]:
    if tokenizer.chat_template is None:
        raise ValidationError(
            "This model has no chat template: give rows with 'prompt' and 'completion' instead."
        )
    tokens: list[int] = []
    learnt: list[bool] = []
    for count, message in enumerate(messages, start=1):
        if message["role"] != "assistant":
            continue
        opened = _template(tokenizer, messages[: count - 1], tools=tools, add_generation_prompt=True)
        closed = _template(tokenizer, messages[:count], tools=tools)
        if opened[: len(tokens)] != tokens or closed[: len(opened)] != opened:
            raise ValidationError(
                "This model's chat template rewrites earlier turns, so that the assistant's tokens cannot be told "
                "apart. Give one row per assistant turn, as 'prompt' and 'completion'."
            )
        wanted = message.get("weight") != 0
        learnt += [False] * (len(opened) - len(tokens)) + [wanted] * (len(closed) - len(opened))
        tokens = closed
    return tokens, learnt


def _template(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template([dict(m) for m in messages], return_dict=False, **options))


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Return the token ids of a text, of chat messages (opened for the assistant's answer), or of ids.

    A chat with tools is {"messages", "tools"}, as `data.read_prompts` makes it.
    """
    if isinstance(prompt, str):
        try:
            return list(tokenizer(prompt)["input_ids"])
        except Exception as error:  # tokenizers raises nothing more specific
            raise ValidationError(
                f"The model's tokenizer cannot read the prompt {prompt!r}: {error}."
            ) from error
    if isinstance(prompt, Mapping):
        return _opened(tokenizer, prompt["messages"], prompt["tools"])
    if prompt and isinstance(prompt[0], Mapping):
        return _opened(tokenizer, prompt, None)
    return [int(token) for token in prompt]  # type: ignore[arg-type]


def _opened(tokenizer: Any, messages: Sequence[Any], tools: Sequence[Any] | None) -> list[int]:
    if tokenizer.chat_template is None:
        raise ValidationError("This model has no chat template: give prompts as text instead of messages.")
    check_template(tokenizer.chat_template, messages, tools)
    given = None if tools is None else [dict(tool) for tool in tools]
    return _template(tokenizer, messages, tools=given, add_generation_prompt=True)
