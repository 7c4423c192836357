"""Scripts in processes of their own, without what is slow about those: to import torch.

One process does it once, and forks a child for each script; how a child begins and ends is how any process does.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A line of JSON on its input is a command: a script to begin in a child, or the id of a child whose end is awaited.
FORKING = """
import gc, json, os, sys
import matplotlib, peft, safetensors.torch, torch.optim, transformers.models.llama.modeling_llama, tqdm.auto
import tensafe_nb.engine.engine, tensafe_nb.rlvr, tensafe_nb.widgets, tensafe_nb.widgets.still.snapshot
gc.freeze()  # a client looks for circles when it ends: among what is its own, not among all of torch
for line in iter(sys.stdin.readline, ""):
    asked = json.loads(line)
    if "ended" in asked:
        print(os.waitstatus_to_exitcode(os.waitpid(asked["ended"], 0)[1]), flush=True)
    elif child := os.fork():
        print(child, flush=True)
    else:
        for path, stream in ((os.devnull, 0), (asked["out"], 1), (asked["err"], 2)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), stream)
        os.environ.clear()
        os.environ.update(asked["environment"])
        sys.argv[1:] = asked["arguments"]
        exec(asked["script"], {"__name__": "__main__"})
        sys.exit()
"""


class Forker:
    """Runs scripts in children of a process that has imported what they need."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def _ask(self, **command: Any) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def begin(
        self, script: str, *arguments: str, out: str = os.devnull, err: str = os.devnull, **changes: str
    ) -> int:
        """Begin a script in the environment of this test, but for some changes; return its process's id."""
        environment = os.environ | changes
        return self._ask(script=script, arguments=arguments, out=out, err=err, environment=environment)

    def status_of(self, pid: int) -> int:
        """Return the exit status of a process, once it has ended."""
        return self._ask(ended=pid)

    def run(self, script: str, folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run a script to its end; its output passes through a folder."""
        files = folder / "out", folder / "err"
        pid = self.begin(script, out=str(files[0]), err=str(files[1]), **changes)
        status = self.status_of(pid)
        return subprocess.CompletedProcess(script, status, *(file.read_text() for file in files))

    def close(self) -> None:
        """End it; children that are left are nobody's."""
        self._process.communicate()
