"""A notebook for a grader: every exercise with its solution and its test, and nothing overwritten."""

import json
from pathlib import Path

import pytest

from tensafe_nb.classroom.grading import asked_in, exercises_alone, solutions_of
from tensafe_nb.cli import main as cli

NOTEBOOKS = Path(__file__).parents[3] / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))


def cells_of(path: Path) -> list[dict[str, object]]:
    return list(json.loads(path.read_text())["cells"])


def export(number: str, folder: Path, grader: str, *options: str) -> int:
    return cli.main(["class", "export", number, str(folder), "--for", grader, *options])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_exercise_gets_its_solution_and_a_test_of_one_point(path: Path, tmp_path: Path) -> None:
    solutions = solutions_of(NOTEBOOKS / "solutions" / f"{path.stem}.py")
    assert export(path.stem[:2], tmp_path, "nbgrader") == 0
    cells = cells_of(tmp_path / "source" / path.stem / path.name)
    graded = [cell for cell in cells if cell["metadata"].get("nbgrader", {}).get("grade")]  # type: ignore[attr-defined]
    solved = [cell for cell in cells if cell["metadata"].get("nbgrader", {}).get("solution")]  # type: ignore[attr-defined]
    assert len(graded) == len(solved) == len(solutions)
    for cell, source in zip(solved, solutions.values(), strict=True):
        assert f"### BEGIN SOLUTION\n{source}\n### END SOLUTION\ntn.check" in cell["source"]  # type: ignore[operator]
    assert len(cells) == len(cells_of(path)) + len(solutions)
    assert len({cell["id"] for cell in cells}) == len(cells)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_each_question_of_otter_is_in_a_frame_of_its_own(path: Path, tmp_path: Path) -> None:
    assert export(path.stem[:2], tmp_path, "otter") == 0
    cells = cells_of(tmp_path / path.name)
    raw = ["".join(cell["source"]).split("\n")[0] for cell in cells if cell["cell_type"] == "raw"]  # type: ignore[arg-type]
    count = len(solutions_of(NOTEBOOKS / "solutions" / f"{path.stem}.py"))
    frame = [
        "# BEGIN QUESTION",
        "# BEGIN SOLUTION",
        "# END SOLUTION",
        "# BEGIN TESTS",
        "# END TESTS",
        "# END QUESTION",
    ]
    assert raw == ["# ASSIGNMENT CONFIG", *frame * count]
    kept = [cell["source"] for cell in cells_of(path) if not asked_in(cell)]
    assert all(source in [cell["source"] for cell in cells] for source in kept)


def test_the_exercises_alone_are_title_import_questions_and_answers(tmp_path: Path) -> None:
    alone = list(exercises_alone(cells_of(PATHS[4])))
    assert [cell["cell_type"] for cell in alone] == ["markdown", "code", *["markdown", "code"] * 3]


def test_an_export_again_is_the_same_and_one_that_was_changed_is_left_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [export("5", tmp_path, "nbgrader"), export("05", tmp_path, "nbgrader")] == [0, 0]
    assert "next: cd" in capsys.readouterr().out
    (tmp_path / "nbgrader_config.py").write_text("# mine")
    assert export("05", tmp_path, "nbgrader") == 1
    assert "was changed" in capsys.readouterr().err
    assert (tmp_path / "nbgrader_config.py").read_text() == "# mine"


@pytest.mark.parametrize("number", ["55", "five", "", "../05"])
def test_a_number_that_no_notebook_has_is_told(
    number: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(number, tmp_path, "otter") == 1
    assert "There is no notebook" in capsys.readouterr().err
