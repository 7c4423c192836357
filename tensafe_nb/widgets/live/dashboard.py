"""The panel of a training client: badge, curves, and the buttons of its latest run; all cells show the same one."""

from collections.abc import Sequence
from typing import Any, ClassVar, final

import traitlets

from tensafe_nb.display import escaped
from tensafe_nb.errors import ValidationError, nearest
from tensafe_nb.widgets import renderer
from tensafe_nb.widgets.feed.annotations import Part
from tensafe_nb.widgets.feed.feed import Source, feed_of
from tensafe_nb.widgets.live.base import CurveWidget, css, esm, view_bundle
from tensafe_nb.widgets.still.snapshot import Bundle, StillOutputs, publish

STATUS_SECONDS = 0.5  # between two messages about the same state
HEARTBEAT = 5.0  # s, while anything is under way
SECTIONS = ("loss", "reward", "privacy", "samples", "checkpoints")


@final
class Dashboard(CurveWidget):
    """The live panel of a training client; `tc.dashboard()` returns the one there is.

    Args:
        source: A training client, or one of its runs.
        sections: Only these of "loss", "reward", "privacy", "samples", "checkpoints"; None shows those that have
            something to show.
        traits: `smoothing`, `log_scale`, `x_axis`, `selected_step`.

    Raises:
        ValidationError: An unknown section.

    Example:
        >>> HBox([tc.dashboard(), LossCurve(other_run)])
    """

    _esm = esm("wire", "page", "chart", "curves", "table", "samples", "meter", "panel")
    _css = css("panel")
    _volatile: ClassVar = ("elapsed", "eta", "op_s")  # what the page counts on by itself
    parts: ClassVar[tuple[Part, ...]] = ("marks", "alarms", "privacy", "rows", "rollouts")
    all_curves = True

    sections = traitlets.List(
        traitlets.Unicode(), help="The sections to show; empty for all that have something."
    ).tag(sync=True)

    def __init__(self, source: Source, sections: Sequence[str] | None = None, **traits: Any) -> None:
        check_sections(sections or ())
        self._stills: dict[str | None, StillOutputs] = {}
        self._shown_in: int | None = None  # execution count of the latest cell that shows it
        self._live_ids: list[str] = []
        self._told_at = float("-inf")
        self._branches: list[dict[str, str]] = []
        super().__init__(source, sections=list(sections or ()), **traits)

    # showing

    def show(self, run: Any = None) -> None:
        """Show the panel in the calling cell, with the part that stays in the file above it."""
        self._place_still(run or self.feed.latest)
        identity = f"{self.model_id}-{len(self._live_ids)}"
        self._live_ids.append(identity)
        publish(self._live_bundle(), {}, identity)

    @property
    def is_shown_here(self) -> bool:
        """Whether the cell that is running now shows this panel already."""
        return self._shown_in == renderer.execution_count()

    def retire(self) -> None:
        """Turn the live part into one line of text, where the page still knows the outputs."""
        text = f"The live panel of {self.feed.client_id} was frozen."
        for identity in self._live_ids:
            publish({"text/plain": text}, {}, identity, update=True)
        self._live_ids.clear()

    def _repr_mimebundle_(self, **_: Any) -> tuple[Bundle, Bundle]:
        self._place_still(self.feed.latest)
        return self._live_bundle(), {}

    def _place_still(self, run: Any) -> None:
        key = None if run is None else run.run_id
        if key not in self._stills:
            self._stills[key] = StillOutputs(self.feed, key, alone=lambda: not self.pages)
        self._stills[key].place()
        self._shown_in = renderer.execution_count()

    def _live_bundle(self) -> Bundle:
        standing = self.feed.standing()
        of = f"run {standing.run_number} of " if standing.run_id else ""
        marks = "".join(f"{mark} · " for mark in self.feed.marks)
        line = f"{marks}Live panel of {of}{self.feed.client_id}: open in Jupyter"
        return view_bundle(self) | {"text/html": f"<p>{escaped(line)}</p>", "text/plain": line}

    # telling the page

    def send_status(self) -> float | None:
        now, status = self.feed.flusher.now(), self.status()
        lasting = {name: value for name, value in status.items() if name not in self._volatile}
        turned = lasting.get("state") != self._told.get("state")
        waited = now - self._told_at
        changed = lasting != self._told
        if turned or (changed and waited >= STATUS_SECONDS) or (status["active"] and waited >= HEARTBEAT):
            self._told, self._told_at, changed = lasting, now, False
            self.send({"t": "status"} | status)
        return STATUS_SECONDS if status["active"] or changed else None

    def stamp(self) -> dict[str, Any]:
        return super().stamp() | {"step": self.feed.standing().step}

    def greet(self, mounted: bool) -> None:
        super().greet(mounted)
        if mounted and self.pages > 1:
            for still in self._stills.values():
                still.lose()
        self._told_at = float("-inf")
        self._send_branches()

    def status(self) -> dict[str, Any]:
        standing = self.feed.standing()
        still = self._stills.get(standing.run_id)
        return super().status() | {
            "client": standing.client,
            "state": standing.state,
            "run": standing.run_number,
            "step": standing.step,
            "of": standing.planned,
            "elapsed": _rounded(standing.elapsed),
            "eta": _rounded(standing.eta),
            "queue": standing.queued,
            "op": standing.operation,
            "op_s": _rounded(standing.operation_seconds),
            "reason": standing.reason,
            "active": standing.active,
            "ended": standing.run_ended,
            "hint": still.hint if still is not None else None,
        }

    # branches

    def adopt(self, child: Any) -> None:
        """Show the panel of a branch under this one, and keep the branch until somebody fetches it."""
        self.feed.children.append(child)
        self._branches.append({"client": child.training_client_id, "model": panel_of(child).model_id})
        self._send_branches()

    def _send_branches(self) -> None:
        if self._branches:
            self.send({"t": "branches", "branches": self._branches})


def panel_of(source: Source, sections: Sequence[str] | None = None) -> Dashboard:
    """Return the one panel of a client, a run's client, or a recorded run; with `sections`, one of its own."""
    if sections is not None:
        return Dashboard(source, sections)
    feed = feed_of(source)
    if feed.panel is None or feed.panel.comm is None:  # a panel that was closed has no line to any page
        feed.panel = Dashboard(feed)
    return feed.panel  # type: ignore[no-any-return]


def check_sections(sections: Sequence[str]) -> None:
    """Refuse a section that there is not."""
    for section in (sections,) if isinstance(sections, str) else sections:
        if section not in SECTIONS:
            raise ValidationError(
                f"There is no section {section!r} of a panel; there are {', '.join(SECTIONS)}."
                f"{nearest(str(section), SECTIONS)}"
            )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
