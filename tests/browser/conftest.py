"""One JupyterLab server for all scenarios, on loopback, with folders of its own; one fresh page for each."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from urllib.error import URLError

import pytest
from playwright.sync_api import Browser, sync_playwright

from .lab import Lab, Server, opened

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
START_SECONDS = 60

Open = Callable[..., AbstractContextManager[Lab]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.browser)
            if CHROMIUM is None:
                item.add_marker(
                    pytest.mark.skip(reason="Chromium is not installed: apt-get install chromium")
                )


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("lab")
    notebooks = root / "notebooks"
    notebooks.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={notebooks}",
        "--allow-root", "--LabApp.expose_app_in_browser=True",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    with (root / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=_environment(root), stdout=log, stderr=subprocess.STDOUT)
        server = Server(f"http://127.0.0.1:{port}", token, notebooks)
        try:
            _wait_for(server, process, root / "server.log")
            yield server
        finally:
            _end(server, process)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def notebook(browser: Browser, server: Server, request: pytest.FixtureRequest) -> Open:
    """Return `notebook(cells)`, a context manager that opens a notebook with these cells."""

    def open_notebook(
        cells: Sequence[str], scale: float = 1, kernel: str = "python3"
    ) -> AbstractContextManager[Lab]:
        return opened(browser, server, request.node.name, cells, scale, kernel)

    return open_notebook


def _environment(root: Path) -> dict[str, str]:
    """Return an environment in which nothing of the user's is read or written."""
    settings = root / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False})
    )
    folders = {
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython", "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "TENSAFE_HOME": "home", "MPLCONFIGDIR": "matplotlib",
    }  # fmt: skip
    own = {name: str(root / folder) for name, folder in folders.items()}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "TENSAFE"))}
    return kept | own | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _end(server: Server, process: subprocess.Popen[bytes]) -> None:
    with suppress(OSError):
        server.end_kernels()
        server.api("shutdown", "POST")
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_for(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            server.api("status")
        except URLError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")
