"""The process from which servers are forked: it has imported everything, and runs nothing.

A line of JSON on its input is a command: {"serve": arguments, "bounds": {…}} begins a server and answers with its
process's id, {"kill": id} ends one and answers when it is gone, {"ended": id} says whether it has ended by itself.
"""

import json
import os
import signal
import sys
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")


def serve(arguments: list[str], bounds: dict[str, float]) -> None:
    """Run `tensafe-nb serve`, with bounds of its own for automatic checkpoints."""
    from tensafe_nb.cli.main import main
    from tensafe_nb.server import journal

    for name, value in bounds.items():
        setattr(journal, name, value)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0), os.dup2(nothing, 1)
    main(["serve", *arguments])


alive: set[int] = set()


def obey(command: dict[str, Any]) -> Any:
    if "kill" in command:
        os.kill(command["kill"], signal.SIGKILL)
        os.waitpid(command["kill"], 0)
        alive.discard(command["kill"])
        return True
    if "ended" in command:
        return os.waitpid(command["ended"], os.WNOHANG)[0] != 0
    child = os.fork()
    if child:
        alive.add(child)
        return child
    try:
        serve(command["serve"], command["bounds"])
    finally:
        os._exit(1)


def main() -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401
    import uvicorn.loops.auto
    import uvicorn.protocols.http.auto  # noqa: F401

    import tensafe_nb.cli.server
    import tensafe_nb.engine.engine
    import tensafe_nb.server.app
    import tensafe_nb.server.process  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(obey(json.loads(line))), flush=True)
    for child in alive:  # whoever asked for them has ended
        os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
