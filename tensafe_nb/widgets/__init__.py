"""What a run looks like while it runs: a live panel in a notebook, a bar in a terminal, lines in a log.

Importing this is cheap: anywidget, IPython and matplotlib load when something is shown.
"""

from typing import TYPE_CHECKING, Any

from tensafe_nb.runs import TrainingRun
from tensafe_nb.widgets import feed, progress, renderer
from tensafe_nb.widgets.recording import RecordedRun

if TYPE_CHECKING:
    from tensafe_nb.widgets.curve import LossCurve
    from tensafe_nb.widgets.dashboard import Dashboard

__all__ = ["Dashboard", "LossCurve", "freeze", "mimebundle", "panel", "settle", "show_run"]


def panel(source: feed.Source) -> "Dashboard":
    """Return the live panel of a training client, or of a run's client: one widget, however often it is shown."""
    from tensafe_nb.widgets import dashboard

    return dashboard.panel_of(source)


def show_run(run: TrainingRun | RecordedRun) -> None:
    """Show the progress of a run that is about to start, in whatever way this place can show it."""
    match renderer.choose():
        case renderer.Renderer.TEXT:
            progress.show(run)
        case renderer.Renderer.HTML:
            _static_part(run)
        case renderer.Renderer.WIDGET:
            panel(run).show(run)


def mimebundle(source: feed.Source) -> Any:
    """Return what a cell shows that ends with a training client or a run: for their `_repr_mimebundle_`."""
    words = {"text/plain": repr(source)}
    chosen = renderer.choose()
    if chosen is renderer.Renderer.TEXT:
        return words
    if chosen is renderer.Renderer.HTML:
        _static_part(source)
        return words
    if panel(source).is_shown_here:
        return words
    return panel(source)._repr_mimebundle_()


def freeze(source: feed.Source) -> None:
    """Put a picture and a table of how things stand into the calling cell, and end the live parts shown before."""
    from tensafe_nb.widgets import snapshot

    if renderer.choose() is renderer.Renderer.WIDGET:
        panel(source).retire()
    snapshot.display(feed.feed_of(source), _run_of(source))


def settle(source: feed.Source, timeout: float = 3.0) -> bool:
    """Wait until whatever shows a closed training client has shown its end; at once where nothing does."""
    return feed.settle(source, timeout)


def _static_part(source: feed.Source) -> None:
    from tensafe_nb.widgets.snapshot import StaticPart

    StaticPart(feed.feed_of(source), _run_of(source), alone=lambda: True).place(filled=True)


def _run_of(source: feed.Source) -> Any:
    return source if isinstance(source, TrainingRun | RecordedRun) else feed.feed_of(source).latest


def __getattr__(name: str) -> Any:
    if name == "LossCurve":
        from tensafe_nb.widgets.curve import LossCurve

        return LossCurve
    if name == "Dashboard":
        from tensafe_nb.widgets.dashboard import Dashboard

        return Dashboard
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
