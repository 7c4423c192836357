"""Displays of a run while it runs: a live panel in a notebook, a bar in a terminal, lines in a log.

Importing this is cheap: anywidget, IPython and matplotlib load when something is shown.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from tensafe_nb.runs.run import TrainingRun
from tensafe_nb.widgets import progress, renderer
from tensafe_nb.widgets.feed import feed
from tensafe_nb.widgets.feed.recording import RecordedRun

if TYPE_CHECKING:
    from tensafe_nb.widgets.live.chat import ChatPanel
    from tensafe_nb.widgets.live.comparison import ComparisonChart
    from tensafe_nb.widgets.live.curve import LossCurve, RewardHistory
    from tensafe_nb.widgets.live.dashboard import Dashboard
    from tensafe_nb.widgets.live.sections import CheckpointTable, PrivacyMeter, RolloutInspector

__all__ = [
    "ChatPanel",
    "CheckpointTable",
    "ComparisonChart",
    "Dashboard",
    "LossCurve",
    "PrivacyMeter",
    "RewardHistory",
    "RolloutInspector",
    "chat_bundle",
    "chat_mime",
    "chat_panel",
    "comparison_bundle",
    "comparison_chart",
    "comparison_mime",
    "freeze",
    "freeze_comparison",
    "mime",
    "mimebundle",
    "nothing_shown",
    "panel",
    "save_comparison",
    "save_page",
    "settle",
    "show_comparison",
    "show_run",
]
_MODULES = {
    "ChatPanel": "live.chat",
    "CheckpointTable": "live.sections",
    "ComparisonChart": "live.comparison",
    "Dashboard": "live.dashboard",
    "LossCurve": "live.curve",
    "PrivacyMeter": "live.sections",
    "RewardHistory": "live.curve",
    "RolloutInspector": "live.sections",
}


_charts: "WeakValueDictionary[str, ComparisonChart]" = WeakValueDictionary()
_panels: "WeakKeyDictionary[Any, ChatPanel]" = WeakKeyDictionary()  # of chats
_in_silence: ContextVar[bool] = ContextVar("in_silence", default=False)


@contextmanager
def nothing_shown() -> Iterator[None]:
    """Show nothing of the runs that are started inside, whatever they are told: many are started at once."""
    token = _in_silence.set(True)
    try:
        yield
    finally:
        _in_silence.reset(token)


def panel(source: feed.Source, sections: Sequence[str] | None = None) -> "Dashboard":
    """Return the live panel of a training client, or of a run's client: one widget, however often it is shown.

    Args:
        source: Whose.
        sections: Some of them; then it is a widget of its own.
    """
    from tensafe_nb.widgets.live import dashboard

    return dashboard.panel_of(source, sections)


def show_run(run: TrainingRun | RecordedRun) -> None:
    """Show the progress of a run that is about to start, in whatever way this place can show it."""
    if _in_silence.get():
        return
    chosen = renderer.choose()
    if chosen is renderer.Renderer.TEXT:
        progress.show(run)
        return
    feed.feed_of(run).expect(run)
    if chosen is renderer.Renderer.HTML:
        _show_outputs(run)
    else:
        panel(run).show(run)


def mimebundle(source: feed.Source) -> Any:
    """Return what a cell shows that ends with a training client or a run: for their `_repr_mimebundle_`."""
    words = {"text/plain": repr(source)}
    chosen = renderer.choose()
    if chosen is renderer.Renderer.TEXT:
        return words
    if chosen is renderer.Renderer.HTML:
        _show_outputs(source)
        return words
    if panel(source).is_shown_here:
        return words
    return panel(source)._repr_mimebundle_()


def mime(source: feed.Source) -> tuple[str, str]:
    """Return what a marimo cell shows that ends with a training client or a run: for their `_mime_`.

    The live panel, with the picture and the table of this moment beneath, for a page that is exported; in a script
    these alone. A cell that is run again takes fresh ones.
    """
    from tensafe_nb.widgets.still.snapshot import Snapshot

    snapshot = Snapshot.take(feed.feed_of(source), _run_of(source))
    still = _still_html(snapshot.picture(), snapshot.sentence, str(snapshot.table()["text/html"]))
    if not renderer.in_marimo():
        return "text/html", still
    from tensafe_nb.widgets.live.dashboard import Dashboard

    return _in_marimo(Dashboard(source), still)


def _still_html(drawn: Any, sentence: str, table: str) -> str:
    """Return a picture, where one could be drawn, and a table."""
    import base64
    import html

    if drawn is None:
        return table
    png = base64.b64encode(drawn[0]["image/png"]).decode()
    return f'<img alt="{html.escape(sentence)}" src="data:image/png;base64,{png}">{table}'


def _in_marimo(widget: Any, still: str) -> tuple[str, str]:
    """Return a widget, one for each cell: its line ends when the cell is run again; and what an export shows."""
    live = sys.modules["marimo"].as_html(widget).text
    return (
        "text/html",
        f"{live}<details><summary>As it stood when this cell was run</summary>{still}</details>",
    )


def show_comparison(race: Any) -> None:
    """Show the chart of a comparison that is about to start; nothing where nobody can see it."""
    chosen = renderer.choose()
    if chosen is renderer.Renderer.WIDGET:
        comparison_chart(race).show()
    elif chosen is renderer.Renderer.HTML:
        _still_of(race).place()


def comparison_chart(race: Any) -> "ComparisonChart":
    """Return the one chart of a comparison, however often it is shown."""
    from tensafe_nb.widgets.live.comparison import ComparisonChart

    chart = _charts.get(race.comparison_id)
    if chart is None or chart.is_cut_off or chart.shows is not race:
        chart = _charts[race.comparison_id] = ComparisonChart(race)
    return chart


def comparison_bundle(race: Any) -> Any:
    """Return what a cell shows that ends with a comparison: for its `_repr_mimebundle_`."""
    words = {"text/plain": repr(race)}
    chosen = renderer.choose()
    if chosen is renderer.Renderer.WIDGET:
        chart = comparison_chart(race)
        return words if chart.is_shown_here else chart._repr_mimebundle_()
    if chosen is renderer.Renderer.HTML:
        _still_of(race).place()
        return words
    return words | {"text/html": race.shown().table}


def comparison_mime(race: Any) -> tuple[str, str]:
    """Return what a marimo cell shows that ends with a comparison: for its `_mime_`."""
    shown = race.shown()
    still = _still_html(shown.picture(), shown.sentence, shown.table)
    if not renderer.in_marimo():
        return "text/html", still
    from tensafe_nb.widgets.live.comparison import ComparisonChart

    return _in_marimo(ComparisonChart(race), still)


def chat_panel(chat: Any) -> "ChatPanel":
    """Return the one panel of a chat, however often it is shown."""
    from tensafe_nb.widgets.live.chat import ChatPanel

    panel = _panels.get(chat)
    if panel is None or panel.is_cut_off:
        panel = _panels[chat] = ChatPanel(chat)
    return panel


def chat_bundle(chat: Any) -> Any:
    """Return what a cell shows that ends with a chat: for its `_repr_mimebundle_`."""
    from tensafe_nb.widgets.feed.flusher import FLUSHER
    from tensafe_nb.widgets.still.transcript import StillChat, transcript

    chosen = renderer.choose()
    if chosen is renderer.Renderer.WIDGET:
        return chat_panel(chat)._repr_mimebundle_()
    if chosen is renderer.Renderer.HTML:
        StillChat(chat, FLUSHER, alone=lambda: True).place()
        return {"text/plain": repr(chat)}
    return transcript(chat)


def chat_mime(chat: Any) -> tuple[str, str]:
    """Return what a marimo cell shows that ends with a chat: for its `_mime_`."""
    from tensafe_nb.widgets.still.transcript import transcript

    still = str(transcript(chat)["text/html"])
    if not renderer.in_marimo():
        return "text/html", still
    from tensafe_nb.widgets.live.chat import ChatPanel

    return _in_marimo(ChatPanel(chat), still)


def freeze_comparison(race: Any) -> None:
    """Put a picture and a table of a comparison into the calling cell."""
    from tensafe_nb.widgets.still.snapshot import publish

    shown = race.shown()
    if renderer.in_kernel():
        drawn = shown.picture()
        if drawn is not None:
            publish(*drawn)
    publish(shown.output(), {})


def _still_of(race: Any) -> Any:
    from tensafe_nb.widgets.feed.flusher import FLUSHER
    from tensafe_nb.widgets.still.race import StillRace

    return StillRace(race, FLUSHER, alone=lambda: True)


def freeze(source: feed.Source, samples: int = 0) -> None:
    """Put a picture and a table of how things stand into the calling cell, and end the live parts shown before.

    Args:
        source: Whose.
        samples: So many prompts of the newest rollouts, with their answers; no text stays in the file unasked.
    """
    from tensafe_nb.widgets.still import snapshot

    chosen = renderer.choose()
    if chosen is renderer.Renderer.WIDGET:
        panel(source).retire()
    pictured = renderer.in_kernel() or chosen is not renderer.Renderer.TEXT
    snapshot.display(feed.feed_of(source), _run_of(source), samples, pictured=pictured)


def save_page(run: Any, to: Any, samples: int = 0) -> Any:
    """Save a run as one file for a browser: for `save_page` of runs and their records."""
    from tensafe_nb.widgets import page

    return page.save_page(to, run, samples=samples)


def save_comparison(race: Any, to: Any, title: str | None = None) -> Any:
    """Save a comparison as one file for a browser: for `save_page` of comparisons and their records."""
    from tensafe_nb.widgets import page

    return page.write_race(to, race.shown(), title)


def settle(source: feed.Source, timeout: float = 20.0) -> bool:
    """Wait until whatever shows a closed training client has shown its end; at once where nothing does."""
    return feed.settle(source, timeout)


def _show_outputs(source: feed.Source) -> None:
    from tensafe_nb.widgets.still.snapshot import StillOutputs

    run = _run_of(source)
    part = StillOutputs(feed.feed_of(source), None if run is None else run.run_id, alone=lambda: True)
    part.place()


def _run_of(source: feed.Source) -> Any:
    return source if isinstance(source, TrainingRun | RecordedRun) else feed.feed_of(source).latest


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"tensafe_nb.widgets.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
