"""The panel of a training client: badge, curves, and the buttons of its latest run; all cells show the same one."""

from collections.abc import Sequence
from typing import Any, ClassVar, final

import traitlets

from tensafe_nb.errors import ValidationError, nearest
from tensafe_nb.widgets.feed.annotations import Part
from tensafe_nb.widgets.feed.feed import Source, feed_of
from tensafe_nb.widgets.live import neighbours
from tensafe_nb.widgets.live.base import CurveWidget, css, esm
from tensafe_nb.widgets.still.snapshot import publish

STATUS_SECONDS = 0.5  # between two messages about the same state
HEARTBEAT = 5.0  # s, while anything is under way
LOOK_SECONDS = 30.0  # between two looks at the other kernels of the notebook server
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

    _esm = esm(
        "line", "wire", "place", "page", "chart", "download", "curves", "table", "samples", "meter", "panel"
    )
    _css = css("panel")
    _volatile: ClassVar = ("elapsed", "eta", "op_s", "silent")  # what the page counts on by itself
    parts: ClassVar[tuple[Part, ...]] = ("marks", "alarms", "privacy", "rows", "rollouts")
    all_curves = True

    sections = traitlets.List(
        traitlets.Unicode(), help="The sections to show; empty for all that have something."
    ).tag(sync=True)

    def __init__(self, source: Source, sections: Sequence[str] | None = None, **traits: Any) -> None:
        check_sections(sections or ())
        self._live_ids: list[str] = []
        self._told_at = float("-inf")
        self._branches: list[dict[str, str]] = []
        self._crowding: dict[str, Any] | None = None
        self._looked_at = float("-inf")
        super().__init__(source, sections=list(sections or ()), **traits)

    # showing

    def show(self, run: Any = None) -> None:
        """Show the panel in the calling cell, with the part that stays in the file above it."""
        self.place_still(run or self.feed.latest)
        identity = f"{self.model_id}-{len(self._live_ids)}"
        self._live_ids.append(identity)
        publish(self.live_bundle(), {}, identity)

    def retire(self) -> None:
        """Turn the live part into one line of text, where the page still knows the outputs."""
        text = f"The live panel of {self.feed.client_id} was frozen."
        for identity in self._live_ids:
            publish({"text/plain": text}, {}, identity, update=True)
        self._live_ids.clear()

    @property
    def word(self) -> str:
        return "panel"

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
        if status["active"] and now - self._looked_at >= LOOK_SECONDS:
            self._look_around()
        return STATUS_SECONDS if status["active"] or changed else None

    def stamp(self) -> dict[str, Any]:
        return super().stamp() | {"step": self.feed.standing().step}

    def greet(self, page: object) -> None:
        super().greet(page)
        self._told_at = float("-inf")
        self._send_branches()
        self._look_around()

    def status(self) -> dict[str, Any]:
        standing = self.feed.standing()
        return super().status() | {
            "client": standing.client,
            "state": standing.state,
            "run": standing.run_number,
            "name": standing.name,
            "prompts": standing.prompts and f" · prompts: {standing.prompts}",
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
            "run_id": standing.run_id,
            "now": None
            if standing.client_step is None
            else {"step": standing.client_step, "loaded": standing.loaded},
            "foreign": self._commands.is_foreign,
            "silent": _rounded(self.feed.silence) if self._commands.is_foreign else None,
            "line": standing.line,
            "line_reason": standing.line_reason,
            "replicas": standing.replicas,
            "other": self._crowding,
        }

    # other kernels

    def _look_around(self) -> None:
        """Look whether another kernel leaves too little memory for this one."""
        self._looked_at = self.feed.flusher.now()

        def look() -> None:
            self._crowding = neighbours.crowding()

        self._aside(look)

    def _carry_out(self, number: int, command: str, content: dict[str, Any]) -> None:
        super()._carry_out(number, command, content)
        if command == "shutdown":
            self._look_around()

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
    if feed.panel is None or feed.panel.is_cut_off:
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
