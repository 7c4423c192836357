"""Notebooks in a real browser against a real server: unchanged, but for where the core is."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Open

pytestmark = pytest.mark.soak
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.fixture
def where(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Run `tensafe-nb serve` as a process; what a kernel's environment says of it."""
    command = [sys.executable, "-m", "tensafe_nb.cli", "serve", "--port", "0", "--json", "--print-token"]
    with subprocess.Popen(
        [*command, "--home", str(tmp_path / "server")], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        found = json.loads(server.stdout.readline())
        yield {"TENSAFE_BASE_URL": found["url"], "TENSAFE_API_KEY": found["token"], "TENSAFE_NB_FAST": "1"}
        server.terminate()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["01_quickstart", "05_rlvr", "07_differential_privacy"])
def test_a_notebook_runs_against_a_server_and_shows_its_panel(
    notebook: Open, where: dict[str, str], name: str
) -> None:
    cells = [
        "".join(cell["source"])
        for cell in json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    environment = f"import os\nos.environ |= {where!r}"
    with notebook([environment, *cells]) as lab:
        for index in range(len(cells) + 1):
            lab.finish_cell(index)
            lab.page.wait_for_timeout(200)
        lab.panel.scroll_into_view_if_needed()
        lab.screenshot(f"remote-{name}")
        assert lab.page.locator(".jp-RenderedText[data-mime-type*='error']").count() == 0
