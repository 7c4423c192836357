"""Notebooks in a real browser, cell by cell, as a newcomer runs them."""

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from .conftest import Open

pytestmark = pytest.mark.soak
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def code_of(name: str) -> list[str]:
    cells = json.loads((NOTEBOOKS / name).read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_quickstart_runs_and_shows_its_panel(notebook: Open) -> None:
    cells = code_of("01_quickstart.ipynb")
    with notebook(cells) as lab:
        for index in range(len(cells)):
            lab.finish_cell(index)
        lab.wait_until("data.points > 0")
        lab.screenshot("quickstart-light", of=lab.panel)
        assert lab.page.locator(".jp-RenderedText[data-mime-type*='error']").count() == 0


def test_a_conversation_is_seen_where_it_is_trained(notebook: Open) -> None:
    cells = code_of("11_environments.ipynb")
    fast = "import os; os.environ['TENSAFE_NB_FAST'] = '1'"
    with notebook([fast, *cells]) as lab:
        for index in range(len(cells)):  # the last closes the service
            lab.finish_cell(index)
        lab.wait_until("data.points > 0")
        talk = lab.panel.locator(".tsnb-talk").first
        expect(talk.locator(".tsnb-answer")).to_have_count(2)
        expect(talk.locator(".tsnb-told")).to_have_text(re.compile(r"\d\d\+\d\d="))
        talk.scroll_into_view_if_needed()
        lab.screenshot("environments-light", of=lab.panel)
        assert lab.page.locator(".jp-RenderedText[data-mime-type*='error']").count() == 0
