"""The program that `python_code` starts: limits itself, runs a response's code and its tests, says how many passed.

A program, not a module: it runs alone, with `python -I`, and imports nothing of this package.
"""

import contextlib
import json
import os
import sys

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
MAX_FILE = 16 << 20
CANNOT_RUN = 3


def main() -> None:
    """Run the job on standard input; write its token and the number of passed tests to standard output."""
    job = json.load(sys.stdin)
    verdict = os.dup(1)
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silence, descriptor)
    try:
        limit(job["seconds"], job["memory"])
    except (OSError, ValueError):
        os._exit(CANNOT_RUN)
    if sys.platform == "linux" and os.getppid() != job["parent"]:
        os._exit(CANNOT_RUN)  # whoever asked has ended before we could ask to end with it
    passed = passed_tests(job["code"], job["tests"])
    os.write(verdict, f"{job['token']} {passed}".encode())
    os._exit(0)  # whatever threads or exit handlers the code left behind


def passed_tests(code: str, tests: list[str]) -> int:
    """Return how many tests pass behind the code."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    if not runs(code, namespace):
        return 0
    return sum(runs(test, namespace) for test in tests)


def runs(code: str, namespace: dict[str, object]) -> bool:
    """Whether the code runs to its end."""
    try:
        exec(compile(code, "<response>", "exec"), namespace)
    except BaseException:  # noqa: BLE001  # sys.exit() and KeyboardInterrupt have not passed either
        return False
    return True


def limit(seconds: float, memory: int) -> None:
    """Limit this process as far as the platform can."""
    if sys.platform == "win32":
        return
    import resource

    cpu = int(seconds) + 1
    wanted = {"CPU": cpu, "FSIZE": MAX_FILE, "NPROC": 0, "CORE": 0, "NOFILE": 64}
    if sys.platform == "linux":  # macOS refuses a limit on address space
        wanted["AS"] = memory
        forbid_network_and_outliving()
    for name, value in wanted.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def forbid_network_and_outliving() -> None:
    """Leave the network behind where an ordinary user may, and die with the process that asked."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.unshare(CLONE_NEWUSER | CLONE_NEWNET)
        libc.prctl(DIE_WITH_PARENT, 9)


if __name__ == "__main__":
    main()
