"""`tensafe-nb lab`: brings the notebooks to where their reader may change them, and becomes JupyterLab."""

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from tensafe_nb.cli import main as cli

ROOT = Path(__file__).parents[3]
NOTEBOOKS = {path.name: path.read_bytes() for path in (ROOT / "notebooks").iterdir() if path.is_file()}
NEEDED = ("tensafe_nb", "notebooks", "pyproject.toml", "setup.py", "README.md", "LICENSE")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


class Execed(Exception):
    """What `exec` was called with: a real one would not return."""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return the commands that `lab` became; the current folder is an empty one."""
    commands: list[list[str]] = []

    def execv(program: str, command: list[str]) -> None:
        commands.append(command)
        raise Execed

    monkeypatch.setattr("os.execv", execv)
    monkeypatch.chdir(tmp_path)
    return commands


def open_lab(*options: str) -> None:
    with pytest.raises(Execed):
        cli.main(["lab", *options])


def test_in_an_empty_folder_it_copies_the_notebooks_and_says_where(
    lab: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_lab()
    folder = tmp_path / "tensafe-nb-notebooks"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == NOTEBOOKS
    assert capsys.readouterr().out == f"notebooks: {folder} (copied there: {len(NOTEBOOKS)})\n"
    assert lab[0][1:5] == ["-m", "jupyterlab", "--notebook-dir", "tensafe-nb-notebooks"]


def test_a_notebook_that_was_changed_is_left_so_and_one_that_was_deleted_comes_back(
    lab: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_lab("--to", "mine")
    changed, deleted = tmp_path / "mine/01_quickstart.ipynb", tmp_path / "mine/03_losses.ipynb"
    changed.write_text("{}")
    deleted.unlink()
    capsys.readouterr()
    open_lab("--to", "mine")
    assert changed.read_text() == "{}"
    assert deleted.read_bytes() == NOTEBOOKS[deleted.name]
    said = capsys.readouterr().out
    assert "(copied there: 1; changed since, and left so: 01_quickstart.ipynb; delete or rename" in said


def test_in_a_clone_it_opens_the_notebooks_that_are_there(
    lab: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    open_lab("--no-browser", "--ServerApp.port=8765")
    assert capsys.readouterr().out == f"notebooks: {ROOT / 'notebooks'}\n"
    assert lab[0][4] == "notebooks"
    assert lab[0][-2:] == ["--no-browser", "--ServerApp.port=8765"]


def test_options_that_go_to_jupyterlab_are_refused_by_other_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["demo", "--fast"])
    assert "unknown: --fast" in capsys.readouterr().err


def build_wheel(sources: Path, target: Path) -> Path:
    """Build the wheel in a copy of the sources, since building leaves things behind; return where it is."""
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, sources / name)
    subprocess.run([sys.executable, "-c", BUILD, str(target)], cwd=sources, check=True, capture_output=True)
    [wheel] = target.iterdir()
    return wheel


def test_the_wheel_holds_the_notebooks_and_every_file_of_the_package(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    wheel = build_wheel(tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel"))
    with ZipFile(wheel) as content:
        held = {name for name in content.namelist() if name.startswith("tensafe_nb/")}
        notebooks = {
            Path(name).name: content.read(name) for name in held if Path(name).parent.name == "notebooks"
        }
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tensafe_nb").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    solutions = {f"solutions/{path.name}" for path in (ROOT / "notebooks/solutions").glob("*.py")}
    assert held == package | {f"tensafe_nb/notebooks/{name}" for name in [*NOTEBOOKS, *solutions]}
    assert notebooks == NOTEBOOKS
