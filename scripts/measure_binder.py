"""How much memory a visitor of Binder needs: a JupyterLab server, and the kernel of one notebook run to its end in it.

Run it with the Python of an environment made from binder/requirements.txt, JupyterLab and this package:

    python scripts/measure_binder.py [notebooks/05_rlvr.ipynb]
"""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import websocket

ROOT = Path(__file__).parents[1]
FOLDERS = (
    "JUPYTER_CONFIG_DIR",
    "JUPYTER_DATA_DIR",
    "JUPYTER_RUNTIME_DIR",
    "IPYTHONDIR",
    "TENSAFE_HOME",
    "MPLCONFIGDIR",
)
GUARANTEED = 1024  # MB on mybinder.org


class LabServer:
    """A JupyterLab server with folders of its own, started as Binder starts it."""

    def __init__(self, folder: Path, notebooks: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address, self.token = f"127.0.0.1:{port}", secrets.token_hex(16)
        command = [
            str(ROOT / "binder/start"), sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
            "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", f"--IdentityProvider.token={self.token}",
            f"--ServerApp.root_dir={notebooks}",
        ]  # fmt: skip
        environment = os.environ | {name: str(folder / name) for name in FOLDERS}
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while self.process.poll() is None:
            with suppress(URLError, ConnectionError):
                self.ask("status")
                return
            time.sleep(0.1)
        raise SystemExit((folder / "log").read_text())

    def ask(self, path: str, **content: Any) -> Any:
        body = json.dumps(content).encode() if content else None
        headers = {"Authorization": f"token {self.token}"}
        with urlopen(Request(f"http://{self.address}/api/{path}", body, headers), timeout=60) as answer:
            return json.loads(answer.read())

    def channels(self, kernel: str) -> websocket.WebSocket:
        """Open the line over which a page talks to a kernel."""
        return websocket.create_connection(
            f"ws://{self.address}/api/kernels/{kernel}/channels",
            header=[f"Authorization: token {self.token}"],
            timeout=600,
        )


def run_cell(line: websocket.WebSocket, code: str) -> None:
    """Run a cell to its end; stop everything if it fails."""
    identity = uuid.uuid4().hex
    header = {
        "msg_id": identity,
        "msg_type": "execute_request",
        "username": "",
        "session": identity,
        "version": "5.4",
    }
    content = {"code": code, "silent": False, "store_history": True, "allow_stdin": False}
    request = {"channel": "shell", "header": header, "parent_header": {}, "metadata": {}, "content": content}
    line.send(json.dumps(request | {"buffers": []}))
    while True:
        message = json.loads(line.recv())
        if message["parent_header"].get("msg_id") != identity:
            continue
        if message["msg_type"] == "error":
            raise SystemExit("\n".join(message["content"]["traceback"]))
        if message["msg_type"] == "execute_reply":
            return


def memory(pid: int) -> dict[str, int]:
    """Return a process's resident memory in MB: now, at its peak, and what of it is mapped files."""
    status = Path(f"/proc/{pid}/status").read_text()
    names = {"now": "VmRSS", "peak": "VmHWM", "files": "RssFile"}
    return {name: int(re.search(rf"{key}:\s+(\d+)", status)[1]) // 1024 for name, key in names.items()}


def children(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def main(notebook: Path) -> None:
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    with tempfile.TemporaryDirectory() as folder:
        server = LabServer(Path(folder), notebook.parent.resolve())
        try:
            kernel = server.ask("kernels", name="python3")["id"]
            line = server.channels(kernel)
            started = time.perf_counter()
            most = {}
            for cell in cells:
                run_cell(line, "".join(cell["source"]))
                processes = {child: memory(child) for child in children(server.process.pid)}
                most = max(most, processes, key=lambda found: sum(one["peak"] for one in found.values()))
            seconds = time.perf_counter() - started
            of_server = memory(server.process.pid)
            line.close()
        finally:
            server.process.terminate()
            server.process.wait()
    total = of_server["peak"] + sum(one["peak"] for one in most.values())
    print(
        f"{notebook.name} on {sys.version.split()[0]}, run to its end in {seconds:.0f} s; resident memory in MB"
    )
    print(f"  server: {of_server}")
    for one in most.values():
        print(f"  kernel: {one}")
    print(f"  together at most {total} of the {GUARANTEED} that mybinder.org guarantees")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "notebooks" / "05_rlvr.ipynb")
