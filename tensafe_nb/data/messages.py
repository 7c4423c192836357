"""Messages of a chat in one form: content as text, `weight: 0` where a turn is not learnt, no empty keys.

Training, sampling and rewards read a chat through `messages_of`. What a model could not see (pictures, tools that its
template does not show) is refused here.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tensafe_nb.data.values import checked_text, is_list, kind_of, missing, text_hint
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError

DEEPEST, MOST_PARTS = 64, 1 << 20  # of a message and its tool calls
ROLES = {  # of ShareGPT's 'from'
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "system": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
MEDIA = ("image", "images", "pixel_values", "audio", "audios", "input_features", "video", "videos")
NO_MEDIA = "only text is read here"
NO_TOKENS = (
    "rows of tokens make a batch: tc.forward_backward({'input_ids': …, 'labels': …}), with labels shifted"
)
NO_TEACHER = "there is no loss here that learns from another model's probabilities"
NO_WEIGHTS = "rows have no weights here: leave rows out, or list them several times"
LACKING = {
    **dict.fromkeys(MEDIA, NO_MEDIA),
    **dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids", "labels", "tokens", "completion_mask", "assistant_masks"),
        NO_TOKENS,
    ),
    **dict.fromkeys(("logits", "teacher_logits", "logprobs", "top_logprobs", "ref_logps"), NO_TEACHER),
    **dict.fromkeys(("weight", "weights", "sample_weight", "loss_weight"), NO_WEIGHTS),
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
NOT_TEXT = {  # types of parts of a content
    "image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file", "input_file",
}  # fmt: skip


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages; one that is empty is none."""
    return is_list(value) and len(value) > 0 and all(isinstance(message, Mapping) for message in value)


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
        items = value if is_list(value) else ()
        at = next((n for n, one in enumerate(items) if not isinstance(one, Mapping)), None)
        if at is not None:
            raise ValidationError(
                f"{what}[{at}] is {kind_of(value[at])}: a message is a dict with 'role' and 'content'."
            )
        raise ValidationError(
            f"{what} is {kind_of(value)}: a list of messages is expected, with at least one."
        )
    return [canonical_message(message, f"{what}[{at}]", share_gpt) for at, message in enumerate(value)]


def canonical_message(message: Mapping[str, Any], what: str, share_gpt: bool) -> dict[str, Any]:
    """Return one message in the one form; see `messages_of`."""
    kept = {
        name: plain_value(value) for name, value in message.items() if name == "content" or not missing(value)
    }
    if share_gpt:
        kept = from_share_gpt(kept, what)
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
            f"{what} has no 'role': a message has 'role' and 'content', and this has {sorted(map(str, kept))}."
        )
    for name in kept:
        if name in LACKING and name != "weight":
            raise ValidationError(f"{what} has {as_given(name)}, which cannot be honoured: {LACKING[name]}.")
    kept["content"] = content_text(kept, what)
    return with_weight(kept, what)


def plain_value(value: Any, depth: int = 0, left: list[int] | None = None) -> Any:
    """Return what templates and JSON know: lists instead of arrays and tuples; what has no end is refused."""
    left = [MOST_PARTS] if left is None else left
    # all parts count, not only those of one level: a small file can hold a million empty lists
    left[0] -= value.size if isinstance(value, np.ndarray) else 1
    if depth > DEEPEST or left[0] < 0:
        raise ValidationError(
            f"A message holds {as_given(value)} more than {DEEPEST} levels deep, or more than {MOST_PARTS:,} parts."
        )
    if is_list(value):
        return [plain_value(item, depth + 1, left) for item in value]
    if isinstance(value, Mapping):
        return {name: plain_value(item, depth + 1, left) for name, item in value.items()}
    return value


def from_share_gpt(message: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Turn ShareGPT's names into those of chat templates."""
    named = message.get("role", message.get("from"))
    said, text = str(named).lower(), message.get("value", message.get("content"))
    rest = {name: value for name, value in message.items() if name not in ("from", "value")}
    if said == "function_call":
        return {
            **rest,
            "role": "assistant",
            "content": None,
            "tool_calls": [tool_call(text, what)],
        }
    if said not in ROLES and "role" not in message:
        raise ValidationError(f"{what} is from {as_given(named)}: known are {', '.join(sorted(ROLES))}.")
    return {**rest, "role": ROLES.get(said, named), "content": text}


def tool_call(value: Any, what: str) -> dict[str, Any]:
    try:
        call = json.loads(value)
        return {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
    except (TypeError, ValueError, KeyError) as error:
        raise ValidationError(
            f"{what} is a function_call, and its value is no JSON object with 'name' and 'arguments'."
        ) from error


def content_text(message: Mapping[str, Any], what: str) -> str | None:
    content = message.get("content")
    if isinstance(content, str):
        return checked_text(content, f"{what}'s content")
    if missing(content):
        if "tool_calls" in message:
            return None
        keys = "" if "content" in message else f", and this has {sorted(map(str, message))}"
        raise ValidationError(
            f"{what} has no content: a text is expected{keys} (None only beside 'tool_calls')."
        )
    if is_list(content):
        return "".join(part_text(part, f"{what}'s content[{at}]") for at, part in enumerate(content))
    raise ValidationError(
        f"{what}'s content is {kind_of(content)}: a text is expected.{text_hint('content', content)}"
    )


def part_text(part: Any, what: str) -> str:
    if isinstance(part, str):
        return checked_text(part, what)
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return checked_text(part["text"], what)
    if kind in NOT_TEXT:
        raise ValidationError(f"{what} is of type {as_given(kind)}: {NO_MEDIA}.")
    raise ValidationError(f"{what} is {kind_of(part)}: a part is {{'type': 'text', 'text': …}}.")


def with_weight(message: dict[str, Any], what: str) -> dict[str, Any]:
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
                f"'chat_template_kwargs' is {kind_of(keywords)}: a dict of keywords is expected."
            )
        if taken := sorted(OURS & keywords.keys()):
            raise ValidationError(
                f"'chat_template_kwargs' has {as_given(taken[0])}, which is no word of the template but of whoever "
                f"calls it: leave it out{' (tools have a column of that name)' if taken[0] == 'tools' else ''}."
            )
        options["chat_template_kwargs"] = plain_value(keywords)
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
    if is_list(value) and all(isinstance(tool, Mapping) for tool in value):
        return [plain_value(tool) for tool in value] or None
    raise ValidationError(
        f"'tools' is {kind_of(value)}: a list of JSON schemas is expected, one dict for each tool."
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
                f"see them. Write them into the messages' content, leave them out, or give the tokenizer a template "
                f"that shows them (tc.tokenizer.chat_template = …)."
            )


def unshown(template: Any, member: Mapping[str, Any]) -> set[str]:
    """Return what a row has for a chat template that never mentions it: keys of messages, and keywords."""
    keys = set().union(*member.get("messages", ())) - {"role", "content", "weight"}
    further = {f"messages.{name}": str(name) for name in keys}
    further |= {f"chat_template_kwargs.{name}": name for name in member.get("chat_template_kwargs", ())}
    written = str(template) if further else ""
    return {place for place, name in further.items() if name not in written}
