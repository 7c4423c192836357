"""The README's own code runs, and what it points to exists."""

import re
from pathlib import Path

import pytest

import tensafe_nb as tn

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_readmes_code_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {})
    assert re.search(r"\d", capsys.readouterr().out)


def test_the_readme_has_an_example() -> None:
    assert BLOCKS


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([\w./-]+)\)|srcset=\"([^\"]+)\"|src=\"([^\"]+)\"", README):
        path = next(filter(None, target))
        if not path.startswith("http"):
            assert (ROOT / path).exists(), path


def test_the_commands_of_the_readme_are_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for verb in re.findall(r"make ([a-z-]+)", README):
        assert f"\n{verb}:" in makefile, verb


def test_the_version_is_the_same_everywhere() -> None:
    assert f'version = "{tn.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {tn.__version__}" in (ROOT / "CHANGELOG.md").read_text()
