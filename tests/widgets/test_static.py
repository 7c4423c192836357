"""The page's code: small, joined without a build, and correct where it is pure."""

import gzip
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tensafe_nb import widgets
from tensafe_nb.widgets.live.base import STATIC, css

HERE = Path(__file__).parent
NODE = shutil.which("node")
SCRIPTS = sorted(STATIC.glob("*.js"))
BUDGETS = {  # bytes of code that travel with a widget, comments and indentation left behind
    "Dashboard": 87_000,
    "ComparisonChart": 48_000,
    "LossCurve": 51_000,
    "RewardHistory": 51_000,
    "CheckpointTable": 25_000,
    "RolloutInspector": 31_000,
    "PrivacyMeter": 25_000,
    "ChatPanel": 29_500,
}
ENTRIES = {"curve.js", "rewards.js", "checkpoints.js", "inspector.js", "privacy.js"}
TOP_LEVEL = re.compile(r"^(?:export )?(?:async )?(?:class|function|const|let) (\w+)", re.MULTILINE)
needs_node = pytest.mark.skipif(NODE is None, reason="Node.js is not installed: apt-get install nodejs")


def code(name: str) -> str:
    return str(getattr(widgets, name)._esm)


@pytest.mark.parametrize("name", BUDGETS)
def test_code_keeps_within_its_budget(name: str) -> None:
    assert len(code(name).encode()) <= BUDGETS[name]


def test_styles_keep_within_their_budget() -> None:
    assert len(css("panel").encode()) <= 15_500
    assert len(css("chat").encode()) <= 6_000


def test_the_panel_takes_less_than_forty_kilobytes_of_a_line_that_compresses() -> None:
    assert len(gzip.compress((code("Dashboard") + css("panel")).encode())) <= 40_000


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_imports_and_exports_stand_on_lines_of_their_own(script: Path) -> None:
    lines = script.read_text().splitlines()
    for line in lines:
        if line.startswith("import"):
            assert re.fullmatch(r'import \{ [\w, ]+ \} from "\./\w+\.js";', line), line
        if line.startswith("export") and not line.startswith("export default"):
            assert re.fullmatch(r"export \{ [\w, ]+ \};", line), line


def test_joined_files_share_no_name() -> None:
    names = [
        name
        for script in SCRIPTS
        if script.name not in ENTRIES
        for name in TOP_LEVEL.findall(script.read_text())
    ]
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


@pytest.mark.parametrize("sheet", ["panel", "chat"])
def test_class_names_and_styles_are_our_own(sheet: str) -> None:
    rules = re.sub(r"/\*.*?\*/|\{[^{}]*\}", "", css(sheet), flags=re.DOTALL)
    for selector in re.split(r"[,{}\n]", rules):
        if selector.strip() and not selector.strip().startswith(("@", "50%")):
            assert "tsnb-" in selector or selector.strip().startswith("[data-"), selector


@needs_node
@pytest.mark.parametrize("name", BUDGETS)
def test_the_joined_module_is_valid(tmp_path: Path, name: str) -> None:
    joined = tmp_path / f"{name}.mjs"
    joined.write_text(code(name))
    subprocess.run([str(NODE), "--check", str(joined)], check=True)


@needs_node
def test_the_pure_parts_pass_their_own_tests() -> None:
    tests = [str(path) for path in sorted((HERE / "js").glob("*.test.mjs"))]
    assert tests
    done = subprocess.run([str(NODE), "--test", *tests], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
