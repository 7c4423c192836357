"""A teacher's way: a notebook is exported, handed out, collected and graded, by nbgrader and by Otter themselves."""

import csv
import json
import os
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tensafe_nb.classroom.grading import asked_in, solutions_of
from tensafe_nb.cli import main as cli

ROOT = Path(__file__).parents[2]
SOLUTIONS = solutions_of(ROOT / "notebooks/solutions/05_rlvr.py")
WRONG = {
    "05.1": "def answer(rewards):\n    return rewards",
    "05.2": "answer = 7",
    "05.3": "def answer(p, g):\n    1 / 0",
}
SUBMISSIONS = {  # and the points of each
    "right": (SOLUTIONS, 3.0),
    "wrong": (WRONG, 0.0),
    "partly": ({"05.2": SOLUTIONS["05.2"]}, 1.0),
    "empty": ({}, 0.0),
}
pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (find_spec("nbgrader") and find_spec("otter")), reason="make class has them"),
]


def run(*command: str, folder: Path) -> str:
    """Run a module's command as a teacher would, in a shell where the programs of this environment are found."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def answered(handed_out: Path, answers: dict[str, str], target: Path) -> None:
    """Fill in the cells of a notebook as a student does: what stood above the check is replaced."""
    notebook = json.loads(handed_out.read_text())
    for cell in notebook["cells"]:
        number = asked_in(cell)
        if number in answers:
            cell["source"] = f'{answers[number]}\n\ntn.check("{number}", answer)'
    target.parent.mkdir(parents=True)
    target.write_text(json.dumps(notebook))


@pytest.mark.parametrize("only_exercises", [True, False])
def test_nbgrader_grades_what_was_handed_out(tmp_path: Path, only_exercises: bool) -> None:
    course = tmp_path / "course"
    options = ["--only-exercises"] if only_exercises else []
    assert cli.main(["class", "export", "05", str(course), "--for", "nbgrader", *options]) == 0
    run("nbgrader", "generate_assignment", "05_rlvr", folder=course)
    handed_out = course / "release/05_rlvr/05_rlvr.ipynb"
    text = handed_out.read_text()
    assert "SOLUTION" not in text and "total - reward" not in text, "no solution is handed out"
    submissions = SUBMISSIONS if only_exercises else {"right": SUBMISSIONS["right"]}
    for student, (answers, _) in submissions.items():
        answered(handed_out, dict(answers), course / f"submitted/{student}/05_rlvr/05_rlvr.ipynb")
    run("nbgrader", "autograde", "05_rlvr", folder=course)
    run("nbgrader", "export", folder=course)
    with (course / "grades.csv").open() as file:
        points = {row["student_id"]: float(row["score"]) for row in csv.DictReader(file)}
    assert points == {student: expected for student, (_, expected) in submissions.items()}


@pytest.mark.parametrize("only_exercises", [True, False])
def test_otter_grades_what_was_handed_out(tmp_path: Path, only_exercises: bool) -> None:
    options = ["--only-exercises"] if only_exercises else []
    assert cli.main(["class", "export", "05", str(tmp_path), "--for", "otter", *options]) == 0
    said = run("otter", "assign", "05_rlvr.ipynb", "dist", folder=tmp_path)
    assert "failed" not in said, "the solutions pass Otter's own tests"
    handed_out = tmp_path / "dist/student/05_rlvr.ipynb"
    assert "SOLUTION" not in handed_out.read_text()
    (archive,) = (tmp_path / "dist/autograder").glob("*.zip")
    found: dict[str, Any] = {}
    submissions = SUBMISSIONS if only_exercises else {"right": SUBMISSIONS["right"]}
    for student, (answers, _) in submissions.items():
        submission = tmp_path / student / "05_rlvr.ipynb"
        answered(handed_out, dict(answers), submission)
        run(
            "otter", "run", "-a", str(archive), str(submission), "-o", str(submission.parent), folder=tmp_path
        )
        results = json.loads((submission.parent / "results.json").read_text())
        found[student] = sum(
            test.get("score", 0) or 0 for test in results["tests"] if test["name"] != "Public Tests"
        )
    assert found == {student: expected for student, (_, expected) in submissions.items()}
