"""What a student needs to run a notebook: memory and time, measured by running it here."""

import asyncio
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensafe_nb.errors import TGTinkerError

ASKED = """\
import json as _json, time as _time
with open("/proc/self/status") as _status:  # not getrusage, whose peak is inherited from the parent process
    _peak = next(int(line.split()[1]) for line in _status if line.startswith("VmHWM:"))
print(_json.dumps({"kilobytes": _peak, "seconds": _time.process_time()}))"""


@dataclass(frozen=True, slots=True)
class Needed:
    """What the kernel of a notebook took, from its start to its end.

    Attributes:
        megabytes: Its resident memory at the peak; the notebook server comes on top.
        seconds: From the first cell to the last.
        cpu_seconds: What it computed, over all cores.
    """

    megabytes: int
    seconds: float
    cpu_seconds: float


def measure(path: Path) -> Needed:
    """Run a notebook to its end, in a home folder of its own, and say what it took. Linux only.

    Raises:
        TGTinkerError: A cell failed, or the kernel was ended.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(ASKED))
    with tempfile.TemporaryDirectory(prefix="tensafe-home-") as home:
        client = NotebookClient(
            notebook,
            timeout=None,
            kernel_name="python3",
            store_widget_state=False,
            extra_arguments=["--log-level=ERROR"],
        )
        started = time.monotonic()
        try:
            asyncio.run(executed(client, path.parent, os.environ | {"TENSAFE_HOME": home}))
        except CellExecutionError as error:
            raise TGTinkerError(
                f"{path.name} did not run to its end: {error.ename}: {error.evalue}"
            ) from error
        except DeadKernelError as error:
            raise TGTinkerError(f"{path.name}: its kernel was ended. Is there memory enough here?") from error
        seconds = time.monotonic() - started
    found = json.loads(notebook.cells[-1].outputs[-1].text)
    return Needed(round(found["kilobytes"] / 1024), seconds, found["seconds"])


async def executed(client: Any, folder: Path, environment: dict[str, str]) -> None:
    """Execute a notebook where it lies."""
    client.resources = {"metadata": {"path": str(folder)}}
    await client.async_execute(env=environment)
