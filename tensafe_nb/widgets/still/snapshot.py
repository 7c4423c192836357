"""Outputs that stay in the file: a picture and a table, for viewers that run nothing (GitHub, a reopened file, a PDF).

They are ordinary outputs beside the live panel. Where no page ever says hello they are refreshed, and so they are the
panel of hosts without widgets. Pictures are PNG: SVG comes out black or broken on GitHub and nbviewer.
"""

import atexit
import html
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from weakref import WeakSet

from tensafe_nb.display import LEFT
from tensafe_nb.events import ArtifactDeleted, CheckpointSaved, Metrics
from tensafe_nb.history.state import RunSoFar
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.widgets.feed.feed import Feed, Standing
from tensafe_nb.widgets.feed.rollouts import frozen
from tensafe_nb.widgets.still.picture import draw
from tensafe_nb.widgets.still.words import Subject, rows_of, sentence_of

TABLE_SECONDS = 2.0  # between refreshes where no page listens
PICTURE_SECONDS = 30.0  # between two pictures, except at the end
FIRST_SECONDS = 5.0  # after which an output whose page listens has its first picture
LONGEST_SECONDS = 60.0  # that what a file holds may be older than the training, while its page listens

Bundle = dict[str, Any]
drawing = threading.Lock()  # matplotlib's fonts are shared by all figures


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Training clients and a run of the first at one moment, in words, as a table and as a picture.

    Attributes:
        subject: What of them is told.
        standings: How each of them stands.
        taken_at: When.
        steering: Whether the table ends with the calls to type.
    """

    subject: Subject
    standings: tuple[Standing, ...]
    taken_at: datetime
    steering: bool = False

    @classmethod
    def take(cls, source: Feed | Subject, run: Any, *, steering: bool = False) -> "Snapshot":
        """Return how things stand; with `steering`, the table ends with the calls to type."""
        subject = source if isinstance(source, Subject) else Subject((source,))
        first, *others = subject.feeds
        standings = (first.standing(run), *(feed.standing() for feed in others))
        return cls(subject, standings, datetime.now().astimezone(), steering)

    @property
    def standing(self) -> Standing:
        """How the first stands."""
        return self.standings[0]

    @property
    def sentence(self) -> str:
        """All of it in one line: the caption, and the words for who cannot see the picture."""
        of_each = [
            sentence_of(feed, standing, self.subject.curve)
            for feed, standing in zip(self.subject.feeds, self.standings, strict=True)
        ]
        return f"{'; '.join(of_each)}, {self.taken_at:%Y-%m-%d %H:%M:%S}"

    def table(self) -> Bundle:
        """Return the table as an output."""
        words = html.escape(self.sentence).replace("; ", ";<br>")  # a line for each training client
        caption = f'<caption style="white-space: nowrap">{words}</caption>'
        rows = "".join(
            f'<tr><th scope="row" {LEFT}>{html.escape(name)}</th><td {LEFT}>{html.escape(text)}</td></tr>'
            for name, text in rows_of(self.subject, self.standings, steering=self.steering)
        )
        return {
            "text/html": f'<table class="tsnb-frozen">{caption}<tbody>{rows}</tbody></table>',
            "text/plain": self.sentence,
        }

    def picture(self) -> tuple[Bundle, Bundle] | None:
        """Return the picture as an output with its metadata; None where there is nothing to draw, or no matplotlib."""
        with suppress(ImportError), drawing:
            png = draw(self.subject, self.sentence)
            if png is not None:
                return {"image/png": png, "text/plain": self.sentence}, {"image/png": {"alt": self.sentence}}
        return None


class StillOutputs:
    """The outputs of one run (or of a client without one) that stay in the file, and when they are renewed.

    Where no page listens they are all there is to see, and follow within seconds. Where one does they are hidden, and
    follow what comes to a rest at once and everything else within a minute: a file may be saved, and its kernel may
    die, at any moment.

    Args:
        source: The training client, or what is told of it.
        run_id: The run; None for a client without one.
        alone: Whether no page shows the panel, so that this is all there is to see.
    """

    def __init__(self, source: Feed | Subject, run_id: str | None, alone: Callable[[], bool]) -> None:
        self.subject = source if isinstance(source, Subject) else Subject((source,))
        self.feed, self._run_id = self.subject.feeds[0], run_id
        self._alone = alone
        self._ids: list[str] = []
        self._unmet: list[str] = []  # those that no page has shown yet
        self._shown: object = None  # what the table tells
        self._pictured: object = None  # what the picture tells
        self._painting: set[Snapshot] = set()
        self._painted: deque[tuple[Bundle, Bundle]] = deque()
        self._table_at = self._picture_at = float("-inf")
        self._words: str | None = None  # of the latest picture
        self._out_of_reach = False
        _placed.add(self)
        for feed in self.subject.feeds:
            feed.watch(self)

    @property
    def live(self) -> bool:
        return self.busy or self._shown != self._now or not all(feed.over for feed in self.subject.feeds)

    @property
    def busy(self) -> bool:
        return bool(self._painting or self._painted)

    @property
    def run(self) -> RunSoFar | None:
        """The run, as far as it is told."""
        return self.feed.run(self._run_id)

    @property
    def hint(self) -> dict[str, Any] | None:
        """What a page must know to say what its file holds, which the kernel cannot renew since it was loaded anew."""
        final = self._ended and self._pictured == self._now and not self.busy
        return {"last": self._words if final else None} if self._out_of_reach else None

    def place(self) -> None:
        """Put the outputs into the calling cell; empty where a page will show more, and filled when it is time."""
        identity = uuid.uuid4().hex[:12]
        self._ids.append(identity)
        self._unmet.append(identity)
        self._out_of_reach = False
        now = self.feed.flusher.now()
        self._shown = self._pictured = None
        self._table_at, self._picture_at = now, now + FIRST_SECONDS - LONGEST_SECONDS
        drawn = None
        snapshot = Snapshot.take(self.subject, self.run, steering=True)
        if self._alone() and any(feed.curve in feed.history for feed in self.subject.feeds):
            drawn = snapshot.picture()
            self._pictured, self._picture_at = self._now, now
        if drawn is None:
            publish(_placeholder("tsnb-frozen-picture"), {}, f"{identity}-picture")
        else:
            self._words = drawn[0]["text/plain"]
            publish(*drawn, f"{identity}-picture")
        publish(snapshot.table() if self._alone() else _placeholder("tsnb-frozen"), {}, f"{identity}-table")
        self.feed.flusher.wake(self)

    def meet(self) -> None:
        """A page was loaded: it knows the outputs that were placed since, and no longer those that another showed."""
        self._out_of_reach = bool(self._ids) and not self._unmet
        self._unmet.clear()

    def flush(self) -> float | None:
        """Renew what is due; called by `tsnb-view` only."""
        self._send_pictures()
        if not self._ids:
            return None
        alone, now, held = self._alone(), self.feed.flusher.now(), self._now
        pace = TABLE_SECONDS if alone else LONGEST_SECONDS
        picture_due = self._picture_due(alone=alone)
        behind = self._shown != held or (alone and not self._ended)
        if self._pictured != held and not self._painting and now >= picture_due:
            self._table_at = self._picture_at = now
            self._pictured = held
            snapshot = self._publish_table(steering=alone)
            self._painting.add(snapshot)
            self.feed.flusher.aside(lambda: self._paint(snapshot))
        elif behind and ((self._at_rest and self._shown != held) or now >= self._table_at + pace):
            self._table_at = now
            self._publish_table(steering=alone)
        if self._over or (self._shown == self._pictured == held and not alone):
            return None
        return max(min(self._table_at + pace, picture_due) - now, TABLE_SECONDS)

    def _picture_due(self, *, alone: bool) -> float:
        """Return from when on a picture of what is new is drawn."""
        if self._ended:
            return float("-inf")
        if self._at_rest or alone:
            first = float("-inf") if self._at_rest else self._table_at + TABLE_SECONDS
            return first if self._pictured is None else self._picture_at + PICTURE_SECONDS
        return self._picture_at + LONGEST_SECONDS

    def finish(self) -> None:
        """Leave the last word with the kernel's end; whoever waits for it waits for a picture at most."""
        if self._ids and self._pictured != self._now:
            self._pictured = self._now
            self._paint(self._publish_table())
            self._send_pictures()

    @property
    def _over(self) -> bool:
        return all(feed.over for feed in self.subject.feeds)

    @property
    def _ended(self) -> bool:
        return self._over if self.run is None else self.run.state.ended

    @property
    def _now(self) -> object:
        """What there is to tell now, as far as it makes table and picture another."""
        standings = [self.feed.standing(self.run), *(feed.standing() for feed in self.subject.feeds[1:])]
        return tuple(
            (
                standing.state if standing.run_id else feed.state.closed,
                standing.step,
                standing.client_step,
                standing.loaded,
                standing.line,
                feed.state.counts[CheckpointSaved],
                feed.state.counts[ArtifactDeleted],
                feed.state.counts[Metrics],
            )
            for feed, standing in zip(self.subject.feeds, standings, strict=True)
        )

    @property
    def _at_rest(self) -> bool:
        """Whether nothing is to come by itself."""
        return self._ended or (self.run is not None and self.run.state is RunStatus.PAUSED)

    def _publish_table(self, *, steering: bool = False) -> Snapshot:
        self._shown = self._now
        snapshot = Snapshot.take(self.subject, self.run, steering=steering)
        for identity in self._ids:
            publish(snapshot.table(), {}, f"{identity}-table", update=True)
        return snapshot

    def _paint(self, snapshot: Snapshot) -> None:
        """Draw, which takes 0.2 s, and 1 s where matplotlib is loaded first: no button shall wait for that."""
        try:
            drawn = snapshot.picture()
            if drawn is not None:
                self._painted.append(drawn)
        finally:
            self._painting.discard(snapshot)
            self.feed.flusher.wake(self)

    def _send_pictures(self) -> None:
        while self._painted:
            data, metadata = self._painted.popleft()
            self._words = data["text/plain"]
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
    with suppress(Exception):
        sys.stdout.flush()  # waits until a kernel's own thread has sent what is before it in the queue


_placed: WeakSet[StillOutputs] = WeakSet()
atexit.register(finish_all)
