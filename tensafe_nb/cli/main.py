"""The command `tensafe-nb`: run the demo, open the notebooks, train from a file; `store_cli` adds the rest."""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensafe_nb.cli.store import add_commands
from tensafe_nb.errors import TGTinkerError, ValidationError
from tensafe_nb.events import Metrics, RunState, RunStep
from tensafe_nb.history.log import RunHistory
from tensafe_nb.protocol.results import RunResult, RunStatus
from tensafe_nb.recipes.recipe import load_config
from tensafe_nb.service import ServiceClient
from tensafe_nb.store.home import Home

QUICKSTART = "01_quickstart.ipynb"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = _parser()
    chosen, options = parser.parse_known_args(arguments)
    chosen.options = options
    if chosen.options and chosen.command != "lab":
        parser.error(f"unknown: {' '.join(chosen.options)}")
    try:
        return int(chosen.run(chosen))
    except (TGTinkerError, OSError) as error:
        print(f"tensafe-nb {chosen.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("tensafe-nb", description="Train language models from a notebook.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="run the quickstart notebook without a browser and leave a page")
    demo.add_argument(
        "--to", type=Path, default=Path("build/demo.html"), help="the page (default: %(default)s)"
    )
    demo.set_defaults(run=_demo)
    lab = commands.add_parser("lab", help="open JupyterLab on the notebooks; further options go to it")
    lab.set_defaults(run=_lab)
    run = commands.add_parser("run", help="train as a YAML file says")
    run.add_argument("file", type=Path, help="the YAML file, see docs/guide/configuration.md")
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
    run.set_defaults(run=_run)
    add_commands(commands)
    return parser


def _lab(chosen: argparse.Namespace) -> int:
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # as in a container
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--notebook-dir",
        str(_notebooks()),
        *root,
        *chosen.options,
    ]
    os.execv(sys.executable, command)


def _run(chosen: argparse.Namespace) -> int:
    """Train; losses and rewards named "module:attribute" may lie in the current folder, as with `python -m`."""
    sys.path.insert(0, str(Path.cwd()))
    recipe = load_config(chosen.file)
    if chosen.steps is not None:
        recipe = recipe.replace(steps=chosen.steps, epochs=None)
    if chosen.on_bad_rows is not None:
        recipe = recipe.replace(on_bad_rows=chosen.on_bad_rows)
    with ServiceClient() as service, service.create_training_client(recipe.training) as tc:
        run = recipe.start(tc, chosen.data, chosen.eval, resume_from=chosen.resume)
        try:
            result = run.result()
        except KeyboardInterrupt:
            run.stop()
            result = run.result()
    _print_end(result)
    return 0 if result.state == RunStatus.FINISHED else 130


def _print_end(result: RunResult) -> None:
    print(f"run {result.run_id} {result.state} after {result.steps} steps")
    for name, value in sorted(result.metrics.items()):
        print(f"  {name:24} {value:.6g}")
    log = Home.of_environment().event_log(result.run_id.partition("/")[0])
    print(f"its history: tensafe_nb.load_run({result.run_id!r}).history, kept in {log}")


def _demo(chosen: argparse.Namespace) -> int:
    """Execute the quickstart, show its runs' progress, and write it as a page."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.reads((_notebooks() / QUICKSTART).read_text(encoding="utf-8"), as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        store_widget_state=False,
        extra_arguments=["--log-level=ERROR"],
    )
    started = time.perf_counter()
    print(f"running {QUICKSTART}: training the built-in model on the docstrings of this Python")
    asyncio.run(_execute(client))
    chosen.to.parent.mkdir(parents=True, exist_ok=True)
    chosen.to.write_text(_as_html(notebook), encoding="utf-8")
    print(
        f"done in {time.perf_counter() - started:.0f} s: open {chosen.to} in a browser; `make lab` for the notebooks"
    )
    return 0


async def _execute(client: Any) -> None:
    from nbclient.exceptions import CellExecutionError

    watcher = asyncio.create_task(_show_progress(set(Home.of_environment().event_logs())))
    try:
        await client.async_execute()
    except CellExecutionError as error:
        raise ValidationError(f"a cell of {QUICKSTART} failed:\n{error}") from error
    finally:
        watcher.cancel()


async def _show_progress(old: set[Path]) -> None:
    """Follow the logs of the runs that the notebook starts; they tell everything, from any process."""
    seen: dict[Path, int] = {}
    values: dict[str, float] = {}
    while True:
        for log in sorted(set(Home.of_environment().event_logs()) - old):
            for event in RunHistory(log).events(after=seen.get(log, 0)):
                seen[log] = event.seq
                _report(event, values)
        await asyncio.sleep(0.5)


def _report(event: Any, values: dict[str, float]) -> None:
    if isinstance(event, Metrics):
        values.update(event.values)
    elif isinstance(event, RunState):
        print(f"  run {event.run_id}: {event.state} at step {event.step} {_figures(values)}", flush=True)
    elif isinstance(event, RunStep) and event.done % 10 == 0:
        print(f"  step {event.done:4d} {_figures(values)}", flush=True)


def _figures(values: dict[str, float]) -> str:
    shown = [(name, values[name]) for name in ("loss", "eval/loss", "reward") if name in values]
    return "  ".join(f"{name} {value:.3f}" for name, value in shown)


def _as_html(notebook: Any) -> str:
    from nbconvert import HTMLExporter

    html, _ = HTMLExporter(embed_images=True).from_notebook_node(notebook)
    return str(html)


def _notebooks() -> Path:
    for folder in (Path.cwd() / "notebooks", Path(__file__).resolve().parents[2] / "notebooks"):
        if (folder / QUICKSTART).is_file():
            return folder
    raise ValidationError(
        f"there is no folder notebooks/ with {QUICKSTART} here: run this in a clone of the project."
    )


if __name__ == "__main__":
    sys.exit(main())
