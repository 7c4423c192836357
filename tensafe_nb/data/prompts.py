"""Prompts to sample from: texts, chats and token ids; one reading of a chat for all who take one."""

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from tensafe_nb.data.messages import is_chat, messages_of, template_options
from tensafe_nb.data.rows import refuse_table
from tensafe_nb.data.values import checked_text, missing, shortened
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.results import Prompt

OPTIONS = ("tools", "chat_template_kwargs")
KINDS = {"prompt", "messages", "tokens"}  # one of which a dict that is a prompt has
MOST_TOKENS = 1 << 24  # of all prompts of a call
FORMS = "a prompt is a text, a list of chat messages, or a list of token ids"


def read_prompts(prompts: Any) -> tuple[Prompt, ...]:
    """Tell one prompt from a list of prompts, and check each.

    Args:
        prompts: A text, a list of chat messages or of token ids, {"prompt" or "messages", "tools"?,
            "chat_template_kwargs"?}, or a list of any. A conversation that goes on from tokens is {"tokens": ids,
            "chat"?: keywords of its template, "stream"?: a number}: "chat" lets an answer end as the template ends a
            turn, and "stream" is what its random numbers depend on beside seed and tokens, in place of its number among
            equal prompts.

    Raises:
        ValidationError: No prompt, an empty one, or what is none.
    """
    if isinstance(prompts, str):
        return (_one_prompt(prompts, 0),)
    if isinstance(prompts, Mapping) and KINDS & prompts.keys():
        return (_one_prompt(prompts, 0),)
    if isinstance(prompts, Mapping):
        if "role" in prompts or "content" in prompts:
            raise ValidationError("sample() was given one chat message: put it in a list, [message].")
        raise ValidationError(
            f"sample(): a dict that is a prompt has 'prompt', 'messages' or 'tokens', and this is {as_given(prompts)}."
        )
    if isinstance(prompts, os.PathLike):
        raise ValidationError(
            f"sample() reads no files: data.read_rows({as_given(str(prompts))}) does; give its prompts, "
            f"[row['prompt'] for row in rows]."
        )
    refuse_table(prompts, "sample(): this is a table, not a list of prompts. Give table['prompt'].tolist().")
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes):
        raise ValidationError(f"sample(): {FORMS}, not {type(prompts).__name__}.")
    given = _bounded(prompts, "sample()")
    if not given:
        raise ValidationError("sample() was given no prompt.")
    first = given[0]
    if isinstance(first, Integral) or (isinstance(first, Mapping) and not KINDS & first.keys()):
        given = [given]  # one prompt: token ids, or chat messages
    return tuple(_one_prompt(prompt, index) for index, prompt in enumerate(given))


def _bounded(items: Any, what: str) -> list[Any]:
    """Return the items of an iterable, an array or a tensor; the size is asked for before they are read."""
    shape = getattr(items, "shape", None)
    if isinstance(shape, tuple) and math.prod(shape) > MOST_TOKENS:
        raise ValidationError(f"{what}: an array of shape {shape} holds more than {MOST_TOKENS:,} tokens.")
    if hasattr(items, "tolist"):
        listed = items.tolist()
        return listed if isinstance(listed, list) else [listed]
    listed = list(itertools.islice(items, MOST_TOKENS + 1))
    if len(listed) > MOST_TOKENS:
        raise ValidationError(f"{what}: {as_given(items)} holds more than {MOST_TOKENS:,} items.")
    return listed


def _one_prompt(prompt: Any, index: int) -> Prompt:
    try:
        if isinstance(prompt, Mapping):
            return prompt_of(prompt)
        if isinstance(prompt, str) or is_chat(prompt):
            return read_prompt(prompt)
    except ValidationError as error:
        raise ValidationError(f"Prompt {index}: {error}") from error
    is_list = isinstance(prompt, Iterable) and not isinstance(prompt, bytes)
    parts = _bounded(prompt, f"Prompt {index}") if is_list or hasattr(prompt, "tolist") else []
    if all(isinstance(part, Integral) and not isinstance(part, bool) for part in parts) and parts:
        return tuple(int(part) for part in parts)
    if isinstance(prompt, Sequence) and not parts:
        raise ValidationError(f"Prompt {index} is empty: give at least one token.")
    raise ValidationError(f"Prompt {index} is {shortened(prompt)}: {FORMS}.")


def under_way(prompt: Mapping[str, Any]) -> Prompt:
    """Return a prompt {"tokens", "chat"?, "stream"?} as it is sent; see `read_prompts`."""
    if other := sorted(map(str, prompt.keys() - {"tokens", "chat", "stream"})):
        raise ValidationError(
            f"a conversation that goes on has 'tokens', 'chat' and 'stream', and this has "
            f"{', '.join(map(repr, other))} besides, which nobody would read."
        )
    tokens = _bounded(prompt["tokens"], "'tokens'") if isinstance(prompt["tokens"], Iterable) else []
    if not tokens or not all(isinstance(part, Integral) and not isinstance(part, bool) for part in tokens):
        raise ValidationError(f"'tokens' is {shortened(prompt['tokens'])}: a list of token ids is expected.")
    stream, chat = prompt.get("stream"), prompt.get("chat")
    if stream is not None and (
        not isinstance(stream, int) or isinstance(stream, bool) or not 0 <= stream < 2**63
    ):
        raise ValidationError(f"'stream' is {shortened(stream)}: a whole number is expected, 0 or more.")
    if chat is not None and not isinstance(chat, Mapping):
        raise ValidationError(
            f"'chat' is {shortened(chat)}: a dict of keywords for the chat template is expected."
        )
    sent: dict[str, Any] = {"tokens": tuple(int(token) for token in tokens)}
    if chat is not None:
        sent["chat"] = template_options(chat)
    return sent if stream is None else sent | {"stream": stream}


def prompt_of(prompt: Mapping[str, Any]) -> Prompt:
    """Return the prompt of a dict {"prompt" or "messages", "tools"?, "chat_template_kwargs"?}, and of no other."""
    if "tokens" in prompt:
        return under_way(prompt)
    name = "prompt" if "prompt" in prompt else "messages"
    if name not in prompt:
        raise ValidationError(f"a dict has 'prompt' (or 'messages') and 'tools', not {as_given(prompt)}.")
    if other := sorted(
        str(key) for key, value in prompt.items() if key not in (name, *OPTIONS) and not missing(value)
    ):
        raise ValidationError(
            f"a dict has 'prompt' (or 'messages') and 'tools', and this has {', '.join(map(repr, other))} besides, "
            f"which nobody would read. Of rows, give [row[{as_given(name)}] for row in rows]."
        )
    return read_prompt(prompt[name], prompt)


def read_prompt(content: Any, row: Mapping[str, Any] | None = None) -> Prompt:
    """Return a prompt as it is sent: a text, messages, or {"messages", "tools"?, "chat_template_kwargs"?}.

    Args:
        content: A text or a list of messages; see `messages.messages_of`.
        row: What may have further columns for the chat template: see `messages.template_options`.

    Raises:
        ValidationError: It is neither, or tools beside a text, which no template ever sees.
    """
    if row is not None and not isinstance(row, Mapping):
        raise ValidationError(f"the row of a prompt is a dict, not {as_given(row)}.")
    options = template_options(row or {})
    if isinstance(content, str):
        if not content:
            raise ValidationError("it is empty: give at least one token.")
        if options:
            raise ValidationError(
                f"it is a text, and {' and '.join(options)} are for the chat template only: give messages, or call "
                f"the column otherwise."
            )
        return checked_text(content, "the text")
    if not is_chat(content):
        raise ValidationError(
            f"A prompt is a text, or a list of messages with 'role' and 'content'; this is {shortened(content)}, "
            f"of type {type(content).__name__}."
        )
    messages = tuple(
        {name: value for name, value in message.items() if name != "weight"}  # of training
        for message in messages_of(content, "messages")
    )
    return {"messages": messages, **options} if options else messages
