"""The quickstart in a real browser, cell by cell, as a newcomer runs it."""

import json
from pathlib import Path

import pytest

from .conftest import Open

pytestmark = pytest.mark.soak
QUICKSTART = Path(__file__).parents[2] / "notebooks" / "01_quickstart.ipynb"


def test_the_quickstart_runs_and_shows_its_panel(notebook: Open) -> None:
    cells = [
        "".join(cell["source"])
        for cell in json.loads(QUICKSTART.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    with notebook(cells) as lab:
        for index in range(len(cells)):
            lab.finish_cell(index)
        lab.wait_until("data.points > 0")
        lab.screenshot("quickstart-light", of=lab.panel)
        assert lab.page.locator(".jp-RenderedText[data-mime-type*='error']").count() == 0
