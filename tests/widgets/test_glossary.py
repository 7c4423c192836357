"""The labels of the panel and the lines of the glossary: one text, for notebooks, pages and panel."""

import json
import re
from pathlib import Path

from tensafe_nb.widgets.feed.feed import Feed
from tensafe_nb.widgets.glossary import LABELS, explained, glossary
from tensafe_nb.widgets.live.sections import PrivacyMeter

from .conftest import FakeClient, Wire

ROOT = Path(__file__).parents[2]


def test_every_label_with_a_line_is_one_of_the_panels() -> None:
    code = "".join(path.read_text() for path in (ROOT / "tensafe_nb/widgets/static").glob("*.js"))
    for label in LABELS:
        assert f'"{label}"' in code or label == "eval/loss" or label == "eval/reward", label


def test_every_row_of_the_glossary_is_read_and_every_word_that_the_panel_needs_is_in_it() -> None:
    rows = re.findall(r"^\| ", (ROOT / "notebooks/glossary.md").read_text(), flags=re.MULTILINE)
    assert len(glossary()) == len(rows) - 1  # its head
    assert explained().keys() == LABELS.keys()


def test_a_page_is_told_the_words_when_it_says_hello_and_not_again(client: FakeClient, wire: Wire) -> None:
    wire.mount()
    (told,) = [content for content, _ in wire.sent if content["t"] == "words"]
    assert told["words"]["entropy"].startswith("entropy: how undecided")
    client.measure(loss=1.0)
    assert not wire.flush_kind("words")


def test_a_part_that_stands_alone_is_told_them_too(feed: Feed) -> None:
    wire = Wire(PrivacyMeter(feed))
    wire.mount()
    assert [content["words"]["ε"] for content, _ in wire.sent if content["t"] == "words"]
    wire.widget.close()


def test_every_notebook_links_the_glossary_that_lies_beside_it() -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        assert any("(glossary.md)" in "".join(cell["source"]) for cell in cells), path.name
