"""The door for prompts: texts, chats and token ids to sample from."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from tensafe_nb.errors import ValidationError
from tensafe_nb.types import Prompt


def read_prompts(prompts: Prompt | Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Tell one prompt from a list of prompts, and check each.

    Raises:
        ValidationError: No prompt, an empty one, or what is none.
    """
    if isinstance(prompts, str):
        return (prompts,)
    if isinstance(prompts, Mapping):
        raise ValidationError("sample() was given one chat message: put it in a list, [message].")
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes):
        raise ValidationError(
            f"sample(): a prompt is a text, a list of messages or of token ids, not {type(prompts).__name__}."
        )
    given: list[Any] = list(prompts)
    if not given:
        raise ValidationError("sample() was given no prompt.")
    if isinstance(given[0], Integral | Mapping):  # one prompt: token ids, or chat messages
        given = [given]
    return tuple(_one_prompt(prompt, index) for index, prompt in enumerate(given))


def _one_prompt(prompt: Any, index: int) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    parts = list(prompt) if isinstance(prompt, Iterable) and not isinstance(prompt, bytes | Mapping) else []
    if all(isinstance(part, Integral) and not isinstance(part, bool) for part in parts) and parts:
        return tuple(int(part) for part in parts)
    if all(isinstance(part, Mapping) for part in parts) and parts:
        for part in parts:
            if not isinstance(part.get("role"), str) or not isinstance(part.get("content"), str):
                raise ValidationError(
                    f"Prompt {index}: a chat message has 'role' and 'content', both text: {part!r}."
                )
        return tuple(dict(part) for part in parts)
    if isinstance(prompt, Sequence) and not parts:
        raise ValidationError(f"Prompt {index} is empty: give at least one token.")
    raise ValidationError(
        f"Prompt {index} is {prompt!r}: a prompt is a text, a list of chat messages, or a list of token ids."
    )
