"""A notebook as a grader wants it: nbgrader's source version, or the source of Otter Assign.

Both are made of the notebook and of its solutions, and take `tn.check` for their tests, so that what grades is what
gave the hints.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tensafe_nb.display import as_given
from tensafe_nb.errors import StorageError, ValidationError, nearest

Grader: TypeAlias = Literal["nbgrader", "otter"]
Cell: TypeAlias = dict[str, Any]

CHECKED = re.compile(r'^tn\.check\("(\d\d\.\d)", answer\)$', re.MULTILINE)
SECTION = re.compile(r"^# (\d\d\.\d)\n(.*?)(?=^# \d\d\.\d$|\Z)", re.MULTILINE | re.DOTALL)
NBGRADER_CONFIG = '''\
"""What nbgrader hands out in place of a solution: nothing, for the three dots stand above it."""

c = get_config()  # noqa: F821
c.ClearSolutions.code_stub = {"python": "# put your answer in place of the three dots"}
'''


def export(
    number: str, folder: Path, grader: Grader, notebooks: Path, *, only_exercises: bool = False
) -> Path:
    """Write a notebook with its exercises as a grader wants it, and return where.

    Args:
        number: Of the notebook: "05".
        folder: nbgrader's course, or the folder that Otter's source goes to; it is made where there is none.
        grader: For whom.
        notebooks: Where the notebooks are, and below them the solutions.
        only_exercises: Leave out all but the exercises, which need nothing of the rest: graded in seconds.

    Raises:
        ValidationError: There is no such notebook.
        StorageError: The file is there already, and is another one.
    """
    path = notebook_of(number, notebooks)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    solutions = solutions_of(notebooks / "solutions" / f"{path.stem}.py")
    made = nbgrader_cells if grader == "nbgrader" else otter_cells
    cells = list(exercises_alone(notebook["cells"]) if only_exercises else notebook["cells"])
    notebook["cells"] = list(made(cells, solutions))
    if grader == "nbgrader":
        write_new(folder / "nbgrader_config.py", NBGRADER_CONFIG)
        folder = folder / "source" / path.stem
    target = folder / path.name
    write_new(target, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    return target


def notebook_of(number: str, notebooks: Path) -> Path:
    """Return the notebook of a number.

    Raises:
        ValidationError: There is none.
    """
    known = {path.name[:2]: path for path in sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))}
    if (found := known.get(number.zfill(2)[:2] if len(number) <= 2 else number)) is None:
        raise ValidationError(f"There is no notebook {as_given(number)}.{nearest(number, known)}")
    return found


def solutions_of(path: Path) -> Mapping[str, str]:
    """Return the solutions in a file, by the numbers of their exercises."""
    found = SECTION.findall(path.read_text(encoding="utf-8"))
    return {number: source.strip() for number, source in found}


def write_new(path: Path, text: str) -> None:
    """Write a file, never over one that somebody may have changed.

    Raises:
        StorageError: There is one, with another text.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        if path.read_text(encoding="utf-8") != text:
            raise StorageError(
                f"{path} is there already, and was changed: delete it, or export elsewhere."
            ) from None


def asked_in(cell: Cell) -> str | None:
    """Return the number of the exercise that a cell asks, if it does."""
    found = CHECKED.search("".join(cell["source"])) if cell["cell_type"] == "code" else None
    return found[1] if found else None


def exercises_alone(cells: list[Cell]) -> Iterator[Cell]:
    """Yield the title, an import, and the exercises with their questions."""
    yield cells[0]
    yield code_cell("import", "import tensafe_nb as tn")
    for question, cell in itertools.pairwise(cells):
        if asked_in(cell):
            yield question
            yield cell


def nbgrader_cells(cells: list[Cell], solutions: Mapping[str, str]) -> Iterator[Cell]:
    """Yield the cells, each answer with its solution between nbgrader's marks and followed by a test of one point."""
    for cell in cells:
        number = asked_in(cell)
        if number is None:
            yield cell
            continue
        name, source = f"exercise-{number.replace('.', '-')}", "".join(cell["source"])
        template, check = source.split("tn.check", 1)
        answer = f"{template}### BEGIN SOLUTION\n{solutions[number]}\n### END SOLUTION\ntn.check{check}"
        yield code_cell(name, answer, nbgrader=of_nbgrader(name, solution=True))
        test = f'assert tn.check("{number}", answer).right, tn.check("{number}", answer)'
        yield code_cell(
            f"{name}-test", test, nbgrader=of_nbgrader(f"{name}-test", grade=True, locked=True, points=1)
        )


def of_nbgrader(name: str, **how: Any) -> dict[str, Any]:
    """Return what nbgrader keeps in the metadata of a cell (schema 3)."""
    plain = {"grade": False, "locked": False, "solution": False, "task": False}
    return {"grade_id": name, "schema_version": 3, **plain, **how}


def otter_cells(cells: list[Cell], solutions: Mapping[str, str]) -> Iterator[Cell]:
    """Yield the cells as Otter Assign reads them: each exercise a question of one point, with solution and test."""
    yield raw_cell(
        "assignment", "# ASSIGNMENT CONFIG\nexport_cell: false\ncheck_all_cell: false\ngenerate: true"
    )
    for place, cell in enumerate(cells):
        number = asked_in(cell)
        if number is None:
            if (
                place + 1 == len(cells) or asked_in(cells[place + 1]) is None
            ):  # a question goes into its own frame
                yield cell
            continue
        name, source = f"exercise_{number.replace('.', '_')}", "".join(cell["source"])
        template, check = source.split("tn.check", 1)
        prompt = f'""" # BEGIN PROMPT\n{template.rstrip()}\n""" # END PROMPT\n'
        solved = f"# BEGIN SOLUTION NO PROMPT\n{solutions[number]}\n# END SOLUTION\n"
        test = f'assert tn.check("{number}", answer).right, tn.check("{number}", answer)'
        yield raw_cell(f"{name}-begin", f"# BEGIN QUESTION\nname: {name}\npoints: 1")
        yield cells[place - 1]
        yield raw_cell(f"{name}-solution", "# BEGIN SOLUTION")
        yield code_cell(name, f"{prompt}{solved}tn.check{check}")
        yield raw_cell(f"{name}-solved", "# END SOLUTION")
        yield raw_cell(f"{name}-tests", "# BEGIN TESTS")
        yield code_cell(f"{name}-test", test)
        yield raw_cell(f"{name}-tested", "# END TESTS")
        yield raw_cell(f"{name}-end", "# END QUESTION")


def code_cell(name: str, source: str, **metadata: Any) -> Cell:
    return {
        "cell_type": "code",
        "id": name,
        "metadata": metadata,
        "source": source,
        "outputs": [],
        "execution_count": None,
    }


def raw_cell(name: str, source: str) -> Cell:
    return {"cell_type": "raw", "id": name, "metadata": {}, "source": source}
