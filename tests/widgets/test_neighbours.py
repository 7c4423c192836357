"""A second kernel of the same notebook server: found where memory is small, and shut down; nothing else is touched."""

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tensafe_nb.widgets import renderer
from tensafe_nb.widgets.live import neighbours

from .conftest import FakeClient, Wire

BASE, TOKEN = "/user/ada/", "her-own-token"


class FakeJupyter(HTTPServer):
    """What a Jupyter server says of its kernels, under the base path of a hub; this process is its process."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeAnswers)
        self.kernels: dict[str, subprocess.Popen[bytes] | None] = {"own": None}
        self.asked: list[str] = []

    def start(self, kernel_id: str) -> None:
        """Start a process that looks like a kernel of this server."""
        command = ["sh", "-c", "read line", "ipykernel", "-f", f"kernel-{kernel_id}.json"]
        self.kernels[kernel_id] = subprocess.Popen(command, stdin=subprocess.PIPE)

    def end(self, kernel_id: str) -> None:
        process = self.kernels.pop(kernel_id)
        if process is not None:
            process.communicate()


class FakeAnswers(BaseHTTPRequestHandler):
    server: FakeJupyter

    def do_GET(self) -> None:
        kernels = [{"id": name, "execution_state": "idle"} for name in self.server.kernels]
        sessions = [
            {"id": f"of-{name}", "path": f"week 1/{name}.ipynb", "kernel": {"id": name}}
            for name in self.server.kernels
        ]
        self.tell(kernels if self.path.endswith("/kernels") else sessions)

    def do_DELETE(self) -> None:
        if self.tell(None):
            self.server.end(self.path.rpartition("of-")[2])

    def tell(self, content: Any) -> bool:
        self.server.asked.append(f"{self.command} {self.path}")
        known = self.headers["Authorization"] == f"token {TOKEN}" and self.path.startswith(f"{BASE}api/")
        body = json.dumps(content).encode() if content is not None and known else b""
        self.send_response(403 if not known else 200 if body else 204)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return known

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def jupyter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJupyter]:
    """A server that has started this kernel, and written itself down, for a user with one byte of memory."""
    with FakeJupyter() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        told = {"url": f"http://127.0.0.1:{server.server_port}{BASE}", "token": TOKEN, "pid": os.getpid()}
        (tmp_path / f"jpserver-{os.getpid()}.json").write_text(json.dumps(told))
        monkeypatch.setattr(renderer, "in_kernel", lambda: True)
        monkeypatch.setattr("ipykernel.get_connection_file", lambda: "/run/kernel-own.json")
        monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
        monkeypatch.setenv("JPY_PARENT_PID", str(os.getpid()))
        monkeypatch.setenv("MEM_LIMIT", "1")
        yield server
        for kernel_id in list(server.kernels):
            server.end(kernel_id)
        server.shutdown()


def test_a_kernel_alone_is_told_of_nothing(jupyter: FakeJupyter) -> None:
    assert neighbours.crowding() is None
    assert jupyter.asked, "it has looked"


def test_a_second_kernel_of_the_same_server_is_told_by_the_name_of_its_notebook(jupyter: FakeJupyter) -> None:
    jupyter.start("01_quickstart")
    told = neighbours.crowding()
    assert told is not None and told["id"] == "01_quickstart" and told["name"] == "01_quickstart.ipynb"
    assert told["text"].startswith("01_quickstart.ipynb is open too: its kernel keeps ")


def test_where_there_is_memory_for_both_nothing_is_told(
    jupyter: FakeJupyter, monkeypatch: pytest.MonkeyPatch
) -> None:
    jupyter.start("01_quickstart")
    monkeypatch.setenv("MEM_LIMIT", "")
    monkeypatch.setattr(neighbours, "LIMITS", ())
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"total": 1 << 60}))
    assert neighbours.crowding() is None


def test_a_kernel_on_another_machine_and_one_of_another_users_server_are_no_neighbours(
    jupyter: FakeJupyter,
) -> None:
    jupyter.kernels["elsewhere"] = None  # listed, as behind a gateway, but no process of this server
    command = ["sh", "-c", "read line", "ipykernel", "-f", "kernel-hers.json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as hers:  # a process, but not in this server's list
        assert neighbours.crowding() is None
        with pytest.raises(ValueError, match="no such kernel"):
            neighbours.shut_down("hers")
        assert hers.poll() is None
        hers.communicate()


def test_outside_jupyter_nobody_is_asked(jupyter: FakeJupyter, monkeypatch: pytest.MonkeyPatch) -> None:
    jupyter.start("01_quickstart")
    with monkeypatch.context() as changed:
        changed.setattr(renderer, "in_kernel", lambda: False)
        assert neighbours.crowding() is None
    monkeypatch.setenv("JPY_PARENT_PID", "1")  # a parent that has written no server down: VS Code, nbclient
    assert neighbours.crowding() is None
    assert not jupyter.asked


def test_on_a_hub_the_token_of_the_users_own_server_opens_it(
    jupyter: FakeJupyter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (written,) = tmp_path.glob("jpserver-*.json")
    written.write_text(json.dumps(json.loads(written.read_text()) | {"token": ""}))
    jupyter.start("01_quickstart")
    assert neighbours.crowding() is None, "refused, and so nothing is told"
    with pytest.raises(ValueError, match="The notebook server did not end it"):
        neighbours.shut_down("01_quickstart")
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", TOKEN)
    assert neighbours.crowding() is not None


def test_the_panel_tells_of_it_when_a_page_comes_and_its_button_shuts_it_down(
    jupyter: FakeJupyter, client: FakeClient, wire: Wire
) -> None:
    jupyter.start("01_quickstart")
    wire.mount()
    (status,) = [content for content, _ in wire.sent if content["t"] == "status"]
    assert status["other"]["id"] == "01_quickstart"
    wire.page_says(t="do", do="shutdown", n=1, id="01_quickstart")
    wire.widget.feed.flusher.time += 1
    told = wire.flush()
    (ack,) = [content for content in told if content["t"] == "ack"]
    assert ack["why"] is None and ack["said"].startswith("01_quickstart.ipynb was shut down: ")
    assert [content["other"] for content in told if content["t"] == "status"] == [None]
    assert f"DELETE {BASE}api/sessions/of-01_quickstart" in jupyter.asked and "own" in jupyter.kernels


def test_its_own_kernel_is_shut_down_by_no_message_of_a_page(
    jupyter: FakeJupyter, client: FakeClient, wire: Wire
) -> None:
    wire.mount()
    wire.page_says(t="do", do="shutdown", n=1, id="own")
    (ack,) = wire.flush_kind("ack")
    assert ack["why"] == "There is no such kernel any more."
    assert not [asked for asked in jupyter.asked if asked.startswith("DELETE")]
