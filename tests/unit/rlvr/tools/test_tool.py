"""Functions as tools: what a model is told of them, and what comes of its calls."""

import json
import threading
from typing import Annotated, Literal

import pydantic
import pytest

from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr.tools import Tool, ToolError


def search(query: str, *, where: Literal["titles", "texts"] = "texts", most: int | None = None) -> list[str]:
    """Search the
    library.

    Args:
        query: What to look
            for: words.
        where (str): In which part.

    Returns:
        What was found.
    """
    return [query, where, str(most)]


class Place(pydantic.BaseModel):
    x: int
    y: int = 0


def test_a_tool_is_told_by_its_signature_and_its_docstring() -> None:
    assert Tool.of(search).schema == {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Search the library.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": "What to look for: words."},
                    "where": {
                        "enum": ["titles", "texts"],
                        "type": "string",
                        "description": "In which part.",
                        "default": "texts",
                    },
                    "most": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                },
                "required": ["query"],
            },
        },
    }


def test_docstrings_of_sphinx_annotated_types_and_names_of_pydantic_itself_are_read() -> None:
    def level(
        place: str, schema: Annotated[int, pydantic.Field(description="Which.", ge=0)], title: str = ""
    ) -> int:
        """Return a level.

        :param str place: Where it is.
        :returns: A number.
        """
        return schema

    tool = Tool.of(level)
    shown = tool.schema["function"]["parameters"]["properties"]
    assert tool.description == "Return a level."
    assert shown["place"]["description"] == "Where it is." and shown["schema"]["description"] == "Which."
    assert shown["title"] == {"type": "string", "default": ""}
    assert tool.call({"place": "Basel", "schema": 3}, None) == "3"
    with pytest.raises(ToolError, match="greater than or equal to 0"):
        tool.call({"place": "Basel", "schema": -1}, None)


def test_what_a_chat_template_of_transformers_would_say_is_said_here_too() -> None:
    from transformers.utils import get_json_schema

    def add(a: int, b: float) -> float:
        """Add two numbers.

        Args:
            a: The first.
            b: The second.
        """
        return a + b

    theirs = get_json_schema(add)
    theirs["function"].pop("return")
    assert json.loads(json.dumps(Tool.of(add).schema)) == theirs


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "search: the argument 'query' is missing."),
        ({"query": 3}, "search: the argument 'query' should be a valid string."),
        ({"query": "a", "where": "b"}, "search: the argument 'where' should be 'titles' or 'texts'."),
        ({"query": "a", "limit": 1}, "search: there is no argument 'limit'."),
        ({"query": "a", "most": "many"}, "search: the argument 'most.*should be a valid integer"),
    ],
)
def test_wrong_arguments_are_told_one_by_one(arguments: dict[str, object], told: str) -> None:
    with pytest.raises(ToolError, match=told):
        Tool.of(search).call(arguments, None)


def test_arguments_arrive_as_the_function_declares_them() -> None:
    def where(place: Place, many: list[int]) -> str:
        return f"{type(place).__name__} {place.x + place.y} {sum(many)}"

    assert Tool.of(where).call({"place": {"x": "2"}, "many": ["1", 2]}, None) == "Place 2 3"


def test_results_are_told_as_text_json_or_as_python_shows_them() -> None:
    def give(what: str) -> object:
        return {"text": "é", "list": [1, "é"], "none": None, "set": {1}, "long": "x" * 3000}[what]

    tool = Tool.of(give)
    assert [tool.call({"what": w}, None) for w in ("text", "list", "none", "set")] == [
        "é",
        '[1, "é"]',
        "null",
        "{1}",
    ]
    assert tool.call({"what": "long"}, None).endswith("x [… 1000 more characters]")


def test_an_exception_of_a_tool_is_told_and_so_is_one_of_a_coroutine() -> None:
    async def look(up: str) -> str:
        if up == "nothing":
            raise KeyError(up)
        return up.upper()

    assert Tool.of(look).call({"up": "a"}, 5.0) == "A"
    with pytest.raises(ToolError, match="look raised KeyError: 'nothing'"):
        Tool.of(look).call({"up": "nothing"}, 5.0)


def test_a_tool_that_does_not_come_back_is_given_up_and_its_python_ends() -> None:
    def hang() -> None:
        while True:
            pass

    with pytest.raises(ToolError, match=r"hang took longer than 0.1 s and was ended"):
        Tool.of(hang).call({}, 0.1)
    for thread in threading.enumerate():
        if thread.name == "tsnb-tool-hang":
            thread.join(10)
            assert not thread.is_alive()


def test_methods_are_tools_without_their_self() -> None:
    class Shelf:
        def __init__(self) -> None:
            self.books = 0

        def put(self, books: int = 1) -> int:
            """Put books on it."""
            self.books += books
            return self.books

    shelf = Shelf()
    assert Tool.of(shelf.put).call({"books": 2}, None) == "2" and shelf.books == 2


def test_what_cannot_be_called_by_name_with_types_is_refused_with_what_to_write() -> None:
    with pytest.raises(ValidationError, match=r"parameter 'a' of the tool 'f' has no type.*Write a: int"):

        def f(a):  # type: ignore[no-untyped-def]
            return a

        Tool.of(f)
    with pytest.raises(ValidationError, match=r"takes '\*items: int'.*write them out"):

        def g(*items: int) -> int:
            return sum(items)

        Tool.of(g)
    with pytest.raises(ValidationError, match="needs a name that a model can write"):
        Tool.of(lambda: 1)
    with pytest.raises(ValidationError, match="is no tool"):
        Tool.of(Place)
    with pytest.raises(ValidationError, match="cannot be written as JSON"):

        def h(where: threading.Lock) -> None:  # type: ignore[valid-type]
            pass

        Tool.of(h)
