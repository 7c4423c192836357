"""The program of a scoring process: takes functions and rollouts from its standard input, answers with scores.

An environment is such a function too, and a turn of a conversation what it is called on.

A program, not a module: started by its path and told who asks (a process id), it imports the package only once it
knows where that is. Requests are frames (8 bytes of length, then the bytes): first the import path as JSON, then
pickled tuples. Answers are lines of JSON. What a function prints goes to standard error.
"""

import contextlib
import json
import os
import queue
import signal
import sys
import threading
from typing import Any, BinaryIO

HEADER = 8
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def main() -> None:
    """Serve until standard input ends."""
    end_with(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt of the notebook is not ours
    requests, answers = take_pipes()
    sys.path[:] = json.loads(_read_frame(requests))
    import cloudpickle  # type: ignore[import-untyped, unused-ignore]

    from tensafe_nb.rlvr.scoring.shipping import arrived

    calls: dict[int, Any] = {}
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> (
        None
    ):  # on a thread, so that this process ends with the one that asked, whatever it is doing
        while True:
            inbox.put(_read_frame(requests))

    threading.Thread(target=read, daemon=True).start()
    while True:
        kind, key, blob = cloudpickle.loads(inbox.get())
        if kind == "load":
            _write_answer(answers, load(calls, key, blob))
        else:
            first, units = arrived(blob)
            for index, unit in enumerate(units, first):
                _write_answer(answers, [index, calls[key].answered(unit)])


def end_with(parent: int, by: int = signal.SIGKILL) -> None:
    """End when the process that asked does, whatever is being executed, be it a regular expression that has the GIL.

    Elsewhere than on Linux the end of standard input does that, as soon as Python gets a turn.
    """
    if sys.platform != "linux":
        return
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, by)
    if os.getppid() != parent:  # it has ended before we could ask for the signal
        os._exit(0)


def take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep standard input and output for ourselves: a function that reads or prints must not disturb."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, answers


def _read_frame(requests: BinaryIO) -> bytes:
    header = requests.read(HEADER)
    if len(header) < HEADER:
        os._exit(0)  # whoever asked is gone
    return requests.read(int.from_bytes(header, "big"))


def load(calls: dict[int, Any], key: int, blob: bytes) -> list[Any]:
    """Take on a function; return the message that says so, or why not."""
    from tensafe_nb.rlvr.scoring.shipping import arrived

    try:
        calls[key] = arrived(blob)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # importing the user's modules may raise anything: told to the parent
        return ["loaded", f"{type(error).__name__}: {error}"]
    return ["loaded", None]


def _write_answer(answers: BinaryIO, message: list[Any]) -> None:
    answers.write(json.dumps(message).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    main()
