"""How models write calls of tools, and how they are told of tools and results; which way is decided by the template.

A format reads the calls out of what a model said. What was meant to be a call and cannot be read is a call with a
`problem`, which the model is told; what is no call at all is an answer.
"""

import ast
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError, nearest
from tensafe_nb.rlvr.tools.tool import Tool

_JSON = json.JSONDecoder(strict=False)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call as the model wrote it.

    Attributes:
        name: Of the tool; empty where none could be read.
        arguments: By name.
        values: Those that were given by their place instead.
        problem: Why it cannot be carried out; None where it may be.
    """

    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    values: Sequence[Any] = ()
    problem: str | None = None


class ToolFormat(ABC):
    """A way to write calls.

    Attributes:
        name: What `tool_environment(format=…)` knows it by.
        shape: A call, as the model is shown it where its template shows none.
        marks: What a chat template that has this format holds.
    """

    name: ClassVar[str]
    shape: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]

    @abstractmethod
    def calls(self, said: str) -> list[ToolCall]:
        """Return the calls in what a model said, in order; none where it is an answer."""

    def told(self, calls: Sequence[ToolCall], results: Sequence[str]) -> str | list[dict[str, Any]]:
        """Return what the model is told of its calls: a `tool` message for each, or a text."""
        return [
            {"role": "tool", "name": call.name or "unknown", "content": result}
            for call, result in zip(calls, results, strict=True)
        ]

    def described(self, tools: Sequence[Tool]) -> str:
        """Say which tools there are and how to call them, to a model whose template does not."""
        shown = "\n".join(json.dumps(tool.schema["function"], ensure_ascii=False) for tool in tools)
        return (
            f"You may call tools before you answer. They are given as JSON schemas:\n<tools>\n{shown}\n</tools>\n"
            f"Call one like this:\n{self.shape}"
        )


class Hermes(ToolFormat):
    """That of Qwen, Hermes and SmolLM: JSON between tags, as many calls as wanted."""

    name = "hermes"
    shape = '<tool_call>\n{"name": <name>, "arguments": {<argument>: <value>}}\n</tool_call>'
    marks: ClassVar[tuple[str, ...]] = ("<tool_call>",)
    _call: ClassVar = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)

    def calls(self, said: str) -> list[ToolCall]:
        # what a model thinks before it speaks is no call
        said = said.rpartition("</think>")[2]
        return [call for body in self._call.findall(said) for call in calls_in(body.strip())]


class QwenXML(Hermes):
    """That of newer Qwen: a tag for each argument."""

    name = "qwen_xml"
    shape = (
        "<tool_call>\n<function=NAME>\n<parameter=ARGUMENT>\nVALUE\n</parameter>\n</function>\n</tool_call>"
    )
    marks = ("<function=", "<parameter=")
    _function: ClassVar = re.compile(r"\s*<function=([^>\s]+)>(.*?)(?:</function>\s*|\Z)", re.DOTALL)
    _parameter: ClassVar = re.compile(
        r"<parameter=([^>\s]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL
    )

    def calls(self, said: str) -> list[ToolCall]:
        return [self._read(body) for body in self._call.findall(said.rpartition("</think>")[2])]

    def _read(self, body: str) -> ToolCall:
        found = self._function.fullmatch(body)
        if found is None:
            return ToolCall(problem=f"the call cannot be read: write it as {self.shape}")
        return ToolCall(
            found[1], {name: value_of(value) for name, value in self._parameter.findall(found[2])}
        )


class Llama(ToolFormat):
    """That of Llama 3: the whole message is the call, in JSON."""

    name = "llama"
    shape = '{"name": <name>, "parameters": {<argument>: <value>}}'
    marks = ('"parameters": ', "ipython")
    _tokens: ClassVar = re.compile(r"<\|(?:python_tag|eom_id|eot_id)\|>")

    def calls(self, said: str) -> list[ToolCall]:
        text = self._tokens.sub("", said).strip()
        meant = re.match(r'\{\s*"(?:name|function|type|parameters|arguments)"', text)
        return calls_in(text) if meant else []


class Mistral(ToolFormat):
    """That of Mistral: after a mark, a list in JSON, or names and their arguments."""

    name = "mistral"
    shape = '[TOOL_CALLS] [{"name": <name>, "arguments": {<argument>: <value>}}]'
    marks = ("[TOOL_CALLS]",)
    _named: ClassVar = re.compile(
        r"\s*(?:\[TOOL_CALLS\])?\s*([A-Za-z_][\w.-]*)\s*(?:\[CALL_ID\]\w*)?\s*(?:\[ARGS\])?\s*(?=\{)"
    )

    def calls(self, said: str) -> list[ToolCall]:
        _, marked, body = said.partition("[TOOL_CALLS]")
        if not marked:
            body = said if re.match(r'\s*\[\s*\{\s*"name"', said) else ""
        body = body.strip().removesuffix("</s>").strip()
        if not marked and not body:
            return []
        if not self._named.match(body):
            return calls_in(body)
        found: list[ToolCall] = []
        while named := self._named.match(body):
            try:
                arguments, end = _JSON.raw_decode(body, named.end())
            except ValueError as error:
                return [*found, ToolCall(named[1], problem=not_json(error))]
            found.append(ToolCall(named[1], arguments))
            body = body[end:]
        return found


class Plain(ToolFormat):
    """Ours, for models without a template: a call as in Python, between square brackets."""

    name = "plain"
    shape = "[name(argument, …)]"
    marks = ()
    _call: ClassVar = re.compile(
        r"\[([A-Za-z_]\w*\(.*?\))(?:\]|\s*\Z)|\[([A-Za-z_]\w*\([^\])]*)\Z", re.DOTALL
    )

    def calls(self, said: str) -> list[ToolCall]:
        return [read_python(whole or begun) for whole, begun in self._call.findall(said)]

    def told(self, calls: Sequence[ToolCall], results: Sequence[str]) -> str:
        return f" -> {', '.join(results)}\n"

    def described(self, tools: Sequence[Tool]) -> str:
        shown = "\n".join(
            f"[{tool.signature}]{tool.description and f' {tool.description}'}" for tool in tools
        )
        return f"Tools you may call, in square brackets:\n{shown}"


FORMATS: dict[str, ToolFormat] = {
    made.name: made for made in (QwenXML(), Hermes(), Mistral(), Llama(), Plain())
}  # as they are looked for in a template


def format_named(name: str | ToolFormat) -> ToolFormat:
    """Return the format of this name.

    Raises:
        ValidationError: There is none.
    """
    if isinstance(name, ToolFormat):
        return name
    if not isinstance(name, str) or name not in FORMATS:
        near = nearest(name, [*FORMATS, "auto"]) if isinstance(name, str) else ""
        raise ValidationError(
            f"format={as_given(name)} is no way to write calls.{near} Known are "
            f"'auto', {', '.join(map(repr, FORMATS))}; or give an object with the methods of rlvr.tools.ToolFormat."
        )
    return FORMATS[name]


def format_of(template: str | None) -> tuple[ToolFormat, bool]:
    """Return the format that a chat template has its model write, and whether it shows the tools by itself.

    Without a template that is `Plain`; with one that knows no tools `Hermes`, and the tools go into a system message.

    Raises:
        ValidationError: It shows tools, and its calls look like none we know.
    """
    if template is None:
        return FORMATS["plain"], False
    if not re.search(r"\btools\b", template):
        return FORMATS["hermes"], False
    for made in FORMATS.values():
        if made.marks and all(mark in template for mark in made.marks):
            return made, True
    raise ValidationError(
        f"The model's chat template shows tools, but its calls look like none of those known here "
        f"({', '.join(FORMATS)}). Say which it is with tool_environment(…, format=…): one of these names, or an "
        f"object with the methods of rlvr.tools.ToolFormat."
    )


def calls_in(text: str) -> list[ToolCall]:
    """Return the calls that a text has as JSON: one, a list, or several one after the other."""
    found: list[ToolCall] = []
    at = 0
    while at < len(text):
        try:
            value, at = _JSON.raw_decode(text, at)
        except ValueError as error:
            return [*found, ToolCall(problem=not_json(error))]
        found += [call_of(item) for item in (value if isinstance(value, list) else [value])]
        while at < len(text) and text[at] in " \t\r\n;,":
            at += 1
    return found or [ToolCall(problem="the call is empty: it needs a name and arguments")]


def call_of(value: Any) -> ToolCall:
    """Return a call that was written as {"name", "arguments"}, or what is wrong with it."""
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    name = value.get("name", value.get("function")) if isinstance(value, Mapping) else None
    if not isinstance(name, str) or not name:
        return ToolCall(problem='the call has no name: it needs {"name": …, "arguments": {…}}')
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = _JSON.decode(arguments)
        except ValueError as error:
            return ToolCall(name, problem=not_json(error))
    if not isinstance(arguments, Mapping):
        return ToolCall(name, problem="the arguments are no JSON object: give them by name, in braces")
    return ToolCall(name, arguments)


def not_json(error: ValueError) -> str:
    return f"the call is not valid JSON: {error}"


def value_of(text: str) -> Any:
    """Return the value of an argument that was written without quotes: a number, a list, …, else the text itself."""
    try:
        return _JSON.decode(text.strip())
    except ValueError:
        return text


def read_python(text: str) -> ToolCall:
    """Return a call that was written as in Python, with literals for arguments; nothing of it is run."""
    name = text.partition("(")[0]
    try:
        call = ast.parse(text if text.endswith(")") else f"{text})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            return ToolCall(name, problem="the call cannot be read: write it as [name(argument, …)]")
        values = [ast.literal_eval(value) for value in call.args]
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return ToolCall(
            name, problem="the call cannot be read: its arguments must be numbers, texts or lists"
        )
    return ToolCall(name, named, values)
