"""Outputs that stay in the file: a picture and a table, for viewers that run nothing (GitHub, a reopened file, a PDF).

They are ordinary outputs beside the live panel. Where no page ever says hello they are refreshed, and so they are the
panel of hosts without widgets. Pictures are PNG: SVG comes out black or broken on GitHub and nbviewer.
"""

import atexit
import html
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from weakref import WeakSet

from tensafe_nb.history.state import RunSoFar
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.widgets.feed.feed import Feed, Standing
from tensafe_nb.widgets.feed.rollouts import frozen
from tensafe_nb.widgets.still.picture import draw

TABLE_SECONDS = 2.0  # between refreshes where no page listens
PICTURE_SECONDS = 30.0  # between two pictures, except at the end
LISTED = 5  # checkpoints in the table, the newest

Bundle = dict[str, Any]
_drawing = threading.Lock()  # matplotlib's fonts are shared by all figures


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A training client and one of its runs at one moment, in words, as a table and as a picture."""

    feed: Feed
    standing: Standing
    taken_at: datetime
    steering: bool = False

    @classmethod
    def take(cls, feed: Feed, run: Any, *, steering: bool = False) -> "Snapshot":
        """Return how things stand; with `steering`, the table ends with the calls to type."""
        return cls(feed, feed.standing(run), datetime.now().astimezone(), steering)

    @property
    def sentence(self) -> str:
        """All of it in one line: the caption, and the words for who cannot see the picture."""
        standing, last = self.standing, self.feed.history.last()
        of = f" of {standing.planned}" if standing.planned else ""
        values = "".join(f", {name} {number(last[name])}" for name in self._curves if name in last)
        name = f"Run {standing.run_number} of {self._client_id}" if standing.run_id else self._client_id
        marks = "".join(f"{mark} · " for mark in self.feed.marks)
        return (
            f"{marks}{name}: {standing.state} at step {standing.step}{of}{values}, {self._privacy}, "
            f"{self.taken_at:%Y-%m-%d %H:%M:%S}"
        )

    def table(self) -> Bundle:
        """Return the table as an output."""
        caption = f'<caption style="white-space: nowrap">{html.escape(self.sentence)}</caption>'
        rows = "".join(
            f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(text)}</td></tr>'
            for name, text in self.rows()
        )
        return {
            "text/html": f'<table class="tsnb-frozen">{caption}<tbody>{rows}</tbody></table>',
            "text/plain": self.sentence,
        }

    def picture(self) -> tuple[Bundle, Bundle] | None:
        """Return the picture as an output with its metadata; None where there is nothing to draw, or no matplotlib."""
        with suppress(ImportError), _drawing:
            png = draw(self.feed, self._curves, self.sentence)
            if png is not None:
                return {"image/png": png, "text/plain": self.sentence}, {
                    "image/png": {"alt": self.sentence, "needs_background": "light"}
                }
        return None

    @property
    def _client_id(self) -> str:
        return self.feed.client_id

    @property
    def _privacy(self) -> str:
        """The privacy account in a few words; "DP off" is said as plainly as what was spent."""
        spent = self.feed.state.privacy
        if spent is None:
            return "no step under DP yet" if self.feed.is_private else "DP off"
        if spent.void is not None:
            return "ε ∞ (no guarantee)"
        budget = "" if spent.target_epsilon is None else f" of {number(spent.target_epsilon)}"
        return f"ε {number(spent.total_epsilon)}{budget} at δ = {spent.delta:g}"

    @property
    def _curves(self) -> tuple[str, str]:
        return self.feed.curve, f"eval/{self.feed.curve}"

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield the names and values of the table."""
        standing, history = self.standing, self.feed.history
        yield "training", self.feed.description
        yield "state", standing.state + (f": {standing.reason}" if standing.reason else "")
        yield "step", f"{standing.step} of {standing.planned or '—'}"
        for name in self._curves:
            values = history.series(name)[1]
            if len(values):
                yield name, f"{number(values[0])} → {number(values[-1])}"
        yield "privacy", self._privacy
        saved = list(self.feed.state.checkpoints.values())
        if saved:
            yield "checkpoints", ", ".join(f"step {one.step}: {one.artifact_id}" for one in saved[-LISTED:])
        yield "time", clock(standing.elapsed)
        yield "run", standing.run_id or "—"
        if self.steering and self.feed.client.steerable and standing.run_id and not standing.run_ended:
            yield "to steer it", "run.pause()  run.resume()  run.stop()"


def number(value: float) -> str:
    """Return four significant digits."""
    return f"{value:.4g}"


def clock(seconds: float | None) -> str:
    """Return minutes and seconds, with hours where there are any; a dash for the unknown."""
    if seconds is None:
        return "—"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


class StillOutputs:
    """The outputs of one run (or of a client without one) that stay in the file, and when they are renewed.

    Args:
        feed: The training client.
        run_id: The run; None for a client without one.
        alone: Whether no page shows the panel, so that this is all there is to see.
    """

    def __init__(self, feed: Feed, run_id: str | None, alone: Callable[[], bool]) -> None:
        self.feed, self._run_id = feed, run_id
        self._alone = alone
        self._ids: list[str] = []
        self._shown: tuple[str, int] | None = None  # state and step of the table
        self._pictured: int | None = None  # step of the picture
        self._painting: set[Snapshot] = set()
        self._painted: deque[tuple[Bundle, Bundle, int]] = deque()
        self._table_at = self._picture_at = float("-inf")
        self._out_of_reach: str | None = None
        _placed.add(self)
        feed.watch(self)

    @property
    def live(self) -> bool:
        return self.busy or not (self._final or self.feed.over)

    @property
    def busy(self) -> bool:
        return bool(self._painting or self._painted)

    @property
    def run(self) -> RunSoFar | None:
        """The run, as far as it is told."""
        return self.feed.run(self._run_id)

    @property
    def hint(self) -> str | None:
        """A word about outputs that a page which was loaded again cannot renew any more."""
        return self._out_of_reach

    def place(self, *, filled: bool = False) -> None:
        """Put the outputs into the calling cell; empty ones are filled when they are needed."""
        identity = uuid.uuid4().hex[:12]
        self._ids.append(identity)
        self._out_of_reach = None
        self._table_at = self.feed.flusher.now()
        table = (
            Snapshot.take(self.feed, self.run, steering=True).table()
            if filled
            else _placeholder("tsnb-frozen")
        )
        publish(_placeholder("tsnb-frozen-picture"), {}, f"{identity}-picture")
        publish(table, {}, f"{identity}-table")
        self.feed.flusher.wake(self)

    def lose(self) -> None:
        """The page was loaded again: it no longer knows which outputs are ours."""
        if self._ids and not self._final:
            held = (
                "no picture of this run yet"
                if self._pictured is None
                else f"a picture of step {self._pictured}"
            )
            self._out_of_reach = f"This file holds {held}; run.freeze() in a new cell takes a fresh one."

    def flush(self) -> float | None:
        """Renew what is due; called by `tsnb-view` only."""
        self._send_pictures()
        if not self._ids or self._final:
            return None
        alone, now = self._alone(), self.feed.flusher.now()
        if self._turned or (alone and now >= self._table_at + TABLE_SECONDS):
            ended = self.run is None or self.run.state.ended
            due = (self._turned or alone) and now >= self._picture_at + PICTURE_SECONDS
            self.renew(picture=due or (self._turned and ended))
        return TABLE_SECONDS if alone and not self._final else None

    def finish(self) -> None:
        """Leave the last word with the kernel's end; whoever waits for it waits for a picture at most."""
        if self._ids and not self._final and (self.run is not None or not self.feed.over):
            self._paint(self._publish_table())
            self._send_pictures()

    @property
    def _final(self) -> bool:
        return self.run is not None and self._shown is not None and RunStatus(self._shown[0]).ended

    @property
    def _turned(self) -> bool:
        """Whether things have come to a rest that is not shown yet."""
        if self.run is None:
            return self.feed.over and self._shown is None
        resting = self.run.state.ended or self.run.state is RunStatus.PAUSED
        return resting and self._shown != (str(self.run.state), self.run.steps_done)

    def renew(self, *, picture: bool) -> None:
        """Publish the table of this moment, and have a picture drawn."""
        snapshot = self._publish_table(steering=self._alone())
        self._table_at = self.feed.flusher.now()
        if picture:
            self._picture_at = self._table_at
            self._painting.add(snapshot)
            self.feed.flusher.aside(lambda: self._paint(snapshot))

    def _publish_table(self, *, steering: bool = False) -> Snapshot:
        snapshot = Snapshot.take(self.feed, self.run, steering=steering)
        for identity in self._ids:
            publish(snapshot.table(), {}, f"{identity}-table", update=True)
        self._shown = (snapshot.standing.state, snapshot.standing.step)
        return snapshot

    def _paint(self, snapshot: Snapshot) -> None:
        """Draw, which takes 0.2 s, and 1 s where matplotlib is loaded first: no button shall wait for that."""
        try:
            drawn = snapshot.picture()
            if drawn is not None:
                self._painted.append((*drawn, snapshot.standing.step))
        finally:
            self._painting.discard(snapshot)
            self.feed.flusher.wake(self)

    def _send_pictures(self) -> None:
        while self._painted:
            data, metadata, self._pictured = self._painted.popleft()
            for identity in self._ids:
                publish(data, metadata, f"{identity}-picture", update=True)


def _placeholder(name: str) -> Bundle:
    return {"text/html": f'<div class="{name}"></div>', "text/plain": ""}


def display(feed: Feed, run: Any, samples: int = 0, *, pictured: bool = True) -> None:
    """Put a picture and a table of this moment into the calling cell; a script prints the words of the table."""
    snapshot = Snapshot.take(feed, run)
    drawn = snapshot.picture() if pictured else None
    if drawn is not None:
        publish(*drawn)
    publish(snapshot.table(), {})
    newest = feed.annotations.newest_rollouts()
    if samples and newest is not None:
        publish(frozen(newest.step, feed.history.rollouts_file(newest), samples), {})


def publish(data: Bundle, metadata: Bundle, display_id: str | None = None, *, update: bool = False) -> None:
    """Send an output to the calling cell, or renew the one of that id, whatever cell it is in."""
    from IPython.display import publish_display_data

    transient = {} if display_id is None else {"display_id": display_id}
    publish_display_data(data, metadata, transient=transient, update=update)


def finish_all() -> None:
    """Freeze what is still moving, when the kernel is shut down."""
    for part in list(_placed):
        with suppress(Exception):  # nobody is there any more to be told
            part.finish()


_placed: WeakSet[StillOutputs] = WeakSet()
atexit.register(finish_all)
