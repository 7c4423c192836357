"""The code of our own pages runs, in order, as a reader would run it; and the reference names every public name."""

import ast
import asyncio
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.cli import main as cli

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r'^```(\w*)(?: title="([\w.]+)")?\n(.*?)^```', flags=re.DOTALL | re.MULTILINE)
LONG = ("cluster", "comparing", "small-programs")  # some 10 s each: `make soak` runs them
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "```python" in page.read_text(encoding="utf-8")]


async def run_page(page: Path, blocks: list[tuple[str, str, str]], names: dict[str, Any]) -> None:
    """Run the blocks of a page in one namespace, inside a running loop, as in a notebook."""
    for language, title, text in blocks:
        if title or language == "sh":
            write_or_run(title, text)
        elif language != "text":  # which is what a reader sees
            assert language == "python", (
                f"{page.name}: a block of {language or 'no language'}, which nothing runs"
            )
            code = compile(text, page.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            result = eval(code, names)
            if inspect.iscoroutine(result):
                await result


def write_or_run(title: str, text: str) -> None:
    if title:
        Path(title).write_text(text, encoding="utf-8")
        return
    command, *arguments = shlex.split(text)
    if command == "curl":  # of a page that has started a server
        print(
            subprocess.run(
                ["sh", "-c", text], check=True, env=dict(os.environ), capture_output=True, text=True
            ).stdout
        )
        return
    assert command == "tensafe-nb"
    assert cli.main(arguments) == 0


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.soak if page.stem in LONG else ()) for page in PAGES],
    ids=lambda page: str(page.relative_to(DOCS)),
)
def test_the_code_of_a_page_runs_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(os, "environ", os.environ.copy())
    names: dict[str, Any] = {"__name__": "page"}
    try:
        asyncio.run(run_page(page, FENCE.findall(page.read_text(encoding="utf-8")), names))
    finally:
        for value in names.values():
            if isinstance(value, tn.ServiceClient):
                value.close()
    assert re.search(r"\d", capsys.readouterr().out)


def test_the_small_programs_have_twelve_lines_at_most() -> None:
    page = (DOCS / "how-to" / "small-programs.md").read_text(encoding="utf-8")
    programs = [text for language, _, text in FENCE.findall(page) if language == "python"]
    assert len(programs) == 3
    for program in programs:
        assert len([line for line in program.splitlines() if line.strip()]) <= 12, program


def test_every_public_name_is_in_the_reference() -> None:
    pages = (page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    reference = {name for page in pages for name in re.findall(r"^::: ([\w.]+)$", page, flags=re.MULTILINE)}
    for name in tn.__all__:
        value = getattr(tn, name)
        home = getattr(value, "__module__", "")
        if name != "__version__":
            assert f"tensafe_nb.{name}" in reference or home in reference, name


@pytest.mark.soak  # links and references are looked at in `test_docs`
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=DOCS.parent, env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        assert not re.search(r'(?:src|rel="stylesheet" href)="https?://', page.read_text(encoding="utf-8")), (
            page
        )
