"""`tensafe-nb class`: the notebooks for graders, and what a student needs to run them."""

import argparse
from pathlib import Path
from typing import Any, get_args

from tensafe_nb.classroom.grading import Grader, export, notebook_of
from tensafe_nb.classroom.measuring import measure
from tensafe_nb.cli.lab import source_of_notebooks


def add_class(commands: Any) -> None:
    """Add `class` to the parser of `tensafe-nb`."""
    group = commands.add_parser(
        "class", help="for teachers: notebooks for nbgrader and Otter, needs of a student"
    )
    verbs = group.add_subparsers(dest="verb", required=True, metavar="VERB")

    exporting = verbs.add_parser("export", help="write a notebook, with solutions, as a grader wants it")
    exporting.add_argument("number", help="of the notebook, such as 05")
    exporting.add_argument("folder", type=Path, help="nbgrader's course folder, or where Otter's source goes")
    exporting.add_argument("--for", dest="grader", choices=get_args(Grader), required=True)
    exporting.add_argument("--only-exercises", action="store_true", help="leave out all but the exercises")
    exporting.set_defaults(run=write_for_grader)

    measuring = verbs.add_parser(
        "measure", help="run notebooks here, and print the memory and the time they take"
    )
    measuring.add_argument("numbers", nargs="+", metavar="number", help="of a notebook, such as 05")
    measuring.set_defaults(run=print_needs)


def write_for_grader(chosen: argparse.Namespace) -> int:
    """Write a notebook for a grader, and say what comes next."""
    written = export(
        chosen.number,
        chosen.folder,
        chosen.grader,
        source_of_notebooks(),
        only_exercises=chosen.only_exercises,
    )
    print(f"written: {written}")
    if chosen.grader == "nbgrader":
        print(f"next: cd {chosen.folder} && nbgrader generate_assignment {written.stem}")
    else:
        print(f"next: otter assign {written} dist")
    return 0


def print_needs(chosen: argparse.Namespace) -> int:
    """Print a table, one row for each notebook."""
    folder = source_of_notebooks()
    paths = [notebook_of(number, folder) for number in chosen.numbers]
    print("| notebook | memory of the kernel | processor time | time |\n|---|---|---|---|", flush=True)
    for path in paths:
        needed = measure(path)
        cost = f"{needed.megabytes} MB | {needed.cpu_seconds:.0f} s | {needed.seconds:.0f} s"
        print(f"| `{path.name}` | {cost} |", flush=True)
    return 0
