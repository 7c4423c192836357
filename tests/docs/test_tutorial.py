"""A notebook becomes a page: its texts, its cells, and below each cell what it printed and showed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

from scripts import tutorial

PIXEL = "iVBORw0KGgo="


def code(*outputs: Any) -> Any:
    return nbformat.v4.new_code_cell("look()", outputs=list(outputs))


def shows(**data: str) -> Any:
    kinds = {kind.replace("_", "/", 1): value for kind, value in data.items()}
    return nbformat.v4.new_output("display_data", kinds)


def prints(text: str, name: str = "stdout") -> Any:
    return nbformat.v4.new_output("stream", text=text, name=name)


@pytest.fixture
def notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A notebook that was run, beside what it was before."""
    for name in ("NOTEBOOKS", "RAN"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(tutorial, name, tmp_path / name)
    page = nbformat.v4.new_notebook()
    head = "# 1 · First: a model\n\nSee [2](02_second.ipynb) and [losses](../docs/how-to/losses.md)."
    page.cells = [nbformat.v4.new_markdown_cell(head), code(), code()]
    nbformat.write(page, tmp_path / "NOTEBOOKS" / "01_first.ipynb")
    page.cells[1].outputs = [
        prints("a < b\n"),
        prints("c\n"),
        prints("careful\n", "stderr"),
        shows(text_plain="<p>"),
    ]
    page.cells[2].outputs = [shows(text_html="<div class='place'></div>", text_plain="")]
    nbformat.write(page, tmp_path / "RAN" / "01_first.ipynb")
    return tmp_path / "NOTEBOOKS" / "01_first.ipynb"


def content(notebook: Path) -> str:
    page = SimpleNamespace(file=SimpleNamespace(src_uri=f"tutorial/{notebook.stem}.md"))
    return tutorial.on_page_content(tutorial.page_of(notebook), page)


def test_outputs_stand_below_their_cells_as_text_and_what_shows_nothing_is_left_out(notebook: Path) -> None:
    page = content(notebook)
    assert page.count('<div class="nb-out">') == 1
    assert (
        '<pre class="stdout">a &lt; b\nc</pre>\n<pre class="stderr">careful</pre>\n<pre>&lt;p&gt;</pre>'
        in page
    )


def test_links_between_notebooks_and_to_pages_lead_to_pages(notebook: Path) -> None:
    assert "[2](02_second.md) and [losses](../how-to/losses.md)" in content(notebook)
    links = tutorial.on_page_markdown(
        "[1](../../notebooks/01_first.ipynb)", SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    )
    assert links == "[1](tutorial/01_first.md)"


def test_a_notebook_that_was_not_run_says_so(notebook: Path) -> None:
    (tutorial.RAN / notebook.name).unlink()
    assert "`make docs` runs it first" in content(notebook) and "nb-out" not in content(notebook)


def test_a_picture_is_shown_rather_than_its_name_and_a_widgets_picture_rather_than_the_widget() -> None:
    picture = shows(image_png=PIXEL, text_plain='a "curve"')
    assert tutorial.as_html(picture) == f'<img alt="a &quot;curve&quot;" src="data:image/png;base64,{PIXEL}">'
    widget = shows(
        **{"application_vnd.jupyter.widget-view+json": "{}"}, text_html="<p>RUNNING</p>", text_plain="…"
    )
    assert tutorial.as_html(widget) == "<p>RUNNING</p>"


def test_a_panel_is_a_replay_where_one_was_saved(notebook: Path) -> None:
    said = "Live panel of run 2 of tc-1: open in Jupyter"
    panel = shows(
        **{"application_vnd.jupyter.widget-view+json": "{}"}, text_html=f"<p>{said}</p>", text_plain=said
    )
    assert tutorial.shown(code(panel), "01_first") == f'<div class="nb-out">\n<p>{said}</p>\n</div>'
    (tutorial.RAN / "01_first-tc-1-2.html").touch()
    assert '<iframe src="01_first-tc-1-2.html"' in tutorial.shown(code(panel), "01_first")


def test_what_a_notebook_was_made_of_changes_with_it(notebook: Path) -> None:
    before = tutorial.made_of(notebook)
    assert not tutorial.up_to_date(notebook), "nothing says what it was made of"
    notebook.write_text(notebook.read_text() + "\n")
    assert tutorial.made_of(notebook) != before
