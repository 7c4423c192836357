"""The states of a line to a server in a real browser: broken off, there again, lost; and two clients at its end."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from playwright.sync_api import expect

from .conftest import Open
from .test_states import NO_PROBLEM, START, agree, see, told

pytestmark = pytest.mark.soak

STEPS = 4_000


class Gate:
    """A line to a server that can be cut, and opened again at the same address.

    Args:
        port: Of the server.
    """

    def __init__(self, port: int) -> None:
        self._target, self._lines = port, list[socket.socket]()
        self.port = 0
        self.open()

    def open(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listening,), daemon=True).start()

    def cut(self) -> None:
        for line in (self._listening, *self._lines):
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()
        self._lines.clear()

    def _accept(self, listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listening.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._lines += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    @staticmethod
    def _pass_on(one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        for line in (one, other):
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Gate, str]]:
    """Run `tensafe-nb serve` as a process; return the line to it, and a token."""
    import json

    command = [sys.executable, "-m", "tensafe_nb.cli", "serve", "--port", "0", "--json", "--print-token"]
    with subprocess.Popen(
        [*command, "--home", str(tmp_path / "server")], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        found = json.loads(server.stdout.readline())
        gate = Gate(int(found["url"].rsplit(":", 1)[1]))
        yield gate, found["token"]
        gate.cut()
        server.terminate()


def test_a_line_that_breaks_off_is_there_again_or_is_lost_and_the_panel_says_which(
    notebook: Open, served: tuple[Gate, str]
) -> None:
    gate, token = served
    where = {"TENSAFE_BASE_URL": f"http://127.0.0.1:{gate.port}", "TENSAFE_API_KEY": token}
    cells = [
        f"import os\nos.environ |= {where!r}\n"
        + START.replace("ServiceClient()", "ServiceClient(patience=15)")
        + "tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2)); await tc.ready();",
        f"run = tc.fit(batches * 100, steps={STEPS})",
        "twin = tn.ServiceClient().get_training_client(tc.training_client_id)\ntwin",
        "twin.fit(batches, steps=3)",
        "facts(tc, run)",
    ]
    with notebook(cells) as lab:
        lab.finish_cell(0)
        lab.finish_cell(1)
        lab.wait_until("data.state === 'RUNNING' && data.points > 10")
        lab.finish_cell(2)
        twin = lab.output(2).locator(".tsnb-panel")
        expect(twin).to_have_attribute("data-state", "RUNNING")
        expect(twin.locator(".tsnb-fresh")).to_contain_text("driven by another client")
        expect(twin.get_by_role("button", name="Checkpoint", exact=True)).to_be_visible()
        expect(twin.get_by_role("button", name="Pause", exact=True)).to_have_count(0)
        see(lab, "remote-another-clients-run", twin)
        lab.finish_cell(3)
        expect(lab.output(3)).to_contain_text("of another client of")
        gate.cut()
        lab.wait_until("data.doubt === 'RECONNECTING'")
        expect(lab.panel).not_to_contain_text(NO_PROBLEM)
        expect(lab.panel.locator(".tsnb-note").first).to_contain_text("does not answer")
        see(lab, "remote-reconnecting")
        before = int(lab.value("points"))
        gate.open()
        lab.wait_until(f"data.doubt === '' && data.state === 'RUNNING' && data.points > {before}")
        expect(lab.panel).to_contain_text(NO_PROBLEM)
        lab.press("Pause")
        lab.wait_until("data.state === 'PAUSED'")
        agree(lab, told(lab, 4))
        expect(twin).to_have_attribute("data-state", "PAUSED")
        expect(twin).to_have_attribute("data-step", lab.value("step"))
        gate.cut()
        lab.wait_until("data.doubt === 'LOST'")
        expect(lab.panel).not_to_contain_text(NO_PROBLEM)
        expect(lab.panel.locator(".tsnb-badge")).to_contain_text("last heard: PAUSED")
        see(lab, "remote-lost")
