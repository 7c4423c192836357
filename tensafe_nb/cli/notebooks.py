"""`tensafe-nb demo` and `tensafe-nb lab`: run the quickstart notebook without a browser, or open JupyterLab."""

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

from tensafe_nb.errors import ValidationError
from tensafe_nb.events import Metrics, RunState, RunStep
from tensafe_nb.history.log import RunHistory
from tensafe_nb.store.home import Home

QUICKSTART = "01_quickstart.ipynb"


def add_notebooks(commands: Any) -> None:
    """Add `demo` and `lab` to the parser of `tensafe-nb`."""
    demo = commands.add_parser("demo", help="run the quickstart notebook without a browser and leave a page")
    demo.add_argument(
        "--to", type=Path, default=Path("build/demo.html"), help="the page (default: %(default)s)"
    )
    demo.set_defaults(run=run_demo)
    lab = commands.add_parser("lab", help="open JupyterLab on the notebooks; further options go to it")
    lab.set_defaults(run=open_lab)


def open_lab(chosen: argparse.Namespace) -> int:
    """Become JupyterLab, opened on the notebooks."""
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


def run_demo(chosen: argparse.Namespace) -> int:
    """Execute the quickstart, show its runs' progress, and write it as a page."""
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import HTMLExporter

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
    asyncio.run(execute(client))
    chosen.to.parent.mkdir(parents=True, exist_ok=True)
    page, _ = HTMLExporter(embed_images=True).from_notebook_node(notebook)
    chosen.to.write_text(page, encoding="utf-8")
    print(
        f"done in {time.perf_counter() - started:.0f} s: open {chosen.to} in a browser; `make lab` for the notebooks"
    )
    return 0


async def execute(client: Any) -> None:
    """Execute a notebook to its end while its progress is printed."""
    from nbclient.exceptions import CellExecutionError

    watcher = asyncio.create_task(show_progress(set(Home.of_environment().event_logs())))
    try:
        await client.async_execute()
    except CellExecutionError as error:
        raise ValidationError(f"a cell of {QUICKSTART} failed:\n{error}") from error
    finally:
        watcher.cancel()


async def show_progress(old: set[Path]) -> None:
    """Follow the logs of the runs that the notebook starts; they tell everything, from any process."""
    seen: dict[Path, int] = {}
    values: dict[str, float] = {}
    while True:
        for log in sorted(set(Home.of_environment().event_logs()) - old):
            for event in RunHistory(log).events(after=seen.get(log, 0)):
                seen[log] = event.seq
                report(event, values)
        await asyncio.sleep(0.5)


def report(event: Any, values: dict[str, float]) -> None:
    """Print a line for every tenth step and every change of a run; `values` holds the newest of each metric."""
    if isinstance(event, Metrics):
        values.update(event.values)
    elif isinstance(event, RunState):
        print(f"  run {event.run_id}: {event.state} at step {event.step} {_figures(values)}", flush=True)
    elif isinstance(event, RunStep) and event.done % 10 == 0:
        print(f"  step {event.done:4d} {_figures(values)}", flush=True)


def _figures(values: dict[str, float]) -> str:
    shown = [(name, values[name]) for name in ("loss", "eval/loss", "reward") if name in values]
    return "  ".join(f"{name} {value:.3f}" for name, value in shown)


def _notebooks() -> Path:
    for folder in (Path.cwd() / "notebooks", Path(__file__).resolve().parents[2] / "notebooks"):
        if (folder / QUICKSTART).is_file():
            return folder
    raise ValidationError(
        f"there is no folder notebooks/ with {QUICKSTART} here: run this in a clone of the project."
    )
