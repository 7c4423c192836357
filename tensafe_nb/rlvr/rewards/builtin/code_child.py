"""The program that `python_code` starts: limits itself, runs a response's code and its tests, says how many passed.

For the tool `python` it says what the code printed, and the value of its last line.

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
    said = printed(job["code"], job["show"]) if "show" in job else passed_tests(job["code"], job["tests"])
    os.write(verdict, f"{job['token']} {said}".encode(errors="replace"))
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


def printed(code: str, most: int) -> str:
    """Return what the code prints, then the value of its last line, or how it failed."""
    import ast
    import io

    out = io.StringIO()
    namespace: dict[str, object] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            tree = ast.parse(code, "<code>")
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, "<code>", "exec"), namespace)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), "<code>", "eval"), namespace)
                if value is not None:
                    out.write(f"{value!r}\n")
        except BaseException as error:  # noqa: BLE001  # whatever it is, the model is told
            out.write(failure(error))
    text = out.getvalue()
    return text if len(text) <= most else f"{text[:most]} [... {len(text) - most} more characters]"


def failure(error: BaseException) -> str:
    """Return an exception as a line, with the line of the code it comes from."""
    line, text = (error.lineno, error.msg) if isinstance(error, SyntaxError) else (None, str(error))
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<code>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"{type(error).__name__}: {text}" + (f" (line {line})" if line else "")


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
