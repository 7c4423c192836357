"""A real JupyterHub on loopback, whose users have a memory of their own: for tests and measurements. `make hub`.

A user's notebook server and kernels live in one memory group of Linux, so that a limit is the kernel's to enforce:
who goes beyond it is killed, as in a container of that size.
"""

import contextlib
import json
import os
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
HUB = ROOT / ".venv-hub"
OPERATOR = "operator-token-of-this-hub"
SCOPE = "access:services!service=tensafe"
MIB = 1024**2

CONFIG = """
c = get_config()
c.JupyterHub.bind_url = "http://127.0.0.1:{ports[0]}"
c.JupyterHub.hub_bind_url = "http://127.0.0.1:{ports[1]}"
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{ports[2]}"
c.ConfigurableHTTPProxy.command = ["node", "{hub}/node/node_modules/.bin/configurable-http-proxy"]
c.JupyterHub.db_url = "sqlite:///{folder}/hub.sqlite"
c.JupyterHub.cookie_secret_file = "{folder}/cookie_secret"
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = "{folder}/homes/{{username}}"
c.Spawner.http_timeout = c.Spawner.start_timeout = 300
c.Spawner.cmd = {command!r}
c.Spawner.args = ["--allow-root"]
c.Spawner.mem_limit = {limit}  # which this spawner only tells; the groups enforce it
c.Spawner.environment = {{"PYTHONPATH": "{root}", "OMP_NUM_THREADS": "1"}}
load_subconfig("{root}/docs/deploy/jupyterhub_config.py")
service = c.JupyterHub.services[-1]
service["url"] = "http://127.0.0.1:{ports[3]}"
service["command"][service["command"].index("/srv/tensafe")] = "{folder}/server"
service["command"][service["command"].index("/srv/models")] = "{folder}"
service["environment"] |= {{"PYTHONPATH": "{root}", "OMP_NUM_THREADS": "1"}}
if {remote}:
    c.Spawner.environment["TENSAFE_BASE_URL"] = "http://127.0.0.1:{ports[0]}/services/tensafe"
    c.Spawner.environment["TENSAFE_API_KEY"] = lambda spawner: spawner.api_token
if {short}:
    c.Spawner.environment["TENSAFE_NB_FAST"] = "1"
c.JupyterHub.services.append({{"name": "operator", "api_token": "{operator}"}})
operates = {{"name": "operates", "scopes": ["admin:users", "admin:servers", "tokens"], "services": ["operator"]}}
c.JupyterHub.load_roles.append(operates)
"""
ENTER = 'echo $$ > "$0/$JUPYTERHUB_USER/cgroup.procs" && exec "$@"'  # a shell's: then it becomes the server


class MemoryGroups:
    """Memory groups (cgroup v2, or v1), one for each name, with a limit that the kernel enforces; for root only.

    Args:
        names: Of the groups.
        limit: Bytes that the processes of a group may take together, with the files that they read first.

    Raises:
        OSError: This machine lets nobody make such groups, or not this user.
    """

    def __init__(self, names: list[str], limit: int) -> None:
        root = Path("/sys/fs/cgroup")
        self.version = 2 if (root / "cgroup.controllers").exists() else 1
        if self.version == 1:
            own = Path("/proc/self/cgroup").read_text().split(":memory:")[1].splitlines()[0]
            root = root / "memory" / own.lstrip("/")  # beneath our own, whose limits go on counting
        self.root = root / f"tensafe-hub-{os.getpid()}"
        self.root.mkdir()
        if self.version == 2:
            for folder in (root, self.root):
                (folder / "cgroup.subtree_control").write_text("+memory")
        self.names, self.limit = names, limit
        for name in names:
            (self.root / name).mkdir()
            self._file(name, "memory.limit_in_bytes", "memory.max").write_text(str(limit))
            if self.version == 2:
                (self.root / name / "memory.swap.max").write_text("0")

    def _file(self, name: str, v1: str, v2: str) -> Path:
        return self.root / name / (v2 if self.version == 2 else v1)

    def peak(self, name: str) -> int:
        """Return the most bytes that a group ever took."""
        return int(self._file(name, "memory.max_usage_in_bytes", "memory.peak").read_text())

    def killed(self, name: str) -> int:
        """Return how many processes of a group were killed for memory."""
        told = self._file(name, "memory.oom_control", "memory.events").read_text()
        return int(dict(line.split() for line in told.splitlines())["oom_kill"])

    def processes(self, name: str) -> list[int]:
        """Return the processes in a group."""
        return [int(pid) for pid in (self.root / name / "cgroup.procs").read_text().split()]

    def remove(self) -> None:
        """Remove the groups, which nobody is in any more."""
        for name in self.names:
            (self.root / name).rmdir()
        self.root.rmdir()


class Hub:
    """A running JupyterHub, with the service of docs/deploy/jupyterhub_config.py.

    Args:
        folder: Where all of it is kept.
        groups: The users' memory groups; None leaves them without a limit.
        remote: Let the users' services be the hub's training server.
        short: Let notebooks take few steps (TENSAFE_NB_FAST).

    Attributes:
        url: Where it is.
        service: Where its training server is.
        process: The hub itself.
    """

    def __init__(
        self,
        folder: Path,
        *,
        groups: MemoryGroups | None = None,
        remote: bool = False,
        short: bool = False,
    ) -> None:
        with contextlib.ExitStack() as sockets:
            found = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
            ports = [each.getsockname()[1] for each in found]
        self.folder, self.url = folder, f"http://127.0.0.1:{ports[0]}"
        self.service = f"{self.url}/services/tensafe"
        single = str(HUB / "bin/jupyterhub-singleuser")
        command = [single] if groups is None else ["/bin/sh", "-c", ENTER, str(groups.root), single]
        config = folder / "jupyterhub_config.py"
        config.write_text(
            CONFIG.format(
                ports=ports,
                hub=HUB,
                folder=folder,
                root=ROOT,
                operator=OPERATOR,
                command=command,
                remote=remote,
                short=short,
                limit=groups and groups.limit,
            )
        )
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "TENSAFE"))
        }
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [HUB / "bin" / "jupyterhub", "--config", config], cwd=folder, env=kept, stdout=log, stderr=log
            )

    def __enter__(self) -> "Hub":
        until(lambda: answers(f"{self.service}/health"), self.process)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    @property
    def log(self) -> str:
        """The end of what it has written down."""
        return (self.folder / "log").read_text()[-6_000:]

    def ask(self, method: str, path: str, **options: Any) -> Any:
        """Ask the hub's API, as its operator."""
        headers = {"authorization": f"token {OPERATOR}"}
        answer = httpx.request(method, f"{self.url}/hub/api{path}", headers=headers, timeout=300, **options)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def token_of(self, user: str, scopes: list[str]) -> str:
        """Make a token of a user."""
        return str(self.ask("POST", f"/users/{user}/tokens", json={"scopes": scopes})["token"])

    def start(self, user: str) -> None:
        """Start a user's notebook server, and wait until it is there."""
        self.ask("POST", f"/users/{user}/server")
        until(
            lambda: self.ask("GET", f"/users/{user}")["servers"].get("", {}).get("ready", False), seconds=300
        )

    def stop(self, user: str) -> None:
        """Stop a user's notebook server, with its kernels."""
        self.ask("DELETE", f"/users/{user}/server")
        until(lambda: not self.ask("GET", f"/users/{user}")["servers"], seconds=120)

    @contextlib.contextmanager
    def kernel(self, user: str) -> Iterator["KernelLine"]:
        """Start a kernel on a user's server, as JupyterLab does; it is shut down afterwards."""
        headers = {"authorization": f"token {self.token_of(user, ['access:servers!user'])}"}
        kernels = f"{self.url}/user/{user}/api/kernels"
        made = httpx.post(kernels, headers=headers, timeout=300)
        assert made.status_code == 201, made.text
        url = f"{kernels}/{made.json()['id']}"
        from websockets.sync.client import connect

        channels = f"{url}/channels?session_id={uuid.uuid4().hex}".replace("http", "ws", 1)
        with connect(
            channels, additional_headers=headers, max_size=None, open_timeout=300, ping_interval=None
        ) as line:
            yield KernelLine(line)
        httpx.delete(url, headers=headers, timeout=300)


class KernelLine:
    """The line to a kernel over which a page runs cells."""

    def __init__(self, line: Any) -> None:
        self._line = line

    def run(self, code: str, seconds: float = 240) -> str:
        """Run a cell; return what it printed and showed as text.

        Args:
            code: Of the cell.
            seconds: For which the kernel may say nothing at all.

        Raises:
            RuntimeError: The cell failed, or the kernel was killed.
        """
        message_id, said, replied, idle = uuid.uuid4().hex, "", False, False
        header = {
            "msg_id": message_id,
            "msg_type": "execute_request",
            "session": message_id,
            "username": "",
            "version": "5.3",
        }
        content = {
            "code": code,
            "silent": False,
            "store_history": True,
            "allow_stdin": False,
            "user_expressions": {},
        }
        blank: dict[str, Any] = {"parent_header": {}, "metadata": {}, "buffers": []}
        self._line.send(json.dumps(blank | {"header": header, "content": content, "channel": "shell"}))
        while True:
            told = self._line.recv(timeout=seconds)
            if isinstance(told, bytes):  # of a panel, with columns of numbers behind
                continue
            message = json.loads(told)
            if message["msg_type"] == "status" and message["content"]["execution_state"] in (
                "restarting",
                "dead",
            ):
                raise RuntimeError("the kernel was killed")
            if message["parent_header"].get("msg_id") != message_id:
                continue
            match message["msg_type"], message["content"]:
                case "stream", content:
                    said += content["text"]
                case "execute_result", content:
                    said += content["data"].get("text/plain", "")
                case "error", content:
                    raise RuntimeError("\n".join(content["traceback"]))
                case "execute_reply", _:
                    replied = True
                case "status", {"execution_state": "idle"}:
                    idle = True
            if replied and idle:  # which come on two lines: what was shown comes before the second
                return said


def answers(url: str) -> bool:
    """Whether somebody answers at an address."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url).status_code == 200
    return False


def until(
    so: Callable[[], bool], process: "subprocess.Popen[Any] | None" = None, seconds: float = 120
) -> None:
    """Wait for something, while a process lives."""
    end = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < end and (process is None or process.poll() is None)
        time.sleep(0.2)
