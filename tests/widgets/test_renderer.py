"""Where things are shown, and what a cell shows that ends with a client or a run."""

import subprocess
import sys
import types
from collections.abc import Iterator

import pytest

import tensafe_nb as tn
from tensafe_nb import lifetimes, widgets
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.widgets import renderer
from tensafe_nb.widgets.renderer import Renderer, choose

from .conftest import FakeClient, Output

LIGHT = "import sys, tensafe_nb.widgets; print([m for m in {heavy!r} if m in sys.modules])"
HEAVY = ["torch", "IPython", "anywidget", "ipywidgets", "matplotlib", "tqdm"]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Pretend that cells run here."""
    monkeypatch.delenv(renderer.VARIABLE, raising=False)
    shell = types.SimpleNamespace(kernel=object(), execution_count=3)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    return shell


@pytest.fixture
def shown(client: FakeClient, outputs: list[Output]) -> Iterator[FakeClient]:
    yield client
    for run in client.runs:
        client.turn(run, RunStatus.STOPPED)
    client.close()
    assert widgets.settle(client, 10)


def test_outside_a_notebook_progress_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    assert choose() is Renderer.TEXT
    monkeypatch.setenv(renderer.VARIABLE, "widget")
    assert choose() is Renderer.TEXT


@pytest.mark.parametrize("name", list(Renderer))
def test_in_a_notebook_it_is_the_widget_unless_the_variable_says_otherwise(
    kernel: object, monkeypatch: pytest.MonkeyPatch, name: Renderer
) -> None:
    assert choose() is Renderer.WIDGET
    monkeypatch.setenv(renderer.VARIABLE, name.upper())
    assert choose() is name


def test_where_another_thread_is_importing_ipython_there_is_no_notebook_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("IPython", "marimo"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))  # as it is before its code has run
    assert not lifetimes.in_notebook() and renderer.shell() is None
    assert not renderer.in_kernel() and not renderer.in_marimo()


def test_a_renderer_that_does_not_exist_is_refused_with_the_names_of_those_that_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(renderer.VARIABLE, "htm")
    with pytest.raises(ValidationError, match="none of widget, html, text"):
        choose()


def test_importing_the_widgets_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(heavy=HEAVY)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_outside_a_notebook_a_client_shows_its_words(client: FakeClient) -> None:
    assert widgets.mimebundle(client) == {"text/plain": repr(client)}


def test_a_cell_shows_the_panel_once(kernel: types.SimpleNamespace, shown: FakeClient) -> None:
    first = widgets.mimebundle(shown)
    assert "application/vnd.jupyter.widget-view+json" in first[0]
    assert widgets.mimebundle(shown) == {"text/plain": repr(shown)}
    kernel.execution_count = 4
    assert widgets.mimebundle(shown)[0].keys() == first[0].keys()


def test_with_html_the_table_is_shown_and_no_widget(
    kernel: object, shown: FakeClient, outputs: list[Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(renderer.VARIABLE, "html")
    shown.start()
    assert widgets.mimebundle(shown) == {"text/plain": repr(shown)}
    assert ">Run 1 of tc-1: RUNNING" in outputs[1].data["text/html"]


def test_freezing_ends_the_live_part(kernel: object, shown: FakeClient, outputs: list[Output]) -> None:
    run = shown.start()
    widgets.panel(shown).show(run)  # type: ignore[arg-type]
    outputs.clear()
    widgets.freeze(shown)
    assert [(output.update, next(iter(output.data))) for output in outputs] == [
        (True, "text/plain"),
        (False, "text/html"),
    ]


def test_settling_what_is_shown_nowhere_is_done_at_once(client: FakeClient) -> None:
    assert widgets.settle(client)
    assert "_feed" not in vars(client)


def test_marimo_is_given_a_picture_and_a_table(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    run = tc.fit([batch], steps=3, show=False)
    run.result()
    for shown in (run, tc):
        kind, page = shown._mime_()
        assert kind == "text/html"
        assert "<table" in page and "data:image/png;base64," in page and "FINISHED at step 3 of 3" in page
