"""Tools in a chat: OpenAI's form of calls, and the one in which chat templates show and models write them."""

import json
import re
import uuid
from collections.abc import Mapping
from typing import Any

from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr.tools.formats import ToolFormat

BEGINS = re.compile(r"<tool_call>|\[TOOL_CALLS\]|<\|python_tag\|>")  # where calls begin in what a model says


def with_arguments_read(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as chat templates take it: arguments of calls as an object, a developer's as the system's.

    Raises:
        ValidationError: Arguments that are no JSON object.
    """
    read = dict(message)
    if read.get("role") == "developer":
        read["role"] = "system"
    calls = read.get("tool_calls")
    if isinstance(calls, list):
        read["tool_calls"] = [call_read(call) for call in calls]
    return read


def call_read(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError) as error:
        raise ValidationError(f"The arguments of a call in 'tool_calls' are no JSON: {error}.") from error
    return {**call, "function": {**function, "arguments": arguments}}


def calls_of(form: ToolFormat, said: str) -> tuple[str | None, list[dict[str, Any]]]:
    """Return what a model said beside its calls of tools, and the calls; what cannot be read as one stays text."""
    calls = form.calls(said)
    if not calls or any(call.problem or call.values for call in calls):
        return said, []
    begun = BEGINS.search(said)
    beside = said[: begun.start()].strip() if begun else ""
    return beside or None, [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": json.dumps(call.arguments, ensure_ascii=False, default=str),
            },
        }
        for call in calls
    ]
