"""The panel: one per training client, however many cells show it. Badge, curve, and the buttons of its latest run."""

from typing import Any, ClassVar, final

from tensafe_nb.runs import TrainingRun
from tensafe_nb.types import RunStatus
from tensafe_nb.widgets import renderer
from tensafe_nb.widgets.base import LiveWidget, css, esm, view_bundle
from tensafe_nb.widgets.feed import Feed, Source, feed_of
from tensafe_nb.widgets.snapshot import Bundle, StaticPart, publish

STATUS_SECONDS = 0.5  # between two messages about the same state
HEARTBEAT = 5.0  # s, while anything is under way
BUTTONS = ("pause", "resume", "stop")


@final
class Dashboard(LiveWidget):
    """The live panel of a training client; `panel(tc)` returns the one there is.

    Args:
        source: A training client, or one of its runs.
        traits: `smoothing`.

    Example:
        >>> HBox([tc.dashboard(), LossCurve(other_run)])
    """

    _esm = esm("wire", "chart", "panel")
    _css = css("panel")
    _volatile: ClassVar = ("elapsed", "eta", "op_s")  # what the page counts on by itself

    def __init__(self, source: Source, **traits: Any) -> None:
        self._statics: dict[str | None, StaticPart] = {}
        self._shown_in: int | None = None  # execution count of the latest cell that shows it
        self._live_ids: list[str] = []
        self._told: dict[str, Any] = {}
        self._told_at = float("-inf")
        super().__init__(source, **traits)

    # showing

    def show(self, run: Any = None) -> None:
        """Show the panel in the calling cell, with the part that stays in the file above it."""
        self._place_static(run or self.feed.latest)
        identity = f"{self.model_id}-{len(self._live_ids)}"
        self._live_ids.append(identity)
        publish(self._live_bundle(), {}, identity)

    @property
    def is_shown_here(self) -> bool:
        """Whether the cell that is running now shows this panel already."""
        return self._shown_in == renderer.execution_count()

    def retire(self) -> None:
        """Turn the live part into one line of text, where the page still knows the outputs."""
        text = f"The live panel of {self.feed.client.training_client_id} was frozen."
        for identity in self._live_ids:
            publish({"text/plain": text}, {}, identity, update=True)
        self._live_ids.clear()

    def _repr_mimebundle_(self, **_: Any) -> tuple[Bundle, Bundle]:
        self._place_static(self.feed.latest)
        return self._live_bundle(), {}

    def _place_static(self, run: TrainingRun | None) -> None:
        key = None if run is None else run.run_id
        if key not in self._statics:
            self._statics[key] = StaticPart(self.feed, run, alone=lambda: not self.pages)
        self._statics[key].place()
        self._shown_in = renderer.execution_count()

    def _live_bundle(self) -> Bundle:
        facts = self.feed.facts()
        of = f"run {facts.run_number} of " if facts.run_id else ""
        line = f"Live panel of {of}{self.feed.client.training_client_id}: open in Jupyter"
        return view_bundle(self) | {"text/html": f"<p>{line}</p>", "text/plain": line}

    # telling the page

    def send_status(self) -> float | None:
        now, status = self.feed.view.now(), self._status()
        lasting = {name: value for name, value in status.items() if name not in self._volatile}
        turned = lasting.get("state") != self._told.get("state")
        waited = now - self._told_at
        changed = lasting != self._told
        if turned or (changed and waited >= STATUS_SECONDS) or (status["active"] and waited >= HEARTBEAT):
            self._told, self._told_at, changed = lasting, now, False
            self.send({"t": "status"} | status)
        return STATUS_SECONDS if status["active"] or changed else None

    def stamp(self) -> dict[str, Any]:
        return super().stamp() | {"step": self.feed.facts().step}

    def greet(self, mounted: bool) -> None:
        super().greet(mounted)
        if mounted and self.pages > 1:
            for static in self._statics.values():
                static.lose()
        self._told, self._told_at = {}, float("-inf")

    def _status(self) -> dict[str, Any]:
        facts = self.feed.facts()
        static = self._statics.get(facts.run_id)
        return {
            "client": facts.client,
            "state": facts.state,
            "run": facts.run_number,
            "step": facts.step,
            "of": facts.planned,
            "elapsed": _rounded(facts.elapsed),
            "eta": _rounded(facts.eta),
            "queue": facts.queued,
            "op": facts.operation,
            "op_s": _rounded(facts.operation_seconds),
            "reason": facts.reason,
            "active": facts.active,
            "ended": facts.run_ended,
            "curve": self.feed.curve,
            "n": self._outbox.points,
            "hint": static.hint if static is not None else None,
        }

    # obeying it

    def obey(self, command: str) -> None:
        run = self.feed.latest
        if command not in BUTTONS or run is None:
            raise ValueError(f"There is no run to {command}.")
        if run.state.ended:
            raise ValueError(f"The run has ended: {RunStatus(run.state)}.")
        {"pause": run.pause, "resume": run.resume, "stop": run.stop}[command]()


_panels: dict[Feed, Dashboard] = {}


def panel_of(source: Source) -> Dashboard:
    """Return the one panel of a training client, of a run's client, or of a recorded run."""
    feed = feed_of(source)
    known = _panels.get(feed)
    if known is None or known.comm is None:  # a panel that was closed has no line to any page
        known = _panels[feed] = Dashboard(feed)
    return known


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
