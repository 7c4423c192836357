"""A YAML file that knows its lines, so that whoever reads it can say where something is wrong."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import yaml

from tensafe_nb.errors import ValidationError

Keys: TypeAlias = tuple[str | int, ...]  # from the top
Problem: TypeAlias = tuple[Keys, str]  # where, and what
LARGEST = 1 << 20  # bytes; a recipe has a few thousand
DEEPEST = 50
MOST_NODES = 20_000  # with every alias counted as what it stands for


@dataclass(frozen=True, slots=True)
class YamlFile:
    """What a YAML file holds.

    Attributes:
        path: Where it is.
        data: Its content.
        lines: The line of every key and list index, by the keys that lead there from the top.
    """

    path: Path
    data: Any
    lines: Mapping[Keys, int]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            ValidationError: It cannot be read, is not YAML, says something twice, or is larger, deeper or more
                entangled than a file of settings is.
        """
        try:
            if path.exists() and not path.is_file():
                raise OSError("it is no file")  # a pipe would wait for ever, a device never end
            with path.open("rb") as file:
                content = file.read(LARGEST + 1)
            if len(content) > LARGEST:
                raise ValueError(f"it is larger than {LARGEST >> 10} KiB")
            node, data = PlainLoader.parse(content.decode("utf-8-sig"))
            marks = dict(_marks(node))
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"{path}, line {mark.line + 1}" if mark else str(path)
            problem = getattr(error, "problem", None) or error
            raise ValidationError(f"{where}: this cannot be read as YAML: {problem}.") from error
        except (OSError, ValueError, OverflowError) as error:  # the last: \UFFFFFFFF is no character
            raise ValidationError(f"{path} cannot be read (looked in {Path.cwd()}): {error}.") from error
        return cls(path, data, marks)

    def refuse(self, problems: Iterable[Problem]) -> None:
        """Raise if there is any problem.

        Raises:
            ValidationError: One line for each problem.
        """
        found = list(problems)
        if found:
            raise self.error(found)

    def error(self, problems: Iterable[Problem]) -> ValidationError:
        """Return the error that names the file and the line of each problem."""
        found = sorted((self.line(at), text) for at, text in problems)
        return ValidationError("\n".join(f"{self.path}, line {line}: {text}" for line, text in found))

    def line(self, at: Keys) -> int:
        """Return the line of a key, or of what is around it; names that do not stand in the file are passed over."""
        place: Keys = ()
        for key in at:
            place = (*place, key) if (*place, key) in self.lines else place
        return self.lines.get(place, 1)


def _marks(node: yaml.Node | None, at: Keys = ()) -> Iterator[tuple[Keys, int]]:
    """Yield every key and list index with its line."""
    children: list[tuple[str | int, int, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key.start_mark.line, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(index, item.start_mark.line, item) for index, item in enumerate(node.value)]
    for key, line, child in children:
        yield (*at, key), line + 1
        yield from _marks(child, (*at, key))


def to_yaml(document: Mapping[Any, Any]) -> str:
    """Write plain data as YAML that `YamlFile.read` reads as the same data.

    Raises:
        ValidationError: It holds what YAML cannot say, such as a Python function.
    """
    try:
        return str(yaml.dump(document, Dumper=PlainDumper, sort_keys=False, allow_unicode=True))
    except yaml.representer.RepresenterError as error:
        raise ValidationError(f"This cannot be written as YAML: {error.args[-1]!r}.") from error


def _refused(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, at.start_mark)


class PlainLoader(yaml.SafeLoader):
    """Reads the scalars of YAML 1.2: `no` is a word and 1e-4 a number, unlike in 1.1, PyYAML's own.

    Nothing is built before it is known to be small: nine aliases of nine aliases of … are a few bytes of text and
    millions of nodes for whoever walks through them ("billion laughs").
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        # nodes in and below each one, aliases counted as what they mean
        self._weights: dict[yaml.Node, int] = {}

    @classmethod
    def parse(cls, text: str) -> tuple[yaml.Node | None, Any]:
        """Return the nodes of a text, and the data that they stand for."""
        loader = cls(text)
        try:
            node = loader.get_single_node()
            return node, None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse tags, and whatever is too deep or too much, before it is composed any further."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) not in (None, "!"):
            raise _refused(f"the tag {event.tag!r} is not read here", event)
        before, self._depth = self._nodes, self._depth + 1
        if self._depth > DEEPEST:
            raise _refused(f"more than {DEEPEST} levels deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if node not in self._weights:
                raise _refused(f"*{event.anchor} stands inside itself", event)
            self._nodes += self._weights[node]
        elif node is not None:
            self._nodes += 1
            self._weights[node] = self._nodes - before
        if self._nodes > MOST_NODES:
            raise _refused(f"more than {MOST_NODES:,} values, aliases counted", event)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse what PyYAML lets pass: a key that stands twice, or is no text."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused("a key must be text, not a list or a mapping", key)
            if key.tag != "tag:yaml.org,2002:str" or key.value in seen:
                wrong = "stands here twice" if key.value in seen else "must be text: put it in quotes"
                raise _refused(f"the key {key.value!r} {wrong}", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class PlainDumper(yaml.SafeDumper):
    """Writes what `PlainLoader` reads."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Escape the line breaks of Unicode, which PyYAML would write as they are and read as spaces."""
        style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


PlainDumper.add_representer(str, PlainDumper.represent_text)


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
for _class in (PlainLoader, PlainDumper):
    _class.yaml_implicit_resolvers = {}
    for _name, (_pattern, _first) in _SCALARS.items():
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), _first)
