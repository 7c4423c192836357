"""What stays in the file, in words: one sentence about each training client, and the rows of its table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np

from tensafe_nb.events import ReplicaChange
from tensafe_nb.history.log import RunHistory
from tensafe_nb.protocol.batch import Array
from tensafe_nb.widgets.feed.feed import Feed, Standing

LISTED = 5  # checkpoints in the table of a training client, the newest
MOST = 50  # in a table of checkpoints
Rows = Iterator[tuple[str, str]]
Topic = Literal["training", "curves", "checkpoints", "privacy", "samples"]


@dataclass(frozen=True, slots=True)
class Subject:
    """What a picture and a table are about.

    Attributes:
        feeds: The training clients; the first is that of the run.
        topic: What of them the table tells.
        labels: What tells several apart.
        metric: The curve to draw; None draws the one to watch.
    """

    feeds: tuple[Feed, ...]
    topic: Topic = "training"
    labels: tuple[str, ...] = ()
    metric: str | None = None

    @property
    def curve(self) -> str:
        """The curve to draw."""
        return self.metric or self.feeds[0].curve


def sentence_of(feed: Feed, standing: Standing, curve: str) -> str:
    """Return how a training client stands, in one line: what it is, its step, its latest values, its privacy."""
    of = f" of {standing.planned}" if standing.planned else ""
    values = "".join(
        f", {name} {number(found[1][-1])}"
        for name, found in ((name, current_of(feed.history, name)) for name in names_of(curve))
        if len(found[1])
    )
    name = f"Run {standing.run_number} of {feed.client_id}" if standing.run_id else feed.client_id
    marks = "".join(f"{mark} · " for mark in feed.marks)
    moved = "" if standing.client_step is None else f", the client now at step {standing.client_step}"
    doubt = "" if standing.line == "OPEN" else f", line to the server {standing.line}"
    return f"{marks}{name}: {standing.state} at step {standing.step}{of}{moved}{doubt}{values}, {privacy_of(feed)}"


def rows_of(subject: Subject, standings: Sequence[Standing], *, steering: bool) -> Rows:
    """Yield the names and values of a table."""
    feed, standing = subject.feeds[0], standings[0]
    match subject.topic:
        case "checkpoints":
            yield from rows_of_checkpoints(feed)
        case "privacy":
            yield from rows_of_privacy(feed)
        case "samples":
            yield from rows_of_samples(feed)
        case "curves" if len(subject.feeds) > 1:
            for label, each in zip(subject.labels, subject.feeds, strict=True):
                told = [f"{name} {ends}" for name, ends in ends_of(each.history, subject.curve)]
                yield label, ", ".join(told) or "nothing measured yet"
            return
    yield from rows_of_training(feed, standing, subject.curve)
    if steering and feed.client.steerable and standing.run_id and not standing.run_ended:
        yield "to steer it", "run.pause()  run.resume()  run.stop()"


def rows_of_training(feed: Feed, standing: Standing, curve: str) -> Rows:
    """Yield what is known of a training client and its run."""
    yield "training", feed.description
    yield "state", standing.state + (f": {standing.reason}" if standing.reason else "")
    yield "step", f"{standing.step} of {standing.planned or '—'}"
    if standing.client_step is not None:
        loaded = f": {standing.loaded} was loaded after the end" if standing.loaded else ""
        yield "client now at", f"step {standing.client_step}{loaded}"
    if standing.line != "OPEN":
        yield "line to the server", f"{standing.line}: {standing.line_reason or 'no reason is known'}"
    changed = feed.state.replicas
    if changed is not None and standing.replicas is not None:
        latest = f"; {changed.name} {changed.change.lower()}" if changed.name else ""
        if changed.change == ReplicaChange.WAITING:
            latest += f": {changed.reason}"
        yield "replicas", standing.replicas + latest
    yield from ends_of(feed.history, curve)
    yield "privacy", privacy_of(feed)
    saved = list(feed.state.checkpoints.values())
    if saved:
        yield "checkpoints", ", ".join(f"step {one.step}: {one.artifact_id}" for one in saved[-LISTED:])
    yield "time", clock(standing.elapsed)
    yield "run", standing.run_id or "—"
    if standing.name:
        yield "name", standing.name


def rows_of_checkpoints(feed: Feed) -> Rows:
    """Yield the checkpoints there are, newest first."""
    saved = list(feed.state.checkpoints.values())
    if not saved:
        yield "checkpoints", "none yet"
    for one in saved[: -MOST - 1 : -1]:
        name = f"“{one.name}” · " if one.name else ""
        when = f"{datetime.fromtimestamp(one.time).astimezone():%Y-%m-%d %H:%M:%S}"
        digest = one.content_hash.rpartition(":")[2][:12]
        yield f"step {one.step}", f"{name}{one.artifact_id} · {when} · {one.size_bytes:,} bytes · {digest}"


def rows_of_privacy(feed: Feed) -> Rows:
    """Yield the privacy account, and what it rests on."""
    spent = feed.state.privacy
    if spent is None:
        return
    yield "accountant", f"{spent.accountant}, {spent.adjacency}"
    if spent.void is not None:
        yield "no guarantee", spent.void
    elif spent.refused:
        yield "refused", f"step {spent.step + 1}: it would cost more than the budget"
    elif spent.projected_step is not None:
        yield "budget ends", f"at step {spent.projected_step}"


def rows_of_samples(feed: Feed) -> Rows:
    """Yield how many rollouts there are: prompts and answers stay in no file unasked."""
    newest = feed.annotations.newest_rollouts()
    if newest is None:
        yield "samples", "none yet"
    else:
        yield (
            "samples",
            f"{newest.rollouts} of step {newest.step}; run.freeze(samples=3) keeps some of their texts",
        )


def ends_of(history: RunHistory, curve: str) -> Rows:
    """Yield the first and the last value of a curve and its held-out twin, as they led to the weights as they are."""
    for name in names_of(curve):
        values = current_of(history, name)[1]
        if len(values):
            yield name, f"{number(values[0])} → {number(values[-1])}"


def names_of(curve: str) -> tuple[str, str]:
    """Return a curve and its held-out twin."""
    return curve, f"eval/{curve}"


def current_of(history: RunHistory, name: str) -> tuple[Array, Array]:
    """Return (steps, values) of a curve as it led to the weights as they are, without what was given up."""
    steps, values = history.series(name)
    kept = current(steps, led_of(history, name, len(steps)))
    return steps[kept], values[kept]


def led_of(history: RunHistory, name: str, points: int) -> Array:
    """Return which points of a curve led to the weights as they are, a truth value for each."""
    led = np.zeros(points, dtype=bool)
    for start, end in history.spans(name):
        led[start:end] = True
    return led


def current(steps: Array, led: Array | None = None) -> Array:
    """Return which points belong to the curve as it stands: after a rollback, not those that were abandoned."""
    led = np.ones(len(steps), dtype=bool) if led is None else led
    # The least step of the points that come after each: a point is current if none of them stands before it.
    counted = np.where(led, steps, np.iinfo(np.int64).max)
    later = np.append(np.minimum.accumulate(counted[::-1])[::-1][1:], np.iinfo(np.int64).max)
    kept: Array = led & (steps < later)
    return kept


def privacy_of(feed: Feed) -> str:
    """Return the privacy account in a few words; "DP off" is said as plainly as what was spent."""
    spent = feed.state.privacy
    if spent is None:
        return "no step under DP yet" if feed.is_private else "DP off"
    if spent.void is not None:
        return "ε ∞ (no guarantee)"
    budget = "" if spent.target_epsilon is None else f" of {number(spent.target_epsilon)}"
    return f"ε {number(spent.total_epsilon)}{budget} at δ = {spent.delta:g}"


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
