"""Rows as public data sets have them → rows of one kind: a text, a prompt and its completion, or a chat.

`canonical` is the only place that knows layouts. Its rows hold nothing but text where text belongs: content given in
parts is joined, a turn that is not to be learnt has `weight: 0`, and columns that nobody reads are named.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from tensafe_nb.data.messages import LACKING, MEDIA, NO_MEDIA, is_chat, messages_of, template_options
from tensafe_nb.data.values import checked_text, is_list, kind_of, missing, text_hint
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError

EXPECTED = (
    "Expected 'text', 'prompt' and 'completion', or 'messages' ('conversations', 'instruction' and 'output' are read "
    "too); of a pair, 'prompt', 'chosen' and 'rejected', or 'anchor' and 'positive'."
)
STORED = ("ref_chosen_logps", "ref_rejected_logps")  # as TRL calls them
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
        raise ValidationError(f"it is {kind_of(row)}: a row is a text or a dict.{dict_hint(row)} {EXPECTED}")
    given = {
        name: value for name, value in row.items() if not missing(value) and not _lacks_nothing(name, value)
    }
    for (
        columns,
        read,
        further,
    ) in LAYOUTS:  # the first that fits: a preference has a prompt, and is no completion
        if all(name in given for name in columns):
            members, target = read(given, chats), {name: given[name] for name in ("target",) if name in given}
            scored = reference_scores(given) if "rejected" in columns else []
            unread = unread_columns(given, {*columns, *further, "target", *(STORED if scored else ())})
            told = scored or [{}] * len(members)
            return Canonical(
                [member | target | one for member, one in zip(members, told, strict=True)], unread
            )
    raise refusal(row, given)


def reference_scores(row: Mapping[Any, Any]) -> list[dict[str, float]]:
    """Return what a reference policy says of both sides of a pair, where the row has it: for `dpo` and `ipo`.

    Raises:
        ValidationError: Of one side only, or what is no log-probability.
    """
    there = [name for name in STORED if name in row]
    if not there:
        return []
    if len(there) == 1:
        raise ValidationError(
            f"it has {there[0]!r}, and not {next(name for name in STORED if name not in there)!r}."
        )
    for name in STORED:
        value = row[name]
        if (
            isinstance(value, bool | np.bool_)
            or not isinstance(value, int | float | np.number)
            or not value <= 0
        ):
            raise ValidationError(
                f"{name!r} is {kind_of(value)}: the sum of the reference's log-probabilities over the answer's tokens "
                f"is expected, a number that is 0 or below."
            )
    return [{"reference": float(row[name])} for name in STORED]


def _lacks_nothing(name: Any, value: Any) -> bool:
    """Whether a column that cannot be honoured holds nothing that could be: images: []."""
    return name in LACKING and is_list(value) and len(value) == 0


def refuse_media(row: Mapping[str, Any]) -> None:
    """Refuse columns of pictures, sound and film: the model would not see them.

    Raises:
        ValidationError: There is one; says which.
    """
    for name in MEDIA:
        if name in row and not missing(row[name]) and not _lacks_nothing(name, row[name]):
            raise ValidationError(
                f"the column {as_given(name)} would not be seen by the model: {NO_MEDIA}. Where only the reward reads "
                f"it, call it otherwise."
            )


def unread_columns(given: Mapping[Any, Any], known: set[str]) -> list[str]:
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


def dict_hint(row: Any) -> str:
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


def refusal(row: Mapping[Any, Any], given: Mapping[Any, Any]) -> ValidationError:
    """Return why a row has no known layout, and the line that gives it one."""
    for columns, _, _ in LAYOUTS:
        empty = [name for name in columns if name in row and name not in given]
        if empty and all(name in row for name in columns):
            return ValidationError(
                f"{as_given(empty[0])} is {kind_of(row[empty[0]])}: give a text, or leave the row out."
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
            f"in rows] (whichever is which)."
        )
    elif len(texts) == 1:
        line = f" Name it: [{{'text': row[{as_given(texts[0])}]}} for row in rows]."
    return ValidationError(f"a row with the keys {names} cannot be read. {EXPECTED}{line}")


# readers of layouts: the columns of a row, and whether the model reads chats → its members


def read_text(row: Mapping[str, Any], chats: bool) -> list[dict[str, Any]]:
    return [{"text": checked_text(row["text"], "'text'")}]


def read_completion(row: Mapping[str, Any], chats: bool) -> list[dict[str, Any]]:
    return [_answered(row, "completion")]


def read_preference(row: Mapping[str, Any], chats: bool) -> list[dict[str, Any]]:
    return [_answered(row, name) for name in ("chosen", "rejected")]


def _answered(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Read a prompt and what answers it: two texts, or the messages before it and those to be learnt."""
    prompt, answer = row["prompt"], row[name]
    if isinstance(prompt, str) and isinstance(answer, str):
        return {"prompt": checked_text(prompt, "'prompt'"), "completion": checked_text(answer, f"'{name}'")}
    if is_chat(answer) and isinstance(prompt, str):
        # UltraFeedback: the prompt again, as the chat's first message. Only the last turn is the answer to it.
        messages = messages_of(answer, f"'{name}'")
        if messages[0]["role"] == "assistant":
            messages.insert(0, {"role": "user", "content": checked_text(prompt, "'prompt'")})
        elif not any(m["role"] == "user" and m["content"] == prompt for m in messages):
            raise ValidationError(
                f"{as_given(name)} is a whole chat, and 'prompt' is no message of it: leave one of them out."
            )
        last = max((at for at, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
        return _chat_of([m if at >= last else _not_learnt(m) for at, m in enumerate(messages)], row)
    if not is_chat(prompt) or not is_chat(answer):
        readable = isinstance(prompt, str) or is_chat(prompt)
        wrong, value = (name, answer) if readable else ("prompt", prompt)
        raise ValidationError(
            f"{as_given(wrong)} is {kind_of(value)}: 'prompt' and {as_given(name)} are both texts, or both lists of "
            f"messages ({{'role', 'content'}}).{text_hint(wrong, value) or messages_hint(wrong, value)}"
        )
    before = [_not_learnt(message) for message in messages_of(prompt, "'prompt'")]
    return _chat_of(before + messages_of(answer, f"'{name}'"), row)


def messages_hint(name: str, value: Any) -> str:
    """Return the line that makes messages of what stands beside some."""
    if isinstance(value, Mapping):
        return f" One message goes in a list: [row[{as_given(name)}]]."
    role = "user" if name == "prompt" else "assistant"
    line = f" As a message: [{{'role': '{role}', 'content': row[{as_given(name)}]}}]."
    return line if isinstance(value, str) else ""


def read_compared_chats(row: Mapping[str, Any], chats: bool) -> list[dict[str, Any]]:
    """Read two whole chats: what they share at the beginning is their prompt."""
    if isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        raise ValidationError(
            f"a row with the keys {sorted(map(str, row))} cannot be read: 'chosen' and 'rejected' need a 'prompt'. "
            f"{EXPECTED} To compare whole texts: [{{'prompt': '', **row}} for row in rows]."
        )
    pair = [messages_of(row[name], f"'{name}'") for name in ("chosen", "rejected")]
    shared = 0  # messages with which both begin
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


def read_alike(row: Mapping[str, Any], chats: bool) -> list[dict[str, Any]]:
    """Read two texts that say the same, for `contrastive`."""
    return [{"text": checked_text(row[name], f"{as_given(name)}")} for name in ("anchor", "positive")]


def read_messages(row: Mapping[str, Any], chats: bool) -> list[dict[str, Any]]:
    return [_chat_of(_under_system(messages_of(row["messages"], "'messages'"), row), row)]


def read_share_gpt(row: Mapping[str, Any], chats: bool) -> list[dict[str, Any]]:
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


def read_alpaca(row: Mapping[str, Any], chats: bool) -> list[dict[str, Any]]:
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
    asked = f"{instruction}\n\n{given}" if given else instruction  # a chat template brings its own headings
    chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return [{"messages": _under_system(chat, row)}]


def _not_learnt(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"weight": 0} if message["role"] == "assistant" else message


def _chat_of(messages: list[dict[str, Any]], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the member of a chat; refuse one of which nothing is learnt."""
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


Read = Callable[[Mapping[str, Any], bool], list[dict[str, Any]]]
CHAT = ("tools", "chat_template_kwargs")
LAYOUTS: tuple[tuple[tuple[str, ...], Read, tuple[str, ...]], ...] = (
    # the first whose columns are all there; how it is read; further columns that are read
    (("prompt", "chosen", "rejected"), read_preference, CHAT),
    (("chosen", "rejected"), read_compared_chats, CHAT),
    (("anchor", "positive"), read_alike, ()),
    (("messages",), read_messages, (*CHAT, "system")),
    (("conversations",), read_share_gpt, (*CHAT, "system")),
    (("conversation",), read_share_gpt, (*CHAT, "system")),
    (("prompt", "completion"), read_completion, CHAT),
    (("instruction", "output"), read_alpaca, ("input", "system")),
    (("instruction", "response"), read_alpaca, ("context", "system")),
    (("text",), read_text, ()),
)
COLUMNS = frozenset(name for columns, _, _ in LAYOUTS for name in columns)
