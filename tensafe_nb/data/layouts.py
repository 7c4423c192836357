"""Rows as public data sets have them → rows of one kind: a text, a prompt and its completion, or a chat.

`canonical` is the only place that knows layouts. Its rows hold nothing but text where text belongs: content given in
parts is joined, a turn that is not to be learnt has `weight: 0`, and columns that nobody reads are named.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError

DEEPEST, MOST_PARTS = 64, 1 << 20  # of a message and its tool calls
EXPECTED = (
    "Expected 'text', 'prompt' and 'completion', or 'messages' ('conversations', 'instruction' and 'output' are read "
    "too); of a pair, 'prompt', 'chosen' and 'rejected', or 'anchor' and 'positive'."
)
ROLES = {  # of ShareGPT's 'from'
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "system": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
# Taori et al. 2023, "Stanford Alpaca": the prompts its models were trained with.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
MEDIA = ("image", "images", "pixel_values", "audio", "audios", "input_features", "video", "videos")
_MEDIA = "only text is read here"
_TOKENS = (
    "rows of tokens make a batch: tc.forward_backward({'input_ids': …, 'labels': …}), with labels shifted"
)
_TEACHER = "there is no loss here that learns from another model's probabilities"
_WEIGHT = "rows have no weights here: leave rows out, or list them several times"
LACKING = {
    **dict.fromkeys(MEDIA, _MEDIA),
    **dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids", "labels", "tokens", "completion_mask", "assistant_masks"),
        _TOKENS,
    ),
    **dict.fromkeys(("logits", "teacher_logits", "logprobs", "top_logprobs", "ref_logps"), _TEACHER),
    **dict.fromkeys(("weight", "weights", "sample_weight", "loss_weight"), _WEIGHT),
    **dict.fromkeys(("negative", "negatives"), "the other rows of a batch are a row's negatives in 'contrastive'"),
    "margin": "the loss 'margin_ranking' has one margin for all pairs: resolve_loss('margin_ranking', margin=…)",
    "history": "give the earlier turns as 'messages'",
    "system": "write it into the prompt, or give 'messages'",
    "functions": "call the column 'tools', and each of them {'type': 'function', 'function': …}",
    "function_call": "that is the old form of 'tool_calls': [{'type': 'function', 'function': call}]",
}  # fmt: skip
OURS = {  # of apply_chat_template, and set here
    "messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "tokenizer_kwargs", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask",
}  # fmt: skip
NOT_TEXT = {
    "image",
    "image_url",
    "input_image",
    "audio",
    "input_audio",
    "video",
    "video_url",
    "file",
    "input_file",
}


@dataclass(slots=True)
class Canonical:
    """A row as it is encoded: one member, or the two of a pair, and the columns nobody read."""

    members: list[dict[str, Any]]
    unread: list[str] = field(default_factory=list)


def canonical(row: Any, *, chats: bool = True) -> Canonical:
    """Read a row in any known layout.

    Args:
        row: A text, a list of messages, or a mapping.
        chats: Whether the model has a chat template: a row of Alpaca is then a chat, else Alpaca's own prompt.

    Returns:
        Members that are each {"text"}, {"prompt", "completion"} (texts) or {"messages", "tools"?,
        "chat_template_kwargs"?}; with "target" beside where the row has one. A message that is not learnt has
        `weight: 0`.

    Raises:
        ValidationError: A row of no known layout, or with something in it that is no text where text belongs.
    """
    if isinstance(row, str):
        return Canonical([{"text": checked_text(row, "the text")}])
    if is_chat(row):
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise ValidationError(f"it is {_kind(row)}: a row is a text or a dict.{_as_mapping(row)} {EXPECTED}")
    given = {
        name: value for name, value in row.items() if not missing(value) and not _lacks_nothing(name, value)
    }
    for columns, read, further in LAYOUTS:
        if all(name in given for name in columns):
            members = read(given, chats)
            known = {*columns, *further, "target"}
            return Canonical(_with_target(members, given), _unread(given, known))
    raise _unreadable(row, given)


def _with_target(members: list[dict[str, Any]], given: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**member, "target": given["target"]} for member in members] if "target" in given else members


def _lacks_nothing(name: Any, value: Any) -> bool:
    """Whether a column that cannot be honoured holds nothing that could be: images: []."""
    return name in LACKING and isinstance(value, list | tuple | np.ndarray) and len(value) == 0


def refuse_media(row: Mapping[str, Any]) -> None:
    """Refuse columns of pictures, sound and film: the model would not see them.

    Raises:
        ValidationError: There is one; says which.
    """
    for name in MEDIA:
        if name in row and not missing(row[name]) and not _lacks_nothing(name, row[name]):
            raise ValidationError(
                f"the column {as_given(name)} would not be seen by the model: {_MEDIA}. Where only the reward reads "
                f"it, call "
                f"it otherwise."
            )


def _unread(given: Mapping[Any, Any], known: set[str]) -> list[str]:
    """Return the columns that nobody reads; refuse those that mean something elsewhere."""
    unread = [name for name in given if name not in known]
    for name in unread:
        if name in LACKING or (name == "label" and isinstance(given[name], bool | np.bool_)):
            why = LACKING.get(
                name, "rows of good and bad answers (KTO) have no loss here: keep the good ones"
            )
            raise ValidationError(
                f"the column {as_given(name)} cannot be honoured: {why}. To train without it: "
                f"[{{k: v for k, v in row.items() if k != {as_given(name)}}} for row in rows]."
            )
    return [str(name) for name in unread]


def _as_mapping(row: Any) -> str:
    """Return the line that makes a dict of what has fields of another kind."""
    if hasattr(row, "model_dump"):
        return " Give [row.model_dump() for row in rows]."
    if is_dataclass(row):
        return " Give [dataclasses.asdict(row) for row in rows]."
    if hasattr(row, "to_dict"):
        return " Give [row.to_dict() for row in rows]."
    if isinstance(row, PurePath):
        return " Of files, give [row for path in paths for row in tensafe_nb.data.read_rows(path)]."
    if hasattr(row, "_asdict"):
        return " Give [row._asdict() for row in rows]."
    if isinstance(row, list | tuple) and [type(item) for item in row] == [str, str]:
        return " Name both: [{'prompt': a, 'completion': b} for a, b in rows]."
    return ""


def _unreadable(row: Mapping[Any, Any], given: Mapping[Any, Any]) -> ValidationError:
    for columns, _, _ in LAYOUTS:
        empty = [name for name in columns if name in row and name not in given]
        if empty and all(name in row for name in columns):
            return ValidationError(
                f"{as_given(empty[0])} is {_kind(row[empty[0]])}: give a text, or leave the row out."
            )
    names = sorted(map(str, row))
    if {"role", "content"} <= set(names) or {"from", "value"} <= set(names):
        return ValidationError(
            "it is one message, not a row: a chat is one row, [{'messages': [message, message, …]}]."
        )
    for name in names:
        if name in LACKING:
            return ValidationError(f"a row with the column {as_given(name)} cannot be read: {LACKING[name]}.")
    texts = [name for name in row if isinstance(row[name], str)]  # in their order: what is asked comes first
    line = ""
    if len(texts) >= 2:
        line = (
            f" Name them: [{{'prompt': row[{as_given(texts[0])}], 'completion': row[{as_given(texts[1])}]}} for row "
            f"in rows]"
            f" (whichever is which)."
        )
    elif len(texts) == 1:
        line = f" Name it: [{{'text': row[{as_given(texts[0])}]}} for row in rows]."
    return ValidationError(f"a row with the keys {names} cannot be read. {EXPECTED}{line}")


# the layouts


def _text(row: Mapping[str, Any], chats: bool) -> list[dict[str, Any]]:
    return [{"text": checked_text(row["text"], "'text'")}]


def _completion(row: Mapping[str, Any], chats: bool) -> list[dict[str, Any]]:
    return [_answered(row, "completion")]


def _preference(row: Mapping[str, Any], chats: bool) -> list[dict[str, Any]]:
    return [_answered(row, name) for name in ("chosen", "rejected")]


def _answered(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Read a prompt and what answers it: two texts, or the messages before and those that are learnt."""
    prompt, answer = row["prompt"], row[name]
    if isinstance(prompt, str) and isinstance(answer, str):
        return {"prompt": checked_text(prompt, "'prompt'"), "completion": checked_text(answer, f"'{name}'")}
    if is_chat(answer) and isinstance(
        prompt, str
    ):  # UltraFeedback: the prompt again, as the chat's first message
        messages = messages_of(answer, f"'{name}'")
        if messages[0]["role"] == "assistant":
            messages.insert(0, {"role": "user", "content": checked_text(prompt, "'prompt'")})
        elif not any(m["role"] == "user" and m["content"] == prompt for m in messages):
            raise ValidationError(
                f"{as_given(name)} is a whole chat, and 'prompt' is no message of it: leave one of them out."
            )
        return _chat_of(_learning_the_last(messages), row)
    if not is_chat(prompt) or not is_chat(answer):
        wrong, value = (
            ("prompt", prompt) if not isinstance(prompt, str) and not is_chat(prompt) else (name, answer)
        )
        raise ValidationError(
            f"{as_given(wrong)} is {_kind(value)}: 'prompt' and {as_given(name)} are both texts, or both lists of "
            f"messages "
            f"({{'role', 'content'}}).{_as_text(wrong, value) or _as_messages(wrong, value)}"
        )
    before = [_not_learnt(message) for message in messages_of(prompt, "'prompt'")]
    return _chat_of(before + messages_of(answer, f"'{name}'"), row)


def _as_messages(name: str, value: Any) -> str:
    """Return the line that makes messages of what stands beside some."""
    if isinstance(value, Mapping):
        return f" One message goes in a list: [row[{as_given(name)}]]."
    role = "user" if name == "prompt" else "assistant"
    line = f" As a message: [{{'role': '{role}', 'content': row[{as_given(name)}]}}]."
    return line if isinstance(value, str) else ""


def _chats_compared(row: Mapping[str, Any], chats: bool) -> list[dict[str, Any]]:
    """Read two whole chats: what they share at the beginning is their prompt."""
    if isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        raise ValidationError(
            f"a row with the keys {sorted(map(str, row))} cannot be read: 'chosen' and 'rejected' need a 'prompt'. "
            f"{EXPECTED} To compare whole texts: [{{'prompt': '', **row}} for row in rows]."
        )
    pair = [messages_of(row[name], f"'{name}'") for name in ("chosen", "rejected")]
    shared = 0
    for one, other in zip(*pair, strict=False):
        if one != other:
            break
        shared += 1
    if not all(len(messages) > shared for messages in pair):
        raise ValidationError(
            "'chosen' and 'rejected' do not differ: there is nothing to prefer. Leave it out."
        )
    return [
        _chat_of([_not_learnt(m) if at < shared else m for at, m in enumerate(messages)], row)
        for messages in pair
    ]


def _views(row: Mapping[str, Any], chats: bool) -> list[dict[str, Any]]:
    return [{"text": checked_text(row[name], f"{as_given(name)}")} for name in ("anchor", "positive")]


def _chat(row: Mapping[str, Any], chats: bool) -> list[dict[str, Any]]:
    return [_chat_of(_under_system(messages_of(row["messages"], "'messages'"), row), row)]


def _share_gpt(row: Mapping[str, Any], chats: bool) -> list[dict[str, Any]]:
    name = "conversations" if "conversations" in row else "conversation"
    return [_chat_of(_under_system(messages_of(row[name], f"{as_given(name)}", share_gpt=True), row), row)]


def _under_system(messages: list[dict[str, Any]], row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Put what the column 'system' says before the messages; "" is what a table has where there is nothing."""
    system = checked_text(row.get("system", ""), "'system'")
    if not system or (messages[0]["role"] == "system" and messages[0]["content"] == system):
        return messages
    if messages[0]["role"] == "system":
        raise ValidationError(
            "it has 'system', and its first message is another one of that role: leave one out."
        )
    return [{"role": "system", "content": system}, *messages]


def _alpaca(row: Mapping[str, Any], chats: bool) -> list[dict[str, Any]]:
    answer = checked_text(row["output" if "output" in row else "response"], "the answer")
    instruction = checked_text(row["instruction"], "'instruction'")
    given = checked_text(row.get("input", row.get("context", "")), "the input")
    if not chats:
        if row.get("system"):
            raise ValidationError(
                "'system' has no place in Alpaca's prompt, and this model has no chat template."
            )
        prompt = (ALPACA_WITH_INPUT if given else ALPACA).format(instruction=instruction, input=given)
        return [{"prompt": prompt, "completion": answer}]
    asked = f"{instruction}\n\n{given}" if given else instruction
    chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return [{"messages": _under_system(chat, row)}]


Read = Callable[[Mapping[str, Any], bool], list[dict[str, Any]]]
CHAT = ("tools", "chat_template_kwargs")
LAYOUTS: tuple[tuple[tuple[str, ...], Read, tuple[str, ...]], ...] = (
    # the first whose columns are all there; how it is read; further columns that are read
    (("prompt", "chosen", "rejected"), _preference, CHAT),
    (("chosen", "rejected"), _chats_compared, CHAT),
    (("anchor", "positive"), _views, ()),
    (("messages",), _chat, (*CHAT, "system")),
    (("conversations",), _share_gpt, (*CHAT, "system")),
    (("conversation",), _share_gpt, (*CHAT, "system")),
    (("prompt", "completion"), _completion, CHAT),
    (("instruction", "output"), _alpaca, ("input", "system")),
    (("instruction", "response"), _alpaca, ("context", "system")),
    (("text",), _text, ()),
)
COLUMNS = frozenset(name for columns, _, _ in LAYOUTS for name in columns)


# chats


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages; one that is empty is none."""
    return _many(value) and len(value) > 0 and all(isinstance(message, Mapping) for message in value)


def _many(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def messages_of(value: Any, what: str, *, share_gpt: bool = False) -> list[dict[str, Any]]:
    """Return messages with their content as text, the one form in which training, sampling and rewards know them.

    Content in parts is joined; content may be None beside `tool_calls`; keys without a value are dropped, for tables
    have them; `weight: 0` and `train: False` become `weight: 0`. What else a message has goes to the template.

    Args:
        value: The messages.
        what: Their name, for an error.
        share_gpt: They may have 'from' and 'value' instead of 'role' and 'content'.

    Raises:
        ValidationError: A message without role or content, or content that is no text.
    """
    if isinstance(value, str):
        raise ValidationError(
            f"{what} is a text, not a list of messages. Written as JSON, it is read by "
            f"json.loads(row[{as_given(what.strip(chr(39)))}])."
        )
    if not is_chat(value):
        at = (
            next((n for n, one in enumerate(value) if not isinstance(one, Mapping)), None)
            if _many(value)
            else None
        )
        if at is not None:
            raise ValidationError(
                f"{what}[{at}] is {_kind(value[at])}: a message is a dict with 'role' and 'content'."
            )
        raise ValidationError(f"{what} is {_kind(value)}: a list of messages is expected, with at least one.")
    return [_message(message, f"{what}[{at}]", share_gpt) for at, message in enumerate(value)]


def _message(message: Mapping[str, Any], what: str, share_gpt: bool) -> dict[str, Any]:
    kept = {name: _plain(value) for name, value in message.items() if name == "content" or not missing(value)}
    if share_gpt:
        kept = _renamed(kept, what)
    elif "from" in kept and "role" not in kept:
        raise ValidationError(
            f"{what} has 'from' and 'value', ShareGPT's names. Call the column 'conversations', or rename them: "
            f"[{{'role': m['from'], 'content': m['value']}} for m in messages]."
        )
    if not kept.get("tool_calls", True):  # of a table, or of a server: no calls
        del kept["tool_calls"]
    role = kept.get("role")
    if not isinstance(role, str):
        raise ValidationError(
            f"{what} has no 'role': a message has 'role' and 'content', and this {_keys(kept)}."
        )
    for name in kept:
        if name in LACKING and name != "weight":
            raise ValidationError(f"{what} has {as_given(name)}, which cannot be honoured: {LACKING[name]}.")
    kept["content"] = _content(kept, what)
    return _learnt_or_not(kept, what)


def _plain(value: Any, depth: int = 0, left: list[int] | None = None) -> Any:
    """Return what templates and JSON know: lists instead of arrays and tuples; what has no end is refused."""
    left = [MOST_PARTS] if left is None else left
    left[0] -= value.size if isinstance(value, np.ndarray) else 1
    if depth > DEEPEST or left[0] < 0:
        raise ValidationError(
            f"A message holds {as_given(value)} more than {DEEPEST} levels deep, or more than {MOST_PARTS:,} parts."
        )
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item, depth + 1, left) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item, depth + 1, left) for name, item in value.items()}
    return value


def _renamed(message: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Turn ShareGPT's names into those of chat templates."""
    named = message.get("role", message.get("from"))
    said, text = str(named).lower(), message.get("value", message.get("content"))
    rest = {name: value for name, value in message.items() if name not in ("from", "value")}
    if said == "function_call":
        return {
            **rest,
            "role": "assistant",
            "content": None,
            "tool_calls": [_call(text, what)],
        }
    if said not in ROLES and "role" not in message:
        raise ValidationError(f"{what} is from {as_given(named)}: known are {', '.join(sorted(ROLES))}.")
    return {**rest, "role": ROLES.get(said, named), "content": text}


def _call(value: Any, what: str) -> dict[str, Any]:
    try:
        call = json.loads(value)
        return {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
    except (TypeError, ValueError, KeyError) as error:
        raise ValidationError(
            f"{what} is a function_call, and its value is no JSON object with 'name' and 'arguments'."
        ) from error


def _content(message: Mapping[str, Any], what: str) -> str | None:
    content = message.get("content")
    if isinstance(content, str):
        return checked_text(content, f"{what}'s content")
    if missing(content):
        if "tool_calls" in message:
            return None
        raise ValidationError(
            f"{what} has no content: a text is expected{'' if 'content' in message else f', and this {_keys(message)}'}"
            f" (None only beside 'tool_calls')."
        )
    if isinstance(content, list | tuple | np.ndarray):
        return "".join(_part(part, f"{what}'s content[{at}]") for at, part in enumerate(content))
    raise ValidationError(
        f"{what}'s content is {_kind(content)}: a text is expected.{_as_text('content', content)}"
    )


def _part(part: Any, what: str) -> str:
    if isinstance(part, str):
        return checked_text(part, what)
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return checked_text(part["text"], what)
    if kind in NOT_TEXT:
        raise ValidationError(f"{what} is of type {as_given(kind)}: {_MEDIA}.")
    raise ValidationError(f"{what} is {_kind(part)}: a part is {{'type': 'text', 'text': …}}.")


def _learnt_or_not(message: dict[str, Any], what: str) -> dict[str, Any]:
    """Turn 'weight' and 'train' into `weight: 0`, or nothing."""
    weight, train = message.pop("weight", 1), message.pop("train", True)
    if "train_detail" in message or "training_detail" in message:
        raise ValidationError(f"{what} has 'train_detail': a turn is learnt as a whole, or not (weight: 0).")
    if not isinstance(weight, int | float | np.number) or weight not in (0, 1):
        raise ValidationError(f"{what} has weight {as_given(weight)}: a turn is learnt (1) or not (0).")
    if not isinstance(train, bool | np.bool_):
        raise ValidationError(f"{what} has train {as_given(train)}: True or False.")
    if not weight or not train:
        message["weight"] = 0
    return message


def _learning_the_last(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a whole chat that answers a prompt, only the last turn of the assistant is the answer."""
    last = max((at for at, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    return [m if at >= last else _not_learnt(m) for at, m in enumerate(messages)]


def _not_learnt(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"weight": 0} if message["role"] == "assistant" else message


def _chat_of(messages: list[dict[str, Any]], row: Mapping[str, Any]) -> dict[str, Any]:
    if not any(message["role"] == "assistant" and "weight" not in message for message in messages):
        roles = sorted({message["role"] for message in messages})
        if "assistant" in roles:
            raise ValidationError(
                "nothing of this chat is learnt: all its answers have weight 0. Leave it out."
            )
        raise ValidationError(
            f"nothing of this chat is learnt: its turns are of {roles}, and none of the assistant. Leave it out"
            f"{', or call the role of its answers assistant.' if len(roles) > 1 else '.'}"
        )
    return {"messages": messages, **template_options(row)}


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row has for the chat template beside its messages: `tools` and `chat_template_kwargs`, if any.

    Raises:
        ValidationError: Tools that are no list of dicts, or keywords that are no dict.
    """
    options: dict[str, Any] = {}
    if not missing(row.get("tools")) and (tools := tools_of(row["tools"])):
        options["tools"] = tools
    keywords = row.get("chat_template_kwargs")
    if not missing(keywords):
        if not isinstance(keywords, Mapping) or not all(isinstance(name, str) for name in keywords):
            raise ValidationError(
                f"'chat_template_kwargs' is {_kind(keywords)}: a dict of keywords is expected."
            )
        if taken := sorted(OURS & keywords.keys()):
            raise ValidationError(
                f"'chat_template_kwargs' has {as_given(taken[0])}, which is no word of the template but of whoever "
                f"calls it: "
                f"leave it out{' (tools have a column of that name)' if taken[0] == 'tools' else ''}."
            )
        options["chat_template_kwargs"] = _plain(keywords)
    return options


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """Return tools as chat templates take them; they may be written as JSON. None for an empty list.

    Raises:
        ValidationError: They are no list of dicts.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value or "[]")
        except ValueError as error:
            raise ValidationError(f"'tools' is a text that is not JSON ({error}).") from error
    if isinstance(value, list | tuple | np.ndarray) and all(isinstance(tool, Mapping) for tool in value):
        return [_plain(tool) for tool in value] or None
    raise ValidationError(
        f"'tools' is {_kind(value)}: a list of JSON schemas is expected, one dict for each tool."
    )


def check_template(template: Any, messages: Sequence[Mapping[str, Any]], tools: Any) -> None:
    """Refuse tools, and calls of them, where the model's chat template does not show them: they would be dropped.

    Raises:
        ValidationError: The template never mentions what is there.
    """
    if template is None:
        return  # such a model reads no chat at all, which is said elsewhere
    written = str(template)
    called = any("tool_calls" in message for message in messages)
    for name, there in (("tools", tools), ("tool_calls", called)):
        if there and name not in written:
            raise ValidationError(
                f"it has {as_given(name)}, and this model's chat template does not show them: the model would not "
                f"see them. "
                f"Write them into the messages' content, leave them out, or give the tokenizer a template that "
                f"shows them (tc.tokenizer.chat_template = …)."
            )


def unshown(template: Any, member: Mapping[str, Any]) -> set[str]:
    """Return what a row has for a chat template that never mentions it: keys of messages, and keywords."""
    keys = set().union(*member.get("messages", ())) - {"role", "content", "weight"}
    further = {f"messages.{name}": str(name) for name in keys}
    further |= {f"chat_template_kwargs.{name}": name for name in member.get("chat_template_kwargs", ())}
    written = str(template) if further else ""
    return {place for place, name in further.items() if name not in written}


# values


def checked_text(value: Any, what: str) -> str:
    """Return a text that a tokenizer can read.

    Raises:
        ValidationError: It is none, or holds half a surrogate pair.
    """
    if not isinstance(value, str):
        name = what.strip("'") if what.startswith("'") else ""
        raise ValidationError(f"{what} is {_kind(value)}: a text is expected.{_as_text(name, value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValidationError(
            f"{what} holds half a surrogate pair ({value[error.start]!a} at character {error.start}), which is no "
            f"character: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') mends it."
        ) from error
    return str(value)  # of numpy.str_, too


def missing(value: Any) -> bool:
    """Whether a value says that there is none: None, NaN, or pandas' NA and NaT."""
    return not isinstance(value, str) and (  # most are
        value is None
        or (isinstance(value, float | np.floating) and bool(value != value))
        or type(value).__name__ in ("NAType", "NaTType")
    )


def _kind(value: Any) -> str:
    if missing(value):
        return "None" if value is None else f"missing ({value})"
    if isinstance(value, list | tuple | np.ndarray) and len(value) == 0:
        return "empty"
    if isinstance(value, bool | int | float | np.generic):
        plain = value.item() if isinstance(value, np.generic) else value
        return f"the {type(value).__name__} {as_given(plain)}"
    return f"a {type(value).__name__}"


def _as_text(name: str, value: Any) -> str:
    """Return the line that makes a text of it, where there is an honest one."""
    if (
        name
        and isinstance(value, int | float | np.number)
        and not isinstance(value, bool)
        and not missing(value)
    ):
        return f" str(row[{as_given(name)}]) makes one; of a column, frame[{as_given(name)}].astype(str)."
    if name and isinstance(value, bytes):
        return f" row[{as_given(name)}].decode() makes one."
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
        return " One row has one text: give a row for each."
    return ""


def _keys(message: Mapping[Any, Any]) -> str:
    return f"has {sorted(map(str, message))}"


def shortened(row: Any) -> str:
    """Return a row in at most 80 characters."""
    text = row if isinstance(row, str) else as_given(row)
    return text if len(text) <= 80 else f"{text[:80]}…"
