"""`tensafe-nb lab`: open JupyterLab on the notebooks."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensafe_nb.errors import ValidationError

QUICKSTART = "01_quickstart.ipynb"
GLOSSARY = "glossary.md"  # which the notebooks link


def add_lab(commands: Any) -> None:
    """Add `lab` to the parser of `tensafe-nb`."""
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
    """Copy notebooks and glossary to where their reader may change them; one that is there already is left as it is.

    Returns:
        Names of those that were brought, and of those that differ from ours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    brought, kept = [], []
    source = source_of_notebooks()
    for ours in [*sorted(source.glob("*.ipynb")), source / GLOSSARY]:
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
