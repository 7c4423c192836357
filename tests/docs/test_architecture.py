"""docs/explanation/architecture.md says what is: its floors, its rooms, and the functions of its walks."""

import ast
import itertools
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tensafe_nb"
PAGE = (ROOT / "docs/explanation/architecture.md").read_text(encoding="utf-8")
STEP = re.compile(r"`([\w/]+\.py)` · `([\w.]+)`")


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def function(path: str, name: str) -> ast.AST:
    """Return the definition of a function or method."""
    found: ast.AST = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    for part in name.split("."):
        children = [
            node
            for node in ast.iter_child_nodes(found)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == part
        ]
        assert children, f"{path} has no {name}"
        found = children[-1]
    return found


def named_in(definition: ast.AST) -> set[str]:
    names = {node.id for node in ast.walk(definition) if isinstance(node, ast.Name)}
    return names | {node.attr for node in ast.walk(definition) if isinstance(node, ast.Attribute)}


def test_the_floors_are_those_that_import_linter_checks() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    drawn = section("The floors").split("```text\n")[1].split("\n```")[0].splitlines()
    assert drawn == [re.sub(r"[()]", "", layer) for layer in layers]


def test_every_room_is_described_and_every_module_at_the_top_stands_on_a_floor() -> None:
    rooms = {f"{folder.parent.name}/" for folder in PACKAGE.glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+/)` \|", section("The rooms"), flags=re.MULTILINE)) == rooms
    floors = section("The floors").split("```text\n")[1].split("\n```")[0]
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules | {room.rstrip("/") for room in rooms} | {"cluster"} == set(re.findall(r"\w+", floors))


@pytest.mark.parametrize("title", ["The way of one `forward_backward`", "The way of one reward"])
def test_each_step_of_a_walk_exists_and_calls_the_next(title: str) -> None:
    steps = [line for line in section(title).splitlines() if re.match(r"\d+\. ", line)]
    assert 5 <= len(steps) <= 10
    walk = [(*STEP.search(line).groups(), "⇢" in line) for line in steps]  # type: ignore[union-attr]
    for (path, name, _), (_, following, by_queue) in itertools.pairwise(walk):
        called = following.rpartition(".")[2]
        if not by_queue:  # from one thread or process to another there is no call
            assert called in named_in(function(path, name)), f"{path} {name} does not call {following}"
    function(*walk[-1][:2])


def test_whatever_else_the_page_names_exists() -> None:
    for path, name in STEP.findall(PAGE):
        function(path, name)
    for path in re.findall(r"`((?:\w+/)+\w+\.py)`", PAGE):
        assert (PACKAGE / path).exists() or (ROOT / path).exists(), path
    for name, path in re.findall(r"`([\w.]+)`[^`\n]* \(`([\w/]+\.py)`\)", section("Where to add")):
        source = (PACKAGE / path).read_text(encoding="utf-8")
        assert re.search(rf"\b{name.rpartition('.')[2]}\b", source), f"{path} does not have {name}"
