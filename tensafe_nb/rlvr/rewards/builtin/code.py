"""The reward "python_code": the code in a response, run against its tests.

The code runs in a process of its own: isolated mode, an empty folder, no inherited environment, limits on time,
memory, file size and processes, and no network where Linux lets an ordinary user take it away. THIS IS NOT A
SECURITY BOUNDARY: the code runs as you and can read what you can read. Score the code of a model you would not
let loose on your machine in a container or a virtual machine.
"""

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tensafe_nb.display import as_given
from tensafe_nb.errors import RewardError, ValidationError
from tensafe_nb.locks import hold
from tensafe_nb.rlvr.rewards.builtin.answers import Builtin, Meta, column_of, fenced

_RUNNER = Path(__file__).with_name("code_child.py")
_FOLDERS = "tsnb-code-"
_CANNOT_RUN = 3  # exit status of a runner that could not set its limits
MOST_SAID = 100_000  # bytes of what it says


def python_code(
    prompt: str,
    response: str,
    meta: Meta = None,
    *,
    tests: str | Sequence[str] | None = None,
    column: str = "tests",
    partial: bool = False,
    timeout: float = 3.0,
    memory_mb: int = 512,
) -> float:
    """Reward 1 for a response whose Python code passes all tests; else 0. Not a security boundary.

    The code is that of the last fenced block of Python, else the whole response. Code that raises, exits, or takes
    too long or too much memory has failed its tests: that scores 0. Code that inspects its own process can cheat.

    Args:
        prompt: Not read.
        response: Holds the code.
        meta: Holds the tests when none are bound.
        tests: Statements such as "assert add(2, 2) == 4", run one after the other behind the code.
        column: Under this name.
        partial: Reward the share of the tests that pass.
        timeout: Seconds for code and tests together. A run's own limit per call, 5 s, must be longer.
        memory_mb: Address space, where the platform can limit it.

    Raises:
        ValidationError: There are no tests.
        RewardError: The process could not be started.
    """
    given = column_of(meta, column, "python_code") if tests is None else tests
    cases = [given] if isinstance(given, str) or not hasattr(given, "__iter__") else list(given)
    if not cases or not all(isinstance(case, str) and case.strip() for case in cases):
        raise ValidationError(
            f"python_code has no tests but {str(given)[:80]!r}: pass tests=['assert …', …], or fill the column "
            f"{as_given(column)} with such texts."
        )
    block = fenced(response, "python", "py", "python3", "py3")
    job = {
        "code": response if block is None else block,
        "tests": cases,
        "seconds": timeout,
        "memory": memory_mb << 20,
    }
    passed = passed_tests(job, timeout)
    return passed / len(cases) if partial else float(passed == len(cases))


def check_python_code(*, timeout: float = 3.0, memory_mb: int = 512, **_: Any) -> None:
    if timeout <= 0 or memory_mb < 64:
        raise ValidationError(
            f"python_code: timeout={timeout}, memory_mb={memory_mb}: expected timeout > 0 and memory_mb ≥ 64."
        )


def passed_tests(job: dict[str, Any], timeout: float) -> int:
    """Return how many tests passed."""
    return int(said_by_child(job, timeout, "python_code") or 0)


def said_by_child(job: dict[str, Any], timeout: float, who: str) -> str | None:
    """Run a job in a process of its own and return what it says of it; None if it was ended before.

    Files instead of pipes, so that nothing can keep us waiting.

    Args:
        job: As `code_child` reads it.
        timeout: Seconds it may take.
        who: Whose job it is, for an error.

    Raises:
        RewardError: The process could not be limited.
    """
    token = secrets.token_hex(16)
    # Of the environment, what Python needs to start, and nothing that could be a key of yours.
    kept = {name: os.environ[name] for name in ("SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    kept |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    _once_in_a_process()
    with (
        folder_of_its_own() as folder,
        tempfile.TemporaryFile() as stdin,
        tempfile.TemporaryFile() as verdict,
    ):
        stdin.write(json.dumps(job | {"token": token, "parent": os.getpid()}).encode())
        stdin.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", str(_RUNNER)],
            stdin=stdin,
            stdout=verdict,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=kept | {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder},
            start_new_session=True,
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end_group(process)
        if process.returncode == _CANNOT_RUN:
            raise RewardError(f"{who}: the process for the response could not be limited, so it was not run.")
        verdict.seek(0)
        came, _, said = verdict.read(MOST_SAID).decode(errors="replace").partition(" ")
    return said if came == token else None


@contextlib.contextmanager
def folder_of_its_own() -> Iterator[str]:
    """Yield an empty folder that is removed afterwards; if this process is killed before, by `remove_left_behind`."""
    with (
        tempfile.TemporaryDirectory(prefix=_FOLDERS, ignore_cleanup_errors=True) as outer,
        Path(outer, "held").open("wb") as mark,
    ):
        with contextlib.suppress(OSError):  # no file system of locks: nobody else gets it either
            hold(mark)
        inner = Path(outer, "run")  # only there once its mark is held
        inner.mkdir()
        yield str(inner)


def remove_left_behind() -> None:
    """Remove the folders of processes that were killed: their marks are held by nobody."""
    for outer in Path(tempfile.gettempdir()).glob(f"{_FOLDERS}*"):
        with contextlib.suppress(OSError):  # somebody else's, or gone meanwhile
            if outer.joinpath("run").is_dir():
                with outer.joinpath("held").open("r+b") as mark:
                    is_left = hold(mark)
                if is_left:
                    shutil.rmtree(outer, ignore_errors=True)


_once_in_a_process = functools.cache(remove_left_behind)


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """End a process, what it started, and wait for it."""
    if sys.platform == "win32":
        process.kill()
    else:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # it and its group are gone
            process.kill()
    process.wait()


BUILTINS = {"python_code": Builtin(python_code, check_python_code, inline=False)}
