"""Binder's build, without its image: what binder/ says, carried out in a bare directory with an old pip and a new one.

    python -m scripts.binder_install [--pip 21.3.1 --pip newest]

A new environment gets binder/requirements.txt, then binder/postBuild runs in a copy of what git tracks, then notebook
01 runs as a visitor's would, under binder/start. Printed are the minutes, the megabytes, and what pip made of it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLD, NEWEST = "21.3.1", "newest"
IMAGE = ("jupyterlab",)  # what repo2docker's image has of its own
COLUMNS = ("pip", "requirements", "postBuild", "size", "notebook 01")


class Failed(SystemExit):
    """A step did not go well; says which, and what it printed last."""


def run(*command: str | Path, folder: Path, environment: dict[str, str]) -> tuple[float, str]:
    """Run a step to its end; return the seconds and what it printed."""
    started = time.monotonic()
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Failed(f"{' '.join(map(str, command))}\n{done.stdout[-4_000:]}")
    return time.monotonic() - started, done.stdout


def requirements() -> str:
    """Return Binder's requirements; where wheels lie at hand (PIP_FIND_LINKS), without the address of another index."""
    lines = (ROOT / "binder/requirements.txt").read_text().splitlines()
    at_hand = "PIP_FIND_LINKS" in os.environ
    return "\n".join(line for line in lines if not (at_hand and line.startswith("--extra-index-url"))) + "\n"


def copy_of_what_git_tracks(target: Path) -> None:
    """Copy the files of the repository as a clone has them."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, tracked.stdout.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)


def size_of(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def build(pip: str, folder: Path) -> list[str]:
    """Do what repo2docker does with binder/, and what a visitor does first; return a row of the table."""
    venv, clone = folder / "venv", folder / "clone"
    clone.mkdir()
    copy_of_what_git_tracks(clone)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    environment = kept | {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}", "HOME": str(folder)}
    python = venv / "bin/python"
    wanted = ["--upgrade", "pip"] if pip == NEWEST else [f"pip=={pip}"]
    run(python, "-m", "pip", "install", "--quiet", *wanted, folder=folder, environment=environment)
    version = run(python, "-m", "pip", "--version", folder=folder, environment=environment)[1].split()[1]
    (folder / "requirements.txt").write_text(requirements())
    install = (python, "-m", "pip", "install", "--no-cache-dir")
    installing, _ = run(*install, "-r", folder / "requirements.txt", folder=folder, environment=environment)
    size = size_of(venv)
    run(*install, "--quiet", *IMAGE, folder=folder, environment=environment)
    building, _ = run(clone / "binder/postBuild", folder=clone, environment=environment)
    measuring = (python, clone / "scripts/measure_binder.py", clone / "notebooks/01_quickstart.ipynb")
    ran, told = run(*measuring, folder=folder, environment=environment)
    together = next(
        line.split("most ")[1].split()[0] for line in told.splitlines() if "together at most" in line
    )
    return [
        f"{version}, Python {sys.version.split()[0]}",
        f"{installing:.0f} s",
        f"{building:.0f} s",
        f"{size / 1e6:,.0f} MB",
        f"ran in {ran:.0f} s, {together} MB with its server",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pip", action="append", help=f"version of pip (default: {OLD} and the newest)")
    chosen = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for pip in chosen.pip or (OLD, NEWEST):
        with tempfile.TemporaryDirectory(prefix="tensafe-binder-") as folder:
            print(f"| {' | '.join(build(pip, Path(folder)))} |", flush=True)


if __name__ == "__main__":
    main()
