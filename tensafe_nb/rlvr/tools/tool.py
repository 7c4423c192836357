"""A plain Python function as a tool: what the model is told of it, and its call with arguments that are checked."""

import ctypes
import inspect
import json
import re
import threading
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NotRequired

import pydantic
import typing_extensions

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr.rewards.reward import result_of

MOST_CHARACTERS = 2_000  # of a result that the model is told
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_SECTION = re.compile(r"^\s*(Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?|Notes?):\s*$", re.M)
_ENTRY = re.compile(r"^(\s*)(\*{0,2}\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")
_FIELD = re.compile(r"^\s*:param (?:\w+ )?(\w+):\s*(.*)$", re.M)


class ToolError(Exception):
    """What a model is told instead of a result."""


@dataclass(frozen=True, eq=False)
class Tool:
    """A function that a model may call.

    Attributes:
        name: What the model calls it.
        description: What it does, from its docstring.
        function: The user's own.
        types: Of its parameters, in their order, as they were declared.
        optional: Parameters that have a default.
        schema: What a chat template shows of it: {"type": "function", "function": {"name", "description",
            "parameters"}}.
    """

    name: str
    description: str
    function: Callable[..., Any]
    types: Mapping[str, Any]
    optional: frozenset[str] = frozenset()
    schema: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, function: Any) -> "Tool":
        """Read a function's signature and docstring.

        Raises:
            ValidationError: A parameter without a type, or one that cannot be given by name.
        """
        if isinstance(function, cls):
            return function
        if not callable(function) or inspect.isclass(function):
            raise ValidationError(
                f"{as_given(function)} is no tool: a tool is a function with typed parameters and a docstring."
            )
        name = getattr(function, "__name__", type(function).__name__)
        if not NAME.fullmatch(name):
            raise ValidationError(f"The tool {as_given(name)} needs a name that a model can write: use def.")
        types, defaults = parameters_of(function, name)
        description, said = documented(inspect.getdoc(function) or "")
        tool = cls(name, description, function, types, frozenset(defaults))
        try:
            parameters = without_titles(_checker(tool).json_schema())
        except (pydantic.errors.PydanticUserError, pydantic.errors.PydanticInvalidForJsonSchema) as error:
            reason = str(error).splitlines()[0]
            raise ValidationError(
                f"The types of the tool {as_given(name)} cannot be written as JSON ({reason}): take numbers, texts, "
                f"lists, dicts, Literal, or a pydantic model."
            ) from error
        parameters.setdefault("properties", {})
        for parameter, shown in parameters["properties"].items():
            if parameter in said and "description" not in shown:
                shown["description"] = said[parameter]
            if defaults.get(parameter) is not None and is_json(defaults[parameter]):
                shown["default"] = defaults[parameter]
        parameters.pop("additionalProperties", None)
        written = {"name": name, "description": description, "parameters": parameters}
        return cls(
            name,
            description,
            function,
            types,
            frozenset(defaults),
            {"type": "function", "function": written},
        )

    @property
    def signature(self) -> str:
        """The tool as a line of Python, for models that are shown no JSON."""
        shown = self.schema["function"]["parameters"]["properties"]
        words = [
            f"{name}{'?' if name in self.optional else ''}: {shown.get(name, {}).get('type', 'any')}"
            for name in self.types
        ]
        return f"{self.name}({', '.join(words)})"

    def named(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return arguments that were given by their place, by name.

        Raises:
            ToolError: There are more of them than parameters.
        """
        if len(values) > len(self.types):
            raise ToolError(f"{self.name} takes {len(self.types)} arguments, not {len(values)}.")
        return dict(zip(self.types, values, strict=False))

    def checked(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments as the function's types have them.

        Raises:
            ToolError: One is missing, unknown, or of another type; says which.
        """
        try:
            return dict(_checker(self).validate_python(dict(arguments)))
        except pydantic.ValidationError as error:
            raise ToolError(f"{self.name}: {'; '.join(map(told_of, error.errors()[:4]))}.") from error

    def call(self, arguments: Mapping[str, Any], timeout: float | None) -> str:
        """Check the arguments, call the function, and return its result as text.

        Args:
            arguments: By name.
            timeout: Seconds it may take; None calls it on this thread, without a limit.

        Raises:
            ToolError: Wrong arguments, an exception of the function, or no result in time: says what.
        """
        given = self.checked(arguments)
        value, error = within(timeout, self.name, lambda: self._value(given))
        if error is not None:
            raise ToolError(
                f"{self.name} raised {type(error).__name__}: {error}"[:MOST_CHARACTERS]
            ) from error
        return shortened(text_of_result(value))

    def _value(self, given: Mapping[str, Any]) -> Any:
        value = self.function(**given)
        return result_of(value) if inspect.isawaitable(value) else value


def parameters_of(function: Callable[..., Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the types and the defaults of a function's parameters.

    Raises:
        ValidationError: One has no type, or cannot be given by name.
    """
    try:
        signature = inspect.signature(function)
        hinted = function if inspect.isroutine(function) else type(function).__call__
        hints = typing.get_type_hints(inspect.unwrap(hinted), include_extras=True)
    except (ValueError, TypeError, NameError) as error:
        raise ValidationError(
            f"The signature of the tool {as_given(name)} cannot be read ({error})."
        ) from error
    types, defaults = {}, {}
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ValidationError(
                f"The tool {as_given(name)} takes {as_given(str(parameter))}, but a model gives arguments by name: "
                f"write them out."
            )
        if parameter.name not in hints:
            raise ValidationError(
                f"The parameter {as_given(parameter.name)} of the tool {as_given(name)} has no type: the model is told "
                f"it, and its calls are held to it. Write {parameter.name}: int, for instance."
            )
        types[parameter.name] = hints[parameter.name]
        if parameter.default is not parameter.empty:
            defaults[parameter.name] = parameter.default
    return types, defaults


@cache
def _checker(tool: Tool) -> pydantic.TypeAdapter[dict[str, Any]]:
    """Return what checks the arguments of a tool; made in the process that needs it, since it cannot be sent."""
    fields = {name: NotRequired[kind] if name in tool.optional else kind for name, kind in tool.types.items()}
    # called by another name, so that type checkers do not take it for a declaration
    make: Any = typing_extensions.TypedDict
    arguments = make("arguments", fields)
    arguments.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")
    return pydantic.TypeAdapter(arguments)


def told_of(problem: Mapping[str, Any]) -> str:
    """Return a problem of pydantic's in words for a model."""
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return f"the argument '{place}' is missing"
    if problem["type"] == "extra_forbidden":
        return f"there is no argument '{place}'"
    said = str(problem["msg"]).removeprefix("Input ").rstrip(".")
    return f"the argument '{place}' {said}"


def documented(text: str) -> tuple[str, dict[str, str]]:
    """Return what a docstring says of the function, and of its parameters (Google's or Sphinx's way)."""
    described = {name: words.strip() for name, words in _FIELD.findall(text)}
    text = re.split(r"^\s*:(?:param|returns?|raises|rtype)\b", text, maxsplit=1, flags=re.M)[0]
    sections = _SECTION.split(text)
    for title, body in zip(sections[1::2], sections[2::2], strict=True):
        if title in ("Args", "Arguments", "Parameters"):
            described |= entries_of(body)
    return " ".join(sections[0].split()), described


def entries_of(body: str) -> dict[str, str]:
    """Return the parameters under "Args:", with their descriptions as one line each."""
    found: dict[str, str] = {}
    indent, name = None, None
    for line in body.splitlines():
        entry = _ENTRY.match(line)
        if entry and (indent is None or len(entry[1]) <= indent):
            indent, name = len(entry[1]), entry[2].lstrip("*")
            found[name] = entry[3].strip()
        elif name is not None and line.strip():
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def without_titles(schema: Any) -> Any:
    """Return a schema without the titles that pydantic gives everything."""
    if isinstance(schema, list):
        return [without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: {key: without_titles(value) for key, value in item.items()}
        if name in ("properties", "$defs") and isinstance(item, dict)
        else without_titles(item)
        for name, item in schema.items()
        if name != "title"
    }


def is_json(value: Any) -> bool:
    """Whether a value can be written as JSON."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def text_of_result(value: Any) -> str:
    """Return a result as the model is told it: a text as it is, else as JSON, else as Python shows it."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False) if is_json(value) else str(value)


def shortened(text: str) -> str:
    """Return a text, or its beginning and how much is missing."""
    left = len(text) - MOST_CHARACTERS
    return text if left <= 0 else f"{text[:MOST_CHARACTERS]} [… {left} more characters]"


def within(timeout: float | None, name: str, function: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """Call a function and return its value or its exception; give it up after a time limit.

    Python code that is given up is ended; a call into C goes on until it returns, on a thread nobody waits for.

    Raises:
        ToolError: It took too long.
    """
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((function(), None))
        except (Exception, SystemExit) as error:  # noqa: BLE001  # of a tool: told to the model
            outcome.append((None, error))

    if timeout is None:
        run()
        return outcome[0]
    thread = threading.Thread(target=run, name=f"tsnb-tool-{name}", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
        )
        raise ToolError(f"{name} took longer than {timeout:g} s and was ended.")
    return outcome[0]
