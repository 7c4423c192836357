"""Where people open notebooks besides JupyterLab: Notebook 7, nbclassic, papermill, nbconvert. `make places`."""

import json
import os
import secrets
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError

import nbformat
import pytest
from playwright.sync_api import Browser, Page, expect

from .conftest import _environment
from .lab import SCREENS, WIDTH, Server

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "notebooks/01_quickstart.ipynb"
BORROWED = Path(pytest.__file__).parents[
    4
]  # the environment whose packages this one borrows: it has the widgets' code
PATIENCE = 120_000  # ms
CELLS = [
    "import tensafe_nb as tn\nservice = tn.ServiceClient()\n"
    "tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2), batch_size=2)",
    "run = tc.fit([{'input_ids': [[5, 6, 7, 8]]}] * 5)",
    "await run",
    "answer = 128 * 8 + 8 * 128\ntn.check('01.1', answer)",
]
RUN_ALL = {
    "notebook": "void jupyterapp.commands.execute('notebook:run-all-cells')",
    "nbclassic": "Jupyter.notebook.execute_all_cells()",
}
FOLDER = {
    "notebook": "notebooks",
    "nbclassic": "nbclassic/notebooks",
}  # of its pages, where both are installed
OF_LAB = "window.jupyterapp?.shell.currentWidget?.context?.sessionContext?.session?.kernel"
READY = {
    "notebook": f"() => {OF_LAB}?.status === 'idle'",
    "nbclassic": "() => window.Jupyter?.notebook?.kernel?.is_connected() && Jupyter.notebook._fully_loaded",
}
pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (find_spec("nbclassic") and find_spec("papermill")), reason="make places has them"
    ),
]


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a program here: what is installed beside the borrowed packages is found there."""
    shared = {
        "JUPYTER_PATH": str(BORROWED / "share/jupyter"),
        "JUPYTER_CONFIG_PATH": str(BORROWED / "etc/jupyter"),
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
    }
    return _environment(folder) | shared | {"PYTHONPATH": str(ROOT)}


@contextmanager
def served(kind: str, folder: Path) -> Iterator[Server]:
    """Run a server of a kind, with folders of its own."""
    (folder / "notebooks").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    command = [
        sys.executable, "-m", kind, "--no-browser", "--allow-root", f"--ServerApp.port={port}",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder / 'notebooks'}",
    ]  # fmt: skip
    command += ["--JupyterNotebookApp.expose_app_in_browser=True"] if kind == "notebook" else []
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment(folder), stdout=log, stderr=log)
        server = Server(f"http://127.0.0.1:{port}", token, folder / "notebooks")
        try:
            while process.poll() is None:
                with suppress(URLError):
                    server.api("status")
                    break
                time.sleep(0.1)
            assert process.poll() is None, (folder / "log").read_text()
            yield server
        finally:
            with suppress(OSError):
                server.end_kernels()
            process.terminate()
            process.wait(30)


@contextmanager
def opened(browser: Browser, kind: str, server: Server) -> Iterator[Page]:
    """Open a notebook in a page that fetches nothing from anywhere else, and wait until its kernel is there."""
    server.write_notebook("lesson.ipynb", CELLS)
    context = browser.new_context(viewport={"width": WIDTH, "height": 1400})
    page, elsewhere = context.new_page(), []
    page.set_default_timeout(PATIENCE)
    page.on(
        "request", lambda request: elsewhere.append(request.url) if "127.0.0.1" not in request.url else None
    )
    page.goto(f"{server.url}/{FOLDER[kind]}/lesson.ipynb?token={server.token}")
    page.wait_for_function(READY[kind])
    try:
        yield page
        assert not [url for url in elsewhere if url.startswith("http")]
    finally:
        context.close()


@pytest.mark.parametrize("kind", ["notebook", "nbclassic"])
def test_the_panel_moves_to_its_end_and_an_exercise_says_right(
    browser: Browser, kind: str, tmp_path: Path
) -> None:
    with served(kind, tmp_path) as server, opened(browser, kind, server) as page:
        page.evaluate(RUN_ALL[kind])
        panel = page.locator(".tsnb-panel").first
        expect(panel).to_have_attribute("data-state", "FINISHED", timeout=PATIENCE)
        expect(panel).to_have_attribute("data-points", "5")
        expect(page.get_by_text("01.1 right").first).to_be_visible()
        if kind == "nbclassic":  # it puts the picture's last renewal in the place of the panel
            expect(page.get_by_text("FINISHED at step 5 of 5").first).to_be_visible()
        else:
            panel.locator("[data-do=checkpoint]").click()
            expect(panel).to_have_attribute("data-acked", "1")
        SCREENS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENS / f"place-{kind}.png")


def run(*command: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4_000:]


def test_papermill_runs_a_notebook_to_its_end_and_the_file_holds_picture_and_table(tmp_path: Path) -> None:
    run("papermill", str(QUICKSTART), "out.ipynb", "-k", "python3", "--no-progress-bar", folder=tmp_path)
    notebook = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "FINISHED" in json.dumps(outputs) and "RUNNING at step" not in json.dumps(outputs)
    said = [output["data"]["text/plain"] for output in outputs if output.output_type == "execute_result"]
    assert sum("not answered" in text for text in said) == 3, "exercises that nobody answers stop nothing"


def test_nbconvert_executes_a_notebook_and_its_page_has_the_picture(tmp_path: Path) -> None:
    command = ("nbconvert", "--execute", "--to", "html", str(QUICKSTART), "--output-dir", str(tmp_path))
    run(*command, folder=tmp_path)
    page = (tmp_path / "01_quickstart.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and "FINISHED" in page
    assert "Traceback" not in page
