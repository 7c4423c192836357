"""Marks around what the assistant and its tools say: they tell where each message stands in a rendered chat.

A template may trim, move or escape what it is given; characters of a private plane of Unicode come through all of it.
"""

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Messages = list[dict[str, Any]]
MARKS = 0x100000  # the last private plane of Unicode: run n stands between MARKS + 2n and MARKS + 2n + 1
# a mark as it is, or as JSON escapes it: two surrogates
MARK = re.compile(rf"[{chr(MARKS)}-{chr(0x10FFFD)}]|\\udb[c-f][0-9a-f]\\ud[c-f][0-9a-f]{{2}}")
THOUGHT = re.compile(r"(</?[\w:]*think[\w:]*>|\[/?THINK\])")  # templates take answers apart at these
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


@dataclass(slots=True)
class Utterance:
    """The place in a rendering of what a message says, without the blanks around it."""

    start: int
    end: int
    before: str
    after: str
    calls: bool


@dataclass(slots=True)
class MarkedRuns:
    """Runs of text between marks: whose each is, and what stands around it in its message."""

    owner: list[int] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    of_call: list[bool] = field(default_factory=list)

    def marked(self, messages: Messages) -> Messages:
        """Return the messages with marks in what the assistant and its tools say."""
        return [
            message
            if message.get("role") in ("user", "system", "developer")
            else self.marked_message(message, number)
            for number, message in enumerate(messages)
        ]

    def marked_message(self, message: dict[str, Any], number: int) -> dict[str, Any]:
        made = dict(message)
        for key in (*THOUGHTS, "content"):
            if key in made:
                made[key] = self.marked_content(made[key], number)
        if message.get("role") == "assistant" and isinstance(made.get("tool_calls"), list):
            made["tool_calls"] = [self._call(call, number) for call in made["tool_calls"]]
        return made

    def _call(self, call: Any, number: int) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._call(call["function"], number)}
        return {
            key: self._leaves(value, number) if key in ("name", "arguments") else value
            for key, value in call.items()
        }

    def _leaves(self, value: Any, number: int) -> Any:
        if isinstance(value, str):
            return self._run(value, number, of_call=True)
        if isinstance(value, Mapping):
            return {key: self._leaves(one, number) for key, one in value.items()}
        return [self._leaves(one, number) for one in value] if isinstance(value, list) else value

    def marked_content(self, value: Any, number: int) -> Any:
        if isinstance(value, str):
            return self._text(value, number)
        if isinstance(value, list):  # content in parts
            return [
                {**part, "text": self._text(part["text"], number)}
                if isinstance(part, Mapping) and isinstance(part.get("text"), str)
                else part
                for part in value
            ]
        return value

    def _text(self, text: str, number: int) -> str:
        if not THOUGHT.search(text):
            return self._run(text, number)
        made, at = "", 0
        for piece in THOUGHT.split(text):
            made += self._run(piece, number, text[:at], text[at + len(piece) :])
            at += len(piece)
        return made

    def _run(self, text: str, number: int, left: str = "", right: str = "", *, of_call: bool = False) -> str:
        core = text.strip()
        if not core or THOUGHT.fullmatch(core):
            return text
        lead = text[: len(text) - len(text.lstrip())]
        trail = text[len(lead) + len(core) :]
        opening = MARKS + 2 * len(self.owner)
        self.owner.append(number)
        self.before.append(left + lead)
        self.after.append(trail + right)
        self.of_call.append(of_call)
        return f"{lead}{chr(opening)}{core}{chr(opening + 1)}{trail}"

    def places(self, marked: str) -> dict[int, list[tuple[int, int]]]:
        """Return where each run stands in a rendering with marks, counted as if it had none."""
        places: dict[int, list[tuple[int, int]]] = {}
        opened: dict[int, int] = {}
        left_out = 0
        for mark in MARK.finditer(marked):
            run, closes = divmod(ord(json.loads(f'"{mark[0]}"')) - MARKS, 2)
            at = mark.start() - left_out
            left_out += len(mark[0])
            if not closes:
                opened[run] = at
            elif run in opened:
                places.setdefault(run, []).append((opened.pop(run), at))
        return places

    def utterances(self, marked: str) -> dict[int, Utterance]:
        """Return where each marked message stands: the last place of each run that comes after the message before."""
        places = self.places(marked)
        said: dict[int, Utterance] = {}
        floor = 0
        for number, group in itertools.groupby(range(len(self.owner)), key=self.owner.__getitem__):
            spots = []
            for run in group:
                after = [place for place in places.get(run, ()) if place[0] >= floor]
                if after:
                    # the name of a tool comes again with the tool's answer, an answer at most before its turn
                    spots.append((after[0] if self.of_call[run] else after[-1], run))
            if not spots:
                continue
            first, last = min(spots), max(spots, key=lambda spot: spot[0][1])
            floor = last[0][1]
            calls = any(self.of_call[run] for _, run in spots)
            said[number] = Utterance(first[0][0], floor, self.before[first[1]], self.after[last[1]], calls)
        return said
