"""Markup in whatever can hold a text: the page that nbconvert makes of a notebook shows it as text."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.markup import SHOWN, WORLD

MARK = "window.fired"


class Page(HTMLParser):
    """Notes every element that would do what the markup says, and counts where it is shown."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.in_force: list[str] = []
        self.shown = 0
        self._script = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if any(name.startswith("on") or MARK in (value or "") for name, value in attrs if name != "alt"):
            self.in_force.append(f"<{tag} {values}>")
        if tag in ("img", "iframe") and not (values.get("src") or "").startswith("data:image/png"):
            self.in_force.append(f"<{tag} {values}>")
        self._script = (values.get("type") or "code") if tag == "script" else ""

    def handle_endtag(self, tag: str) -> None:
        self._script = ""

    def handle_data(self, data: str) -> None:
        if MARK not in data:
            return
        if self._script and "json" not in self._script:  # the state of widgets is data; a `</script>` in it would end it
            self.in_force.append(f"<script>{data[:200]}")
        self.shown += data.count("<img src=x")


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_markup_in_every_field_is_text_in_the_page_that_nbconvert_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import HTMLExporter

    monkeypatch.setenv("TENSAFE_NB_RENDERER", "widget")
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in (WORLD, *SHOWN)]
    NotebookClient(notebook, timeout=240, kernel_name="python3", store_widget_state=True).execute(cwd=str(tmp_path))
    for cell in notebook.cells:
        cell.source = ""  # what the person typed is theirs; the outputs are what is looked at
    body, _ = HTMLExporter().from_notebook_node(notebook)
    page = Page()
    page.feed(body)
    assert page.in_force == []
    assert page.shown > 20, "it is there to be seen, as text"


def test_the_page_reader_finds_what_comes_into_force() -> None:
    page = Page()
    page.feed("<p><img src=x onerror=window.fired=1></p><script>window.fired=2</script><a href='javascript:window.fired'>")
    assert len(page.in_force) == 4
