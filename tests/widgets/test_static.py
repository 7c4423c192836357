"""The page's code: small, joined without a build, and correct where it is pure."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tensafe_nb.widgets.base import STATIC, css, esm
from tensafe_nb.widgets.curve import LossCurve
from tensafe_nb.widgets.dashboard import Dashboard

HERE = Path(__file__).parent
NODE = shutil.which("node")
SCRIPTS = sorted(STATIC.glob("*.js"))
TOP_LEVEL = re.compile(r"^(?:export )?(?:async )?(?:class|function|const|let) (\w+)", re.MULTILINE)
needs_node = pytest.mark.skipif(NODE is None, reason="Node.js is not installed: apt-get install nodejs")


def test_code_and_styles_keep_within_their_budgets() -> None:
    assert len(Dashboard._esm.encode()) <= 40_000
    assert len(LossCurve._esm.encode()) <= 25_000
    assert len(css("panel").encode()) <= 8_000


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_imports_and_exports_stand_on_lines_of_their_own(script: Path) -> None:
    lines = script.read_text().splitlines()
    for line in lines:
        if line.startswith("import"):
            assert re.fullmatch(r'import \{ [\w, ]+ \} from "\./\w+\.js";', line), line
        if line.startswith("export") and not line.startswith("export default"):
            assert re.fullmatch(r"export \{ [\w, ]+ \};", line), line


def test_joined_files_share_no_name() -> None:
    for last in ("panel", "curve"):
        names = TOP_LEVEL.findall(esm("wire", "chart", last))
        assert len(names) == len(set(names))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_text_enters_the_page_as_text_only_and_nothing_comes_from_the_network(script: Path) -> None:
    source = script.read_text().replace("http://www.w3.org/2000/svg", "")
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "fetch(",
        "http:",
        "https:",
    ):
        assert word not in source


def test_class_names_and_styles_are_our_own() -> None:
    rules = re.sub(r"/\*.*?\*/|\{[^{}]*\}", "", css("panel"), flags=re.DOTALL)
    for selector in re.split(r"[,{}\n]", rules):
        if selector.strip() and not selector.strip().startswith(("@", "50%")):
            assert "tsnb-" in selector or selector.strip().startswith("[data-"), selector


@needs_node
@pytest.mark.parametrize("last", ["panel", "curve"])
def test_the_joined_module_is_valid(tmp_path: Path, last: str) -> None:
    joined = tmp_path / f"{last}.mjs"
    joined.write_text(esm("wire", "chart", last))
    subprocess.run([str(NODE), "--check", str(joined)], check=True)


@needs_node
def test_the_pure_parts_pass_their_own_tests() -> None:
    tests = [str(path) for path in sorted((HERE / "js").glob("*.test.mjs"))]
    assert tests
    done = subprocess.run([str(NODE), "--test", *tests], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
