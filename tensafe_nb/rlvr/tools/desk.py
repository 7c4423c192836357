"""The desk at which calls are carried out: whatever goes wrong with one is told to the model, and nobody else."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tensafe_nb.rlvr.tools.formats import ToolCall
from tensafe_nb.rlvr.tools.tool import Tool, ToolError

MOST_CALLS = 16  # in one turn


@dataclass(frozen=True, slots=True)
class Done:
    """A call that was carried out.

    Attributes:
        call: As the model wrote it.
        result: What the model is told.
        ok: Whether it went well.
    """

    call: ToolCall
    result: str
    ok: bool

    def record(self) -> dict[str, Any]:
        """Return what a conversation keeps of it."""
        given = {f"{place}": value for place, value in enumerate(self.call.values, 1)}
        return {"name": self.call.name, "arguments": {**given, **self.call.arguments}, "ok": self.ok}


def carried_out(calls: Sequence[ToolCall], tools: Mapping[str, Tool], timeout: float | None) -> list[Done]:
    """Carry out the calls of a turn, in order.

    Args:
        calls: As they were read.
        tools: By name.
        timeout: Seconds that they may take together; None calls them without a limit.
    """
    ends = None if timeout is None else time.monotonic() + timeout
    done: list[Done] = []
    for number, call in enumerate(calls):
        try:
            if number >= MOST_CALLS:
                raise ToolError(f"there may be {MOST_CALLS} calls in a turn, and this is one more")
            left = None if ends is None else max(ends - time.monotonic(), 0.001)
            done.append(Done(call, called(call, tools, left), True))
        except ToolError as error:
            done.append(Done(call, f"Error: {error}", False))
        if number >= MOST_CALLS:
            break
    return done


def called(call: ToolCall, tools: Mapping[str, Tool], timeout: float | None) -> str:
    """Make one call and return its result.

    Raises:
        ToolError: It could not be read, there is no such tool, or the tool says so.
    """
    if call.problem is not None:
        raise ToolError(call.problem)
    if call.name not in tools:
        raise ToolError(f"there is no tool '{call.name[:80]}'. There are: {', '.join(tools)}")
    tool = tools[call.name]
    return tool.call({**tool.named(call.values), **call.arguments}, timeout)
