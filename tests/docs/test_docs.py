"""The README's own code runs, and what it points to exists."""

import re
from pathlib import Path

import pytest

import tensafe_nb as tn

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MARKDOWN = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_readmes_code_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {})
    assert re.search(r"\d", capsys.readouterr().out)


def test_the_readme_has_an_example() -> None:
    assert BLOCKS


def test_the_readme_shows_the_product_and_the_command_before_anything_else() -> None:
    lines = README.splitlines()
    first = "\n".join(lines[:30])
    assert "docs/images/panel-light.png" in first
    assert {"make demo", "make test"} <= set(re.findall(r"^make \w+", first, flags=re.MULTILINE))
    assert sum(line.startswith("|") for line in lines) <= 15, "tables belong into docs/benchmarks.md"
    assert "OWNER" not in README and "badge" not in "".join(re.findall(r"!\[[^]]*\]\([^)]*\)", README))


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_holds_what_a_merge_has_left(page: Path) -> None:
    assert not re.search(r"^(<{7}|>{7}) ", page.read_text(), flags=re.MULTILINE)


def without_code(page: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", page, flags=re.DOTALL | re.MULTILINE)


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub and our site give to the headings of a page."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page, flags=re.S | re.M), flags=re.MULTILINE
    )
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = without_code(page.read_text(encoding="utf-8"))
    for found in re.findall(r"\]\(([^)\s]+)\)|srcset=\"([^\"]+)\"|src=\"([^\"]+)\"", text):
        target = "".join(found)
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path) if path else page
        assert place.exists(), target
        if anchor:
            assert anchor in anchors(place.read_text(encoding="utf-8")), target


def test_pages_that_code_and_texts_name_are_there() -> None:
    texts = [*MARKDOWN, ROOT / "mkdocs.yml", ROOT / "pyproject.toml", ROOT / "Makefile"]
    for folder in ("tensafe_nb", "tests", "scripts", "bench"):
        texts += (ROOT / folder).rglob("*.py")
    for path in [*texts, *(ROOT / "notebooks").glob("*.ipynb")]:
        for named in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text(encoding="utf-8")):
            assert (ROOT / named).exists(), f"{path.relative_to(ROOT)} names {named}"


def test_every_notebook_is_in_the_tutorial() -> None:
    linked = re.findall(
        r"\(\.\./\.\./notebooks/(\w+)\.ipynb\)", (ROOT / "docs/tutorial/index.md").read_text()
    )
    assert linked == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def test_the_commands_of_the_readme_are_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for verb in re.findall(r"make ([a-z-]+)", README):
        assert f"\n{verb}:" in makefile, verb


def test_the_table_of_how_tokens_are_drawn_has_every_field_with_its_default() -> None:
    section = (ROOT / "docs/how-to/training.md").read_text().split("### What SamplingConfig takes\n")[1]
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", section.split("\n### ")[0], flags=re.MULTILINE)
    assert rows == [(name, repr(field.default)) for name, field in tn.SamplingConfig.model_fields.items()]


def test_the_version_is_the_same_everywhere() -> None:
    assert f'version = "{tn.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {tn.__version__}" in (ROOT / "CHANGELOG.md").read_text()
