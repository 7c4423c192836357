"""What stays in the file of a comparison: a picture of its curves and its table, renewed as it goes."""

import uuid
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from tensafe_nb.protocol.batch import Array
from tensafe_nb.widgets.feed.flusher import Flusher
from tensafe_nb.widgets.still import snapshot
from tensafe_nb.widgets.still.picture import COLOURS, DASHES, png_of, style_axes
from tensafe_nb.widgets.still.snapshot import PICTURE_SECONDS, TABLE_SECONDS, Bundle, publish


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """A comparison at one moment, as chart, table and words.

    Attributes:
        title: What is compared.
        sentence: How it stands, in one line.
        labels: The arms.
        metric: What is measured; None before anything is.
        curves: By number of the arm: where its mean was measured; "N±" is how far the interval reaches.
        status: What the page must know besides.
        standing: The table, the words for each pair, and how to read them.
        table: The same as HTML.
        text: The same as text.
        active: Whether anything may still come.
    """

    title: str
    sentence: str
    labels: tuple[str, ...]
    metric: str | None
    curves: dict[str, tuple[Array, Array]]
    status: dict[str, Any]
    standing: dict[str, Any]
    table: str
    text: str
    active: bool

    def output(self) -> Bundle:
        """Return the table as an output."""
        return {"text/html": f'<div class="tsnb-frozen">{self.table}</div>', "text/plain": self.text}

    def picture(self) -> tuple[Bundle, Bundle] | None:
        """Return the picture as an output with its metadata; None where there is nothing to draw, or no matplotlib."""
        with suppress(ImportError), snapshot.drawing:
            png = draw_race(self.curves, self.labels, self.metric or "", self.sentence)
            if png is not None:
                return {"image/png": png, "text/plain": self.sentence}, {"image/png": {"alt": self.sentence}}
        return None


def draw_race(
    curves: Mapping[str, tuple[Array, Array]], labels: tuple[str, ...], metric: str, title: str
) -> bytes | None:
    """Return a PNG of means in the bands of their intervals; None where there is nothing to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not any(len(steps) for steps, _ in curves.values()):
        return None
    figure = Figure(figsize=(9.6, 3.0), dpi=100, layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    for number, label in enumerate(labels):
        steps, mean = curves[str(number)]
        _, reach = curves[f"{number}±"]
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": DASHES[number % len(DASHES)],
        }
        dots: dict[str, Any] = (
            {"marker": "o", "markersize": 3} if metric.startswith("eval/") or len(steps) == 1 else {}
        )
        axes.plot(steps, mean, label=label, linewidth=2, **style, **dots)
        axes.fill_between(steps, mean - reach, mean + reach, color=style["color"], alpha=0.2, linewidth=0)
    style_axes(axes, title.partition("; ")[0])
    axes.set_ylabel(metric, fontsize=9, color=axes.xaxis.label.get_color())
    return png_of(FigureCanvasAgg(figure), title)


class Pictured(Protocol):
    """A comparison, as far as it is shown."""

    def shown(self) -> Shown: ...
    def watch(self, watcher: Callable[[], None]) -> Callable[[], None]: ...


class StillRace:
    """The outputs of a comparison that stay in the file.

    Where no page shows the chart they are all there is to see, and follow within seconds. Where one does they are
    hidden, and are renewed twice a minute and at the end.

    Args:
        race: The comparison.
        flusher: Who calls.
        alone: Whether no page shows the chart.
    """

    def __init__(self, race: Pictured, flusher: Flusher, alone: Callable[[], bool]) -> None:
        self._race, self._flusher, self._alone = race, flusher, alone
        self._ids: list[str] = []
        self._unmet: list[str] = []
        self._words: str | None = None  # of the latest picture
        self._drawn: deque[tuple[Bundle, Bundle]] = deque()
        self._painting = 0
        self._table_at = self._picture_at = float("-inf")
        self._final = False
        self._out_of_reach = False
        race.watch(lambda: flusher.wake(self))

    @property
    def live(self) -> bool:
        return bool(self._ids) and (self.busy or not self._final)

    @property
    def busy(self) -> bool:
        return bool(self._drawn or self._painting)

    @property
    def hint(self) -> dict[str, Any] | None:
        """What a page must know to say what its file holds, which the kernel cannot renew since it was loaded anew."""
        if not self._out_of_reach:
            return None
        return {"last": self._words if self._final else None, "call": "comparison.freeze()"}

    def place(self) -> None:
        """Put the outputs into the calling cell."""
        identity = uuid.uuid4().hex[:12]
        self._ids.append(identity)
        self._unmet.append(identity)
        self._out_of_reach = False
        shown = self._race.shown()
        picture = shown.picture() if self._alone() else None
        empty = {"text/html": '<div class="tsnb-frozen-picture"></div>', "text/plain": ""}
        data, metadata = picture or (empty, {})
        publish(data, metadata, f"{identity}-picture")
        publish(shown.output(), {}, f"{identity}-table")
        self._table_at, self._final = self._flusher.now(), False
        self._picture_at = self._table_at if picture else float("-inf")
        self._flusher.wake(self)

    def meet(self) -> None:
        """A page was loaded: it knows the outputs that were placed since, and no longer those that another showed."""
        self._out_of_reach = bool(self._ids) and not self._unmet
        self._unmet.clear()

    def flush(self) -> float | None:
        """Renew what is due; called by `tsnb-view` only."""
        while self._drawn:
            data, metadata = self._drawn.popleft()
            self._words = data["text/plain"]
            for identity in self._ids:
                publish(data, metadata, f"{identity}-picture", update=True)
        now, shown = self._flusher.now(), self._race.shown()
        if self._final:
            return None
        self._final = not shown.active
        pace = TABLE_SECONDS if self._alone() else PICTURE_SECONDS
        if self._final or now >= self._table_at + pace:
            self._table_at = now
            for identity in self._ids:
                publish(shown.output(), {}, f"{identity}-table", update=True)
        if self._final or now >= self._picture_at + PICTURE_SECONDS:
            self._picture_at = now
            self._painting += 1
            self._flusher.aside(lambda: self._paint(shown))
        return None if self._final else pace

    def _paint(self, shown: Shown) -> None:
        try:
            drawn = shown.picture()
            if drawn is not None:
                self._drawn.append(drawn)
        finally:
            self._painting -= 1
            self._flusher.wake(self)
