"""Another kernel of the same notebook server that keeps much of a small memory: found, told of, and ended on a click.

On a hub a student opens the next notebook, and the kernel of the last one still holds its models: two do not fit into
a gigabyte, and the system ends one of them without a word. Only kernels of this very server that run on this machine
are looked at. Outside Jupyter, and where there is memory enough, there is nothing to tell.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tensafe_nb.widgets import renderer

logger = logging.getLogger(__name__)

CROWDED = 0.5  # of the memory that there is: what this kernel and the others take together before it is told
SECONDS = 5.0  # for an answer of the notebook server
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
MB = 1_000_000


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A kernel beside this one.

    Attributes:
        kernel_id: Its id, as the server has it.
        session_id: Of the notebook that it belongs to; None where it belongs to none.
        name: What the notebook's file is called.
        size: Bytes that it keeps, with the processes below it.
    """

    kernel_id: str
    session_id: str | None
    name: str
    size: int


class NotebookServer:
    """The Jupyter server that has started this kernel.

    Args:
        url: Of its API, with the base path that a hub gives it.
        token: That opens it.
        pid: Of its process.
        own: Id of this kernel.
    """

    def __init__(self, url: str, token: str, pid: int, own: str) -> None:
        self.url, self.pid, self.own = url.rstrip("/"), pid, own
        self._headers = {"Authorization": f"token {token}"} if token else {}

    @classmethod
    def of_this_kernel(cls) -> "NotebookServer | None":
        """Return it as it has written itself down for its user; None where no such server started this kernel."""
        parent = os.environ.get("JPY_PARENT_PID", "")
        if not renderer.in_kernel() or not parent.isdigit():
            return None
        from ipykernel import get_connection_file
        from jupyter_core.paths import jupyter_runtime_dir

        try:
            told = json.loads((Path(jupyter_runtime_dir()) / f"jpserver-{parent}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        own = Path(get_connection_file()).stem.removeprefix("kernel-")
        return cls(told["url"], told["token"] or os.environ.get("JUPYTERHUB_API_TOKEN", ""), int(parent), own)

    def neighbours(self) -> Sequence[Neighbour]:
        """Return the other kernels that it has started on this machine, the largest first.

        Raises:
            httpx.HTTPError: It does not answer, or not with what was asked for.
        """
        sessions = {session["kernel"]["id"]: session for session in self._ask("GET", "sessions")}
        found = [
            Neighbour(one["id"], session.get("id"), Path(session.get("path") or "a kernel").name, size)
            for one in self._ask("GET", "kernels")
            if one["id"] != self.own and (size := self.size_of(one["id"])) is not None
            for session in [sessions.get(one["id"], {})]
        ]
        return sorted(found, key=lambda neighbour: -neighbour.size)

    def size_of(self, kernel_id: str) -> int | None:
        """Return the bytes that a kernel keeps; None where it is no process of this server on this machine."""
        import psutil

        with suppress(psutil.Error):
            for process in psutil.Process(self.pid).children():
                with suppress(psutil.Error):
                    if any(f"kernel-{kernel_id}.json" in word for word in process.cmdline()):
                        return sum(size for size in sizes(process))
        return None

    def shut_down(self, neighbour: Neighbour) -> None:
        """End a kernel, and the session of its notebook.

        Raises:
            httpx.HTTPError: The server did not do it.
        """
        of = f"sessions/{neighbour.session_id}" if neighbour.session_id else f"kernels/{neighbour.kernel_id}"
        self._ask("DELETE", of)

    def _ask(self, method: str, path: str) -> Any:
        with httpx.Client(
            trust_env=False, timeout=SECONDS
        ) as client:  # no proxy stands before one's own server
            answer = client.request(
                method, f"{self.url}/api/{path}", headers=self._headers
            ).raise_for_status()
        return answer.json() if answer.content else None


def sizes(process: Any) -> Iterator[int]:
    """Yield the resident bytes of a process and of those below it."""
    import psutil

    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.Error):
            yield int(one.memory_info().rss)


def memory_limit() -> int:
    """Return the bytes that this user may take: what the hub says, what this container has, or the machine."""
    import psutil

    told = [os.environ.get("MEM_LIMIT", "")]
    for path in LIMITS:
        with suppress(OSError):
            told.append(Path(path).read_text().strip())
    return min([int(text) for text in told if text.isdigit()] + [int(psutil.virtual_memory().total)])


def crowding() -> dict[str, Any] | None:
    """Return what to tell a page of the largest other kernel, if there is not memory enough for both; else None."""
    server = NotebookServer.of_this_kernel()
    if server is None:
        return None
    import psutil

    try:
        others = server.neighbours()
    except (
        httpx.HTTPError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:  # whatever it is, it is no server of Jupyter's
        logger.debug("the notebook server was asked for its kernels: %s", error)
        return None
    limit = memory_limit()
    together = sum(sizes(psutil.Process())) + sum(other.size for other in others)
    if not others or together < CROWDED * limit:
        return None
    most = others[0]
    text = (
        f"{most.name} is open too: its kernel keeps {most.size / MB:,.0f} MB of the {limit / MB:,.0f} MB that "
        f"there are for all. When these are used up, a kernel is ended without a word."
    )
    return {"id": most.kernel_id, "name": most.name, "text": text}


def shut_down(kernel_id: object) -> str:
    """End another kernel of this server; return a line about it.

    Raises:
        ValueError: It is none, or the server does not end it.
    """
    server = NotebookServer.of_this_kernel()
    try:
        others = () if server is None else server.neighbours()
        for other in others:
            if server is not None and other.kernel_id == kernel_id:
                server.shut_down(other)
                return f"{other.name} was shut down: {other.size / MB:,.0f} MB are free again."
    except httpx.HTTPError as error:
        raise ValueError(
            f"The notebook server did not end it: {error}. Use its page of running kernels."
        ) from error
    raise ValueError("There is no such kernel any more.")
