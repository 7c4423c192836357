"""The kernel versions that behave differently, each in an environment of its own over the packages of this one."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSIONS = ("7.4.0", "7.3.0", "6.31.0")
ENVIRONMENTS = ROOT / "build" / "kernels"


class NoIndexError(Exception):
    """pip cannot get a version of ipykernel here."""


def name_of(version: str) -> str:
    """Return the name of the kernelspec of an ipykernel version."""
    return f"ipykernel-{version}"


def python_of(version: str) -> Path:
    """Return a Python that has this ipykernel, and all else as here; makes the environment where there is none.

    Raises:
        NoIndexError: Neither an index nor a local copy has this version.
    """
    folder = ENVIRONMENTS / version
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if ready.exists() and ready.read_text() == _here():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)], check=True)
    packages = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    (Path(packages) / "of-the-tests.pth").write_text(f"import site; site.addsitedir({_here()!r})\n")
    _install(python, version)
    ready.write_text(_here())
    return python


def register(version: str, data_folder: Path) -> str:
    """Make a kernelspec of an ipykernel version in a Jupyter data folder; return its name."""
    folder = data_folder / "kernels" / name_of(version)
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(python_of(version)), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {
        "argv": command,
        "display_name": f"ipykernel {version}",
        "language": "python",
        "interrupt_mode": "signal",
        "env": {"PYTHONPATH": str(ROOT)},
    }
    (folder / "kernel.json").write_text(json.dumps(spec))
    return name_of(version)


def _here() -> str:
    return sysconfig.get_path("purelib")


def _install(python: Path, version: str) -> None:
    """Install this one package, beside which the rest of the tests' environment is found."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq", "--no-deps"]
    done = subprocess.run(
        [*command, "--ignore-installed", f"ipykernel=={version}"], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise NoIndexError(f"pip cannot install ipykernel {version} here: {done.stderr.strip()[-300:]}")
