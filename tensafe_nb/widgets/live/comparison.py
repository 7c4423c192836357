"""The live chart of a comparison: means with intervals, the table, and the words for each pair."""

import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, final

import anywidget
import numpy as np
import traitlets

from tensafe_nb.display import escaped
from tensafe_nb.protocol.batch import Array
from tensafe_nb.widgets import renderer
from tensafe_nb.widgets.feed.flusher import FLUSHER, Flusher
from tensafe_nb.widgets.live.base import css, esm, view_bundle
from tensafe_nb.widgets.still.race import Shown, StillRace
from tensafe_nb.widgets.still.snapshot import Bundle, publish
from tensafe_nb.widgets.wire import Outbox

logger = logging.getLogger(__name__)

HEARTBEAT = 5.0  # s, while the race is on
COMMANDS = ("pause", "resume", "stop")


class Raced(Protocol):
    """A comparison, or the record of one."""

    comparison_id: str

    def shown(self) -> Shown: ...
    def watch(self, watcher: Callable[[], None]) -> Callable[[], None]: ...


class RaceColumns:
    """The curves as the wire wants them: columns that only grow, or begin anew."""

    def __init__(self) -> None:
        self._columns: dict[str, tuple[Array, Array]] = {}

    def take(self, curves: dict[str, tuple[Array, Array]]) -> bool:
        """Take what there is now; whether something that was there before has changed."""
        before, self._columns = self._columns, curves
        for name, (steps, values) in before.items():
            now = curves.get(name, (steps[:0], values[:0]))
            same = [
                np.array_equal(old, new[: len(old)], equal_nan=True)
                for old, new in zip((steps, values), now, strict=True)
            ]
            if not all(same):
                return True
        return False

    def series(self, name: str, start: int) -> tuple[Array, Array]:
        steps, values = self._columns[name]
        return steps[start:], values[start:]

    @property
    def names(self) -> list[str]:
        return list(self._columns)


@final
class ComparisonChart(anywidget.AnyWidget):
    """A comparison as it goes: each arm's mean over the seeds with its interval, the table, and Pause and Stop.

    `tn.compare` shows it; a cell that ends with the comparison shows it again.

    Args:
        comparison: From `tn.compare`, or `tn.load_comparison`.

    Example:
        >>> ComparisonChart(comparison)
    """

    _esm = esm("line", "wire", "place", "page", "chart", "comparison")
    _css = css("panel")

    title = traitlets.Unicode(help="What is compared, in a few words.").tag(sync=True)
    selected_step = traitlets.Int(None, allow_none=True, help="The step that is looked at.").tag(sync=True)
    smoothing = traitlets.Float(0.0, help="Means over seeds are drawn as they are.").tag(sync=True)
    log_scale = traitlets.Bool(False, help="Whether values stand on a logarithmic scale.").tag(sync=True)
    x_axis = traitlets.Unicode("step", help="Over what the curves are drawn.").tag(sync=True)

    def __init__(self, comparison: Raced, flusher: Flusher = FLUSHER) -> None:
        self._race, self._flusher = comparison, flusher
        super().__init__(title=comparison.shown().title)
        self._outbox, self._columns = Outbox(), RaceColumns()
        self._inbox: deque[dict[str, Any]] = deque()
        self._told: dict[str, Any] = {}
        self._standing: dict[str, Any] = {}
        self._told_at = float("-inf")
        self._page: object = None
        self.pages = 0  # mounted so far; 0: no page ever said hello
        self._still: StillRace | None = None
        self._shown_in: int | None = None  # execution count of the latest cell that shows it
        self.on_msg(self.receive)
        self._forget = comparison.watch(lambda: flusher.wake(self))

    # showing

    @property
    def shows(self) -> Raced:
        """The comparison."""
        return self._race

    @property
    def is_shown_here(self) -> bool:
        """Whether the cell that is running now shows this already."""
        return self._shown_in == renderer.execution_count()

    def show(self) -> None:
        """Show it in the calling cell, with the part that stays in the file above it."""
        self.place_still()
        publish(self.live_bundle(), {})

    def place_still(self) -> None:
        """Put the part that stays in the file into the calling cell."""
        if self._still is None:
            self._still = StillRace(self._race, self._flusher, alone=lambda: not self._flusher.met)
        self._still.place()
        self._shown_in = renderer.execution_count()

    def _repr_mimebundle_(self, **_: Any) -> tuple[Bundle, Bundle]:
        if not renderer.in_marimo():
            self.place_still()
        return self.live_bundle(), {}

    def live_bundle(self) -> Bundle:
        """Return the output that mounts a view, with a line for whoever cannot."""
        line = f"Live chart of {self.title}: open in Jupyter"
        return view_bundle(self) | {"text/html": f"<p>{escaped(line)}</p>", "text/plain": line}

    def close(self) -> None:
        """Close the line to its pages, and show nothing any more."""
        if not self.is_cut_off:
            self._forget()
        super().close()

    # as a member of the flusher

    @property
    def live(self) -> bool:
        return not self.is_cut_off and (self.busy or self._race.shown().active)

    @property
    def is_cut_off(self) -> bool:
        """Whether its line to pages was closed."""
        return self.comm is None or bool(getattr(self.comm, "_closed", False))

    @property
    def busy(self) -> bool:
        return bool(self._inbox)

    def flush(self) -> float | None:
        """Answer the page, then send it what is new; called by `tsnb-view` only."""
        if self.is_cut_off:
            self.close()
            return None
        try:
            while self._inbox:
                self._answer(self._inbox.popleft())
            return self._send_news() if self.pages else None
        except Exception as error:
            logger.exception("the chart of a comparison could not be brought up to date")
            self.send({"t": "error", "text": f"The chart stumbled: {type(error).__name__}: {error}"})
            return None

    def _send_news(self) -> float | None:
        shown, now = self._race.shown(), self._flusher.now()
        if self._columns.take(shown.curves):
            self._outbox.start_over()
            self._told = {}
        if shown.standing != self._standing:
            self._standing = shown.standing
            self.send({"t": "standing"} | shown.standing)
        for content, buffers in self._outbox.messages(self._columns, self._columns.names):
            self.send(content, buffers)
        hint = None if self._still is None else self._still.hint
        status = shown.status | {"n": self._outbox.points, "hint": hint}
        if status != self._told or now >= self._told_at + HEARTBEAT:
            self._told, self._told_at = status, now
            self.send({"t": "status"} | status)
        return HEARTBEAT if shown.active else None

    # what the page says

    def receive(self, _widget: object, content: dict[str, Any], _buffers: object) -> None:
        """Take a message of the page; it is answered by the next flush."""
        self._inbox.append(content)
        self._flusher.wake(self, urgent=True)

    def _answer(self, content: dict[str, Any]) -> None:
        match content:
            case {"t": "hello"}:
                self._greet(content.get("mount"))
            case {"t": "do", "do": str(command), "n": int(number)}:
                why = None
                if command in COMMANDS and hasattr(self._race, command):
                    getattr(self._race, command)()
                else:
                    why = f"A comparison that has ended, or is read from the disk, takes no {command!r}."
                self.send({"t": "ack", "n": number, "why": why, "said": None})
            case _:
                logger.warning("a page sent what no chart understands: %r", content)

    def _greet(self, page: object) -> None:
        if page and page != self._page:
            self._page = page
            self.pages += 1
            if self._still is not None:
                self._still.meet()
        self._flusher.met = True
        self._outbox.start_over()
        self._told, self._standing, self._told_at = {}, {}, float("-inf")
