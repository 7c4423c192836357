"""`tensafe-nb demo` and `tensafe-nb lab`: run the quickstart notebook without a browser, or open JupyterLab."""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
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
    lab.add_argument(
        "--to",
        type=Path,
        metavar="FOLDER",
        help="where the notebooks are copied, unless they are there (default: notebooks/ of a clone, else "
        "tensafe-nb-notebooks/)",
    )
    lab.set_defaults(run=open_lab)


def open_lab(chosen: argparse.Namespace) -> int:
    """Become JupyterLab, opened on the notebooks."""
    folder = chosen.to or default_folder()
    brought, kept = bring_notebooks(folder)
    print(f"notebooks: {folder.resolve()}{_what_was_done(brought, kept)}", flush=True)
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # as in a container
    command = [sys.executable, "-m", "jupyterlab", "--notebook-dir", str(folder), *root, *chosen.options]
    os.execv(sys.executable, command)


def default_folder() -> Path:
    """Return the folder of the clone where this is one, else one whose name says whose notebooks they are."""
    here = Path("notebooks")
    return here if (here / QUICKSTART).is_file() else Path("tensafe-nb-notebooks")


def bring_notebooks(folder: Path) -> tuple[list[str], list[str]]:
    """Copy the notebooks to where their reader may change them; one that is there already is left as it is.

    Returns:
        Names of those that were brought, and of those that differ from ours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    brought, kept = [], []
    for ours in sorted(source_of_notebooks().glob("*.ipynb")):
        theirs = folder / ours.name
        try:
            with theirs.open("xb") as copy:  # never over one that is there
                copy.write(ours.read_bytes())
            brought.append(ours.name)
        except FileExistsError:
            if theirs.read_bytes() != ours.read_bytes():
                kept.append(ours.name)
    return brought, kept


def _what_was_done(brought: Sequence[str], kept: Sequence[str]) -> str:
    words = [f"copied there: {len(brought)}"] * bool(brought)
    if kept:
        words.append(f"changed since, and left so: {', '.join(kept)}; delete or rename one to get it afresh")
    return f" ({'; '.join(words)})" if words else ""


def source_of_notebooks() -> Path:
    """Return the folder from which the notebooks come: inside the installed package, or in the clone."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "notebooks", package.parent / "notebooks"):
        if (folder / QUICKSTART).is_file():
            return folder
    raise ValidationError(f"This installation of {package} holds no notebooks: install tensafe_nb anew.")


def run_demo(chosen: argparse.Namespace) -> int:
    """Execute the quickstart, show its runs' progress, and write it as a page."""
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import HTMLExporter

    notebook = nbformat.reads((source_of_notebooks() / QUICKSTART).read_text(encoding="utf-8"), as_version=4)
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
