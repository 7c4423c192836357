"""The base of every live widget: what a page says goes into an inbox, what it is told comes from `tsnb-view`."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import anywidget
import traitlets

from tensafe_nb.display import escaped
from tensafe_nb.errors import TGTinkerError
from tensafe_nb.widgets import renderer
from tensafe_nb.widgets.feed import rollouts
from tensafe_nb.widgets.feed.annotations import Part
from tensafe_nb.widgets.feed.curves import Curves, names_of
from tensafe_nb.widgets.feed.feed import Source, feed_of
from tensafe_nb.widgets.glossary import explained
from tensafe_nb.widgets.live import what_if
from tensafe_nb.widgets.live.commands import QUICK, Commands, Obeyed
from tensafe_nb.widgets.still.snapshot import Bundle, StillOutputs
from tensafe_nb.widgets.still.words import Subject, Topic
from tensafe_nb.widgets.wire import Outbox

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parents[1] / "static"
ROLLOUT_SECONDS = 2.0  # between two steps whose rollouts are sent unasked


def esm(*names: str) -> str:
    """Join ES modules of `static/` into one: a page loads a widget's code as a blob, from which nothing can import.

    Comments and indentation stay behind: the text is part of every widget's state.
    """
    lines = (
        line.strip()
        for name in names
        for line in (STATIC / f"{name}.js").read_text(encoding="utf-8").splitlines()
    )
    return "\n".join(line for line in lines if not line.startswith(("import {", "export {", "//"))) + "\n"


def css(name: str) -> str:
    """Return a style sheet of `static/`."""
    return (STATIC / f"{name}.css").read_text(encoding="utf-8")


def view_bundle(widget: anywidget.AnyWidget) -> dict[str, Any]:
    """Return the output that mounts a view of a widget."""
    view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    return {"application/vnd.jupyter.widget-view+json": view}


class LiveWidget(anywidget.AnyWidget):
    """A widget fed by custom messages, so that its state, which notebooks may save, stays constant in size.

    Args:
        sources: The training run or training client to show, and others to compare with.
        traits: Initial values of public traits.
    """

    parts: ClassVar[tuple[Part, ...]] = ()  # what it is told besides curves and status
    topic: ClassVar[Topic] = "training"  # what of it stays in the file
    is_met: ClassVar[bool] = (
        False  # whether a page ever said hello to any of them: then there are widgets here
    )

    selected_step = traitlets.Int(None, allow_none=True, help="The step whose rollouts are looked at.").tag(
        sync=True
    )
    title = traitlets.Unicode(help="What is trained, in a few words.").tag(sync=True)

    def __init__(self, *sources: Source, **traits: Any) -> None:
        if not sources:
            raise TypeError(f"{type(self).__name__} shows a training client or a run: give it one.")
        self.feeds = [feed_of(source) for source in sources]
        self.feed = self.feeds[0]
        title = f"{self.feed.client_id} · {self.feed.description}"
        super().__init__(title=title, **traits)
        self._greeted = False
        self._told: dict[str, Any] = {}
        self._told_spans: dict[str, Any] = {}
        self._page: object = None  # the name of the latest
        self._stills: dict[str | None, StillOutputs] = {}  # by run: what stays in the file
        self._shown_in: int | None = None  # execution count of the latest cell that shows it
        self.pages = 0  # mounted so far; 0: no page ever said hello
        self._commands = Commands(self.feed)
        self._curves, self._outbox = Curves(self.feeds), Outbox()
        self._inbox: deque[dict[str, Any]] = deque()
        self._ready: deque[dict[str, Any]] = deque()  # answers that other threads have prepared
        self._born: deque[Any] = deque()  # training clients that a button made
        self._preparing: set[object] = set()
        self._parts_told: dict[Part, int] = {}
        self._rollouts_at = float("-inf")
        self.on_msg(self.receive)
        for feed in self.feeds:
            feed.watch(self)

    # showing

    @property
    def subject(self) -> Subject:
        """What picture and table are about."""
        return Subject(tuple(self.feeds), self.topic)

    @property
    def is_shown_here(self) -> bool:
        """Whether the cell that is running now shows this widget already."""
        return self._shown_in == renderer.execution_count()

    def _repr_mimebundle_(self, **_: Any) -> tuple[Bundle, Bundle]:
        if not renderer.in_marimo():  # which asks for this as well, and has no outputs besides
            self.place_still(self.feed.latest)
        return self.live_bundle(), {}

    def place_still(self, run: Any) -> None:
        """Put the part that stays in the file into the calling cell."""
        key = None if run is None else run.run_id
        if key not in self._stills:
            self._stills[key] = StillOutputs(self.subject, key, alone=self._is_alone)
        self._stills[key].place()
        self._shown_in = renderer.execution_count()

    def _is_alone(self) -> bool:
        """Whether no page shows this, so that what stays in the file is all there is to see."""
        return not self.feed.flusher.met

    def live_bundle(self) -> Bundle:
        """Return the output that mounts a view, with a line for whoever cannot."""
        standing = self.feed.standing()
        of = f"run {standing.run_number} of " if standing.run_id else ""
        marks = "".join(f"{mark} · " for mark in self.feed.marks)
        line = f"{marks}Live {self.word} of {of}{self.feed.client_id}: open in Jupyter"
        return view_bundle(self) | {"text/html": f"<p>{escaped(line)}</p>", "text/plain": line}

    @property
    def word(self) -> str:
        """What it is called where it cannot be shown."""
        return type(self).__name__

    @property
    def shown(self) -> Sequence[str]:
        """The curves to send."""
        return ()

    @property
    def live(self) -> bool:
        return not self.is_cut_off and (self.busy or not all(feed.over for feed in self.feeds))

    @property
    def is_cut_off(self) -> bool:
        """Whether its line to pages was closed: by `close()`, or by marimo, whose cell was run again."""
        return self.comm is None or bool(getattr(self.comm, "_closed", False))

    def close(self) -> None:
        """Close the line to its pages, and show nothing any more."""
        for feed in vars(self).get("feeds", ()):
            feed.forget(self)
        super().close()

    @property
    def busy(self) -> bool:
        return bool(self._inbox or self._ready or self._born or self._preparing)

    def flush(self) -> float | None:
        """Answer the page, then send it what is new; called by `tsnb-view` only."""
        if self.is_cut_off:
            self.close()
            return None
        try:
            while self._inbox:
                self.answer(self._inbox.popleft())
            while self._born:
                self.adopt(self._born.popleft())
            while self._ready:
                self.send(self._ready.popleft())
            if not self.pages:
                return None
            greeted, self._greeted = self._greeted, False
            if greeted:  # the badge comes before a long history
                self.send_status()
            later = self.send_parts()
            for content, buffers in self._outbox.messages(self._curves, self.shown):
                self.send(content | self.stamp(), buffers)
            self.send_spans()
            if greeted:
                self.send({"t": "words", "words": explained()})
            return min((due for due in (later, self.send_status()) if due is not None), default=None)
        except Exception as error:
            logger.exception("a widget could not be brought up to date")
            self.send({"t": "error", "text": f"The panel stumbled: {type(error).__name__}: {error}"})
            return None

    def send_spans(self) -> None:
        """Tell the page which points led to the weights as they are, whenever that has changed."""
        spans = self._curves.spans(self.shown)
        if spans != self._told_spans:
            self._told_spans = spans
            self.send({"t": "spans", "spans": spans})

    def send_status(self) -> float | None:
        """Tell the page what else changed; return the seconds after which to be called again."""
        status = self.status()
        if status != self._told:
            self._told = status
            self.send({"t": "status"} | status)
        return None

    def status(self) -> dict[str, Any]:
        """Return what a page must know besides curves and parts."""
        latest = self.feed.latest
        still = self._stills.get(None if latest is None else latest.run_id)
        return {
            "hint": still.hint if still is not None else None,
            "curve": self.feed.curve,
            "n": self._outbox.points,
            "dp": self.feed.is_private,
            "marks": self.feed.marks,
            "steer": self.feed.client.steerable,
        }

    def stamp(self) -> dict[str, Any]:
        """Return what every stretch of a curve carries: when its last point was measured, in Unix milliseconds."""
        return {"at": round(self.feed.state.measured_at * 1000)}

    def adopt(self, child: Any) -> None:
        """Take in a training client that a button made; what shows no branches ignores it."""

    def greet(self, page: object) -> None:
        """A page says hello under its name, or, without one, that it missed something: all it was told is told anew."""
        mounted = bool(page) and page != self._page
        if mounted:
            self._page = page
            self.pages += 1
            for still in self._stills.values():
                still.meet()
        self.feed.flusher.met = True
        self._greeted = True
        self._outbox.start_over()
        self._told = {}
        self._told_spans = {}
        self._parts_told.clear()
        self._rollouts_at = float("-inf")

    # parts

    def send_parts(self) -> float | None:
        """Send the parts that have changed; return the seconds until one that has to wait is due."""
        later = None
        for part in self.parts:
            version = self.feed.annotations.version(part)
            if version == self._parts_told.get(part, 0):
                continue
            wait = self._rollouts_at + ROLLOUT_SECONDS - self.feed.flusher.now()
            if part == "rollouts" and wait > 0:
                later = wait
                continue
            self._parts_told[part] = version
            self.send_part(part)
        return later

    def send_part(self, part: Part) -> None:
        """Send a part of the panel, or have it prepared."""
        annotations, steerable = self.feed.annotations, self.feed.client.steerable
        match part:
            case "marks":
                self.send({"t": part, "marks": annotations.marks()})
            case "alarms":
                self.send({"t": part, "alarms": annotations.alarms()})
            case "privacy":
                plan = what_if.first_plan(self.feed.client.config) if steerable else None
                account = annotations.privacy()
                self.send({"t": part} | account | ({"plan": plan} if account else {}))
            case "rows":
                unknown = annotations.not_looked_up()
                if unknown and steerable:
                    self._aside(lambda: self.feed.learn(self._commands.look_up(unknown)))
                nobody = {} if steerable else {"enc": "—"}  # who could be asked how they are sealed
                rows = [nobody | row for row in annotations.rows()]
                self.send({"t": part, "rows": rows, "saving": annotations.saving})
            case "rollouts":
                newest = annotations.newest_rollouts()
                if newest is not None:
                    self._rollouts_at = self.feed.flusher.now()
                    self._aside(lambda: self._prepare(newest.step, rollouts.PUSHED))

    def _prepare(self, step: int, limit: int, *, held_out: bool = False) -> None:
        state = self.feed.state
        found = (state.held_out if held_out else state.rollouts).get(step)
        content: dict[str, Any] = {"t": "rollouts", "step": step, "held": held_out}
        if found is None:
            content["why"] = f"No rollouts were recorded for step {step}."
        else:
            try:
                path = self.feed.history.rollouts_file(found)
                content |= rollouts.message(step, path, self.feed.decode(), limit, held_out=held_out)
            except TGTinkerError as error:  # the oldest texts go when a run has too many
                content["why"] = str(error)
        self._ready.append(content | {"evaluated": self.feed.annotations.evaluated()})

    def _aside(self, work: Callable[[], None]) -> None:
        """Do what takes a while on a thread of its own; what it prepared is sent by the next flush."""
        job = object()
        self._preparing.add(job)

        def run() -> None:
            try:
                work()
            finally:
                self._preparing.discard(job)
                self.feed.flusher.wake(self, urgent=True)

        self.feed.flusher.aside(run)

    # what the page says

    def receive(self, _widget: object, content: dict[str, Any], _buffers: object) -> None:
        """Take a message of the page; it is answered by the next flush."""
        self._inbox.append(content)
        self.feed.flusher.wake(self, urgent=True)

    def answer(self, content: dict[str, Any]) -> None:
        """Answer a message of the page, at once or aside."""
        match content:
            case {"t": "hello"}:
                self.greet(content.get("mount"))
            case {"t": "show", "step": int(step)}:
                held_out = bool(content.get("held"))
                self._aside(lambda: self._prepare(step, rollouts.ASKED, held_out=held_out))
            case {"t": "plan"} if self.feed.client.steerable:
                client: Any = self.feed.client
                self._aside(lambda: self._ready.append(what_if.answer(client, content)))
            case {"t": "do", "do": str(command), "n": int(number)}:
                if command in QUICK:
                    self._carry_out(number, command, content)
                else:
                    self._aside(lambda: self._carry_out(number, command, content))
            case _:
                logger.warning("a page sent what no widget understands: %r", content)

    def _carry_out(self, number: int, command: str, content: dict[str, Any]) -> None:
        why, outcome = None, Obeyed()
        try:
            outcome = self._commands.obey(command, content)
        except ValueError as error:
            why = str(error)
        except Exception as error:  # noqa: BLE001  # whoever clicked must be told, whatever it was
            why = f"{type(error).__name__}: {error}"
        if outcome.child is not None:
            self._born.append(outcome.child)
        self._ready.append({"t": "ack", "n": number, "why": why, "said": outcome.said})

        def tell_failure(handle: Any) -> None:
            error = None if handle.state == "CANCELLED" else handle.exception()
            if error is not None:
                self._ready.append({"t": "error", "text": f"{command}: {error}"})
                self.feed.flusher.wake(self)

        if outcome.handle is not None:
            outcome.handle.add_done_callback(tell_failure)


class CurveWidget(LiveWidget):
    """A live widget with curves: what all of those let you set."""

    smoothing = traitlets.Float(
        0.8, min=0.0, max=0.999, help="Weight of the past in the smoothed curve, 0 for none."
    ).tag(sync=True)
    log_scale = traitlets.Bool(False, help="Whether values stand on a logarithmic scale.").tag(sync=True)
    x_axis = traitlets.Enum(("step", "tokens", "time"), "step", help="Over what the curves are drawn.").tag(
        sync=True
    )
    all_curves: ClassVar[bool] = False

    @property
    def shown(self) -> Sequence[str]:
        prefixes = ["", *(f"{number}:" for number in range(1, len(self.feeds)))]
        return [
            f"{prefix}{name}"
            for prefix, feed in zip(prefixes, self.feeds, strict=True)
            for name in names_of(feed, all_curves=self.all_curves)
        ]
