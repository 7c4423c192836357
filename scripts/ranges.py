"""Tests both ends of what pyproject.toml declares: the newest and the lowest direct versions, each in its environment.

    make ranges                                    # both ends, in .venv-newest and .venv-lowest
    python -m scripts.ranges lowest                # one of them
    python -m scripts.ranges newest --torch 2.13.0 # with a torch that is at hand: the newest one may be gigabytes
    python -m scripts.ranges newest --python python3.13 --folder .venv-3.13

The suite is bounded to what foreign packages can break: models, losses, sampling, privacy, checkpoints, RL. Warnings
are errors there as everywhere, so that what the next version takes away is seen before it does.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYPROJECT = ROOT / "pyproject.toml"
ENDS = ("newest", "lowest")
TOOLS = (
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "nbclient",
    "pandas",
    "polars",
    "pyarrow",
    "datasets",
)
PART = (
    "tests/home_0_1",
    "tests/numbers",
    "tests/parity",
    "tests/unit/engine",
    "tests/unit/losses",
    "tests/unit/rlvr/algorithms",
    "tests/unit/rlvr/rewards/builtin/test_math.py",
)
MARKS = "not soak and not browser and not alone"
FLOOR = re.compile(r"([A-Za-z0-9._-]+)(\[[^\]]*\])?>=([0-9][0-9.]*)$")


def declared() -> list[str]:
    """Return the requirements of the package and of what its users can add."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = project["optional-dependencies"]
    return [
        *project["dependencies"],
        *(line for extra in ("math", "gym", "server") for line in extras[extra]),
    ]


def at(end: str, requirement: str) -> str:
    """Return a requirement as one end of its range takes it.

    Raises:
        ValueError: It has no floor.
    """
    found = FLOOR.match(requirement)
    if found is None:
        raise ValueError(f"{requirement!r} has no floor: write name>=version")
    return requirement if end == "newest" else f"{found[1]}{found[2] or ''}=={found[3]}"


def prepare(end: str, python: str, folder: Path, torch: str | None) -> Path:
    """Make the environment anew, and return its Python."""
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True, env=alone)
    own = folder / "bin" / "python"
    wanted = [at(end, requirement) for requirement in declared()]
    if torch is not None:
        wanted = [f"torch=={torch}" if line.startswith("torch") else line for line in wanted]
    first = next(line for line in wanted if line.startswith("torch"))
    for packages in (["pip>=24"], [first], [*wanted, *TOOLS], ["--no-deps", "--editable", str(ROOT)]):
        install = [own, "-m", "pip", "install", "-q", "--upgrade", *packages]
        subprocess.run(install, check=True, env=alone)
    return own


def versions(python: Path) -> str:
    """Return what is installed of what is declared, as one line."""
    names = [FLOOR.match(requirement)[1] for requirement in declared()]  # type: ignore[index]
    code = f"import importlib.metadata as m; print(*(f'{{n}} {{m.version(n)}}' for n in {names!r}), sep=', ')"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def check(end: str, python: Path, workers: int, tests: Sequence[str]) -> int:
    """Run the bounded suite; return pytest's exit code.

    At the lowest end, packages of ours meet newer ones beneath them (matplotlib 3.8 a pyparsing of today), and what
    they call is deprecated there: that is theirs to mend.
    """
    # Not the editable install of another checkout, and not this environment's kernels.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "pytest", "-q", "-m", MARKS, "-n", str(workers), "--dist", "worksteal"]
    command += ["-W", "ignore::DeprecationWarning"] if end == "lowest" else []
    command += tests
    return subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("end", choices=ENDS)
    parser.add_argument("tests", nargs="*", default=PART, help="instead of the bounded suite")
    parser.add_argument("--python", default=sys.executable, help="another Python, such as python3.13")
    parser.add_argument(
        "--folder", type=Path, help="of the environment; default: .venv-newest or .venv-lowest"
    )
    parser.add_argument("--torch", help="this torch, where the end itself is not to be had")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--keep", action="store_true", help="use the environment as it is")
    chosen = parser.parse_intermixed_args(arguments)  # tests may come after options
    folder = ROOT / (chosen.folder or f".venv-{chosen.end}")
    python = folder / "bin" / "python"
    if not (chosen.keep and python.exists()):
        prepare(chosen.end, chosen.python, folder, chosen.torch)
    print(f"{chosen.end}: {versions(python)}", flush=True)
    return check(chosen.end, python, chosen.workers, chosen.tests)


if __name__ == "__main__":
    sys.exit(main())
