"""The panel in a real marimo in Chromium; marimo lives in `.venv-marimo`, which `make marimo` makes."""

import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from .lab import SCREENSHOTS, WIDTH

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-marimo" / "bin" / "python"
PATIENCE = 60_000  # ms
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not PYTHON.exists(), reason="make marimo makes .venv-marimo"),
]

NOTEBOOK = """
import marimo
app = marimo.App()

@app.cell
def _():
    import tensafe_nb as tn
    service = tn.ServiceClient()
    tc = service.create_training_client(model_ref="builtin:sums", optimizer={"learning_rate": 1e-5})
    return tc, tn

@app.cell
def _(tc, tn):
    run = tc.fit([tn.BatchData([[3, 4, 5, 6]])], steps=100_000)
    run
    return (run,)

@app.cell
def _(tc):
    tc
    return

@app.cell
def _(run, tc, tn):
    import time
    tn.looked = getattr(tn, "looked", 0) + 1
    while len(tc._feed._members) > 2:
        time.sleep(0.05)
    print("looked", tn.looked, "times: two views")
    return
"""
SETTINGS = '[tool.marimo.runtime]\nauto_instantiate = true\n[tool.marimo.display]\ntheme = "{theme}"\n'

Open = Callable[[str], AbstractContextManager[Page]]


@pytest.fixture
def marimo(tmp_path: Path, browser: Browser) -> Open:
    """Return `marimo(theme)`, a context manager that opens a notebook whose cells run by themselves."""

    @contextmanager
    def opened(theme: str) -> Iterator[Page]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        (tmp_path / "app.py").write_text(NOTEBOOK)
        (tmp_path / "pyproject.toml").write_text(SETTINGS.format(theme=theme))
        command = [
            str(PYTHON), "-m", "marimo", "-q", "edit", "app.py", "--headless", "--no-token", "--port", str(port),
            "--skip-update-check",
        ]  # fmt: skip
        own = {"PYTHONPATH": str(ROOT), "TENSAFE_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        with (tmp_path / "marimo.log").open("w") as log:
            server = subprocess.Popen(
                command, cwd=tmp_path, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT
            )
            page = browser.new_page(viewport={"width": WIDTH, "height": 1600})
            page.set_default_timeout(PATIENCE)
            try:
                _wait_for(port, server)
                page.goto(f"http://127.0.0.1:{port}")
                yield page
            finally:
                page.close()
                server.terminate()
                server.wait(20)

    return opened


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("marimo did not start; its log is beside the notebook")


def standing(panels: Locator, state: str) -> None:
    for number in range(2):  # two views of one run
        expect(panels.nth(number)).to_have_attribute("data-state", state, timeout=PATIENCE)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_panel_lives_in_marimo_and_its_buttons_answer(marimo: Open, theme: str) -> None:
    with marimo(theme) as page:
        panels = page.locator(".tsnb-panel")
        expect(panels).to_have_count(2, timeout=PATIENCE)
        standing(panels, "RUNNING")
        for number in range(2):
            expect(panels.nth(number)).to_have_attribute("data-points", re.compile("[1-9]"), timeout=PATIENCE)
        before = panels.first.get_attribute("data-points") or ""
        expect(panels.first).not_to_have_attribute("data-points", before, timeout=PATIENCE)
        panels.first.get_by_role("button", name="Pause", exact=True).click()
        standing(panels, "PAUSED")
        cells = page.locator("[data-cell-id]")
        for number in (2, 3):  # the view that was in the cell is kept by nobody
            cells.nth(number).hover()
            cells.nth(number).get_by_test_id("run-button").first.click()
        expect(page.get_by_text("looked 2 times: two views")).to_be_visible(timeout=PATIENCE)
        standing(panels, "PAUSED")
        page.locator("details > summary").nth(1).click()
        expect(page.get_by_role("img", name="PAUSED at step").first).to_be_visible()
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"marimo-{theme}.png", full_page=True)
        panels.nth(1).get_by_role("button", name="Stop", exact=True).click()
        standing(panels, "STOPPED")
