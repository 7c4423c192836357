"""The built site as it is read: opened from the disk, without a server and without a network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.lab import PATIENCE

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=True)
    return folder


def test_the_search_of_a_page_that_was_opened_from_the_disk_finds_and_leads(
    browser: Browser, site: Path
) -> None:
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on(
        "request", lambda request: problems.append(request.url) if request.url.startswith("http") else None
    )
    page.goto((site / "how-to" / "training.html").as_uri())
    page.get_by_role("textbox", name="Search").fill("presets papers")
    first = page.locator(".md-search-result__link").first
    expect(first).to_contain_text("Presets and papers", timeout=PATIENCE)  # the index is read first
    first.click()
    expect(page).to_have_url((site / "explanation" / "presets.html").as_uri())
    expect(page.get_by_role("heading", level=1)).to_contain_text("Presets and papers")
    assert problems == []
    page.close()


def test_no_page_is_wider_than_a_phone_and_none_asks_the_network(browser: Browser, site: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if request.url.startswith("http") else None)
    for path in sorted(site.rglob("*.html")):
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path.name
    assert asked == []
    page.close()
