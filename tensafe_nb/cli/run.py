"""`tensafe-nb run`: train as a YAML file says."""

import argparse
import sys
from pathlib import Path
from typing import Any

from tensafe_nb.protocol.results import RunResult, RunStatus
from tensafe_nb.recipes.recipe import load_config
from tensafe_nb.runs.description import MAX_NAME
from tensafe_nb.service import ServiceClient
from tensafe_nb.store.home import Home


def add_run(commands: Any) -> None:
    """Add `run` to the parser of `tensafe-nb`."""
    run = commands.add_parser("run", help="train as a YAML file says")
    run.add_argument("file", type=Path, help="the YAML file, see docs/how-to/configuration.md")
    run.add_argument(
        "--data", type=Path, required=True, help="rows: a .jsonl, .json, .csv, .tsv or .parquet file"
    )
    run.add_argument("--eval", type=Path, help="a file with held-out rows")
    run.add_argument(
        "--on-bad-rows",
        choices=["raise", "skip"],
        help="refuse the first row that cannot be used, or leave such rows out; instead of the file's on_bad_rows",
    )
    run.add_argument("--steps", type=int, help="optimiser steps, instead of the file's steps and epochs")
    run.add_argument(
        "--resume", metavar="ARTIFACT", help="go on from a checkpoint of an earlier run of this file"
    )
    run.add_argument(
        "--name", help="what the run is called in list_runs(); the file's own name, when left out"
    )
    run.add_argument("--tag", action="append", default=[], help="a word to find it by; may be given again")
    run.set_defaults(run=train)


def train(chosen: argparse.Namespace) -> int:
    """Train; losses and rewards named "module:attribute" may lie in the current folder, as with `python -m`."""
    sys.path.insert(0, str(Path.cwd()))
    recipe = load_config(chosen.file)
    if chosen.steps is not None:
        recipe = recipe.replace(steps=chosen.steps, epochs=None)
    if chosen.on_bad_rows is not None:
        recipe = recipe.replace(on_bad_rows=chosen.on_bad_rows)
    with ServiceClient() as service, service.create_training_client(recipe.training) as tc:
        name = chosen.file.stem[:MAX_NAME] if chosen.name is None else chosen.name
        run = recipe.start(
            tc, chosen.data, chosen.eval, resume_from=chosen.resume, name=name, tags=chosen.tag
        )
        try:
            result = run.result()
        except KeyboardInterrupt:
            run.stop()
            result = run.result()
    print_end(result)
    return 0 if result.state == RunStatus.FINISHED else 130


def print_end(result: RunResult) -> None:
    print(f"run {result.run_id} {result.state} after {result.steps} steps")
    for name, value in sorted(result.metrics.items()):
        print(f"  {name:24} {value:.6g}")
    log = Home.of_environment().event_log(result.run_id.partition("/")[0])
    print(f"its history: tensafe_nb.load_run({result.run_id!r}).history, kept in {log}")
