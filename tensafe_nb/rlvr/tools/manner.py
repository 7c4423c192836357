"""How one model is told of tools and writes its calls: decided by its chat template, or said by the user."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tensafe_nb.rlvr.tools.formats import FORMATS, ToolFormat, format_named, format_of
from tensafe_nb.rlvr.tools.tool import Tool

COLUMN = "tool_manner"  # of a row, once it is known which model is asked


@dataclass(frozen=True, slots=True)
class Manner:
    """The way to call tools.

    Attributes:
        format: How calls are written.
        auto: Whether the model's template decides that.
        describe: Whether a model whose template shows no tools is told of them.
        shown: Whether its template shows them.
    """

    format: ToolFormat
    auto: bool = True
    describe: bool = True
    shown: bool = False

    @classmethod
    def of(cls, format: str | ToolFormat, describe: bool) -> "Manner":
        """Return the manner that a user asks for.

        Raises:
            ValidationError: There is no such format.
        """
        auto = isinstance(format, str) and format == "auto"
        return cls(FORMATS["hermes"] if auto else format_named(format), auto, describe)

    def told_with(self, template: str | None, tools: Sequence[Tool]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the column that tells a row of this template, and what the template is given beside messages.

        Raises:
            ValidationError: The template has its model write calls that nobody here can read.
        """
        found, shown = format_of(template) if self.auto else (self.format, "tools" in (template or ""))
        options = {"tools": [dict(tool.schema) for tool in tools]} if shown else {}
        return {COLUMN: {"format": found.name, "shown": shown}}, options

    def of_row(self, row: Mapping[str, Any]) -> tuple["Manner", dict[str, Any]]:
        """Return the manner that a row was given, and the row as it was before."""
        own = {name: value for name, value in row.items() if name != COLUMN}
        given = row.get(COLUMN)
        if not isinstance(given, Mapping):
            return self, own
        found = FORMATS[given["format"]] if self.auto else self.format
        return replace(self, format=found, shown=given["shown"]), own

    def first(self, asked: str | Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> Any:
        """Return what the model is told first: the question, and of tools what its template does not show."""
        if self.shown or not self.describe or not tools:
            return asked
        said = self.format.described(tools)
        if isinstance(asked, str) and self.format.name == "plain":
            return f"{said}\n\n{asked}"
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
        if messages[0]["role"] == "system":
            return [{**messages[0], "content": f"{messages[0]['content']}\n\n{said}"}, *messages[1:]]
        return [{"role": "system", "content": said}, *messages]
