"""What must hold of the package as a whole."""

import ast
import inspect
import pickle
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import tensafe_nb as tn
from tensafe_nb import errors

PACKAGE = Path(tn.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
ERRORS = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)
]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_loads_nothing_heavy_and_starts_no_thread() -> None:
    code = """
import sys, threading, tensafe_nb
heavy = {"torch", "transformers", "peft", "opacus", "tenseal", "anywidget", "matplotlib", "IPython", "numpy"}
print(sorted(heavy & set(sys.modules)), threading.active_count())
"""
    assert run(code).strip() == "[] 1"


def test_the_thin_side_runs_where_torch_cannot_be_imported() -> None:
    code = """
import sys
sys.modules["torch"] = None
import tensafe_nb.client, tensafe_nb.rlvr, tensafe_nb.widgets, tensafe_nb.data, tensafe_nb.runs.run
import tensafe_nb.cli.main, tensafe_nb.recipes.recipe, tensafe_nb.compat
print("fine")
"""
    assert run(code).strip() == "fine"


def test_every_public_name_exists_and_is_documented() -> None:
    for name in tn.__all__:
        value = getattr(tn, name)
        assert name in dir(tn)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name


@pytest.mark.parametrize(
    "cls", [tn.ServiceClient, tn.TrainingClient, tn.FutureHandle, tn.TrainingRun, tn.BatchData]
)
def test_every_public_method_is_documented(cls: type) -> None:
    for name, member in vars(cls).items():
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            assert inspect.getdoc(member), f"{cls.__name__}.{name}"


@pytest.mark.parametrize("cls", ERRORS)
def test_errors_pickle_and_are_of_one_family(cls: type[errors.TGTinkerError]) -> None:
    error = cls("what, where, what next", details={"step": 3}, request_id="fut-1")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.code, again.details, again.request_id) == (
        cls, "what, where, what next", cls.code, {"step": 3}, "fut-1",
    )  # fmt: skip
    assert issubclass(cls, errors.TGTinkerError)
    assert not hasattr(__builtins__, cls.__name__)


def test_the_error_tree_in_the_docstring_names_every_error() -> None:
    for cls in ERRORS:
        assert cls.__name__ in (errors.__doc__ or ""), cls


def test_a_class_name_has_one_definition() -> None:
    classes = Counter(
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in classes.items() if count > 1] == []


def test_every_file_opens_with_why_it_exists() -> None:
    assert [str(path) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_nothing_is_pickled_and_no_remote_code_is_trusted() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert "import pickle" not in text and not re.search(r"(?<![\w.])torch\.load\(", text), path
        assert "trust_remote_code=True" not in text, path


def test_the_widgets_are_imported_by_a_string_in_one_place_only() -> None:
    """The one door from what a user holds to how a page shows it, so that a first cell stays light."""
    doors = {
        path.relative_to(PACKAGE).as_posix()
        for path in SOURCES
        if "widgets" not in path.parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and str(node.value).startswith("tensafe_nb.widgets")
    }
    assert doors == {"display.py"}


def test_a_name_that_is_not_at_the_top_is_told_where_it_is_or_the_nearest() -> None:
    with pytest.raises(
        AttributeError, match=r"no attribute 'LossCurve': it is tensafe_nb\.widgets\.LossCurve\."
    ):
        _ = tn.LossCurve
    with pytest.raises(AttributeError, match=r"no attribute 'load_runs'\. Did you mean 'load_run'\?"):
        _ = tn.load_runs
    told = subprocess.run(
        [sys.executable, "-c", "import tensafe_nb as tn; tn.load_runs"], capture_output=True, text=True
    )
    assert told.stderr.count("Did you mean") == 1
