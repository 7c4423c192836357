"""One curve alone: loss or reward, to be placed beside other widgets."""

from typing import Any, final

from tensafe_nb.widgets.base import LiveWidget, css, esm
from tensafe_nb.widgets.feed import Source


@final
class LossCurve(LiveWidget):
    """The loss, or the reward where there is one, as a live curve; the held-out one dashed.

    Args:
        source: A training run or a training client.
        traits: `smoothing`.

    Example:
        >>> HBox([LossCurve(run), LossCurve(other_run)])
    """

    _esm = esm("wire", "chart", "curve")
    _css = css("panel")

    def __init__(self, source: Source, **traits: Any) -> None:
        super().__init__(source, **traits)
        self._told: dict[str, object] = {}

    def greet(self, mounted: bool) -> None:
        super().greet(mounted)
        self._told = {}

    def send_status(self) -> float | None:
        status = {"curve": self.feed.curve, "n": self._outbox.points}
        if status != self._told:
            self._told = dict(status)
            self.send({"t": "status"} | status)
        return None
