"""How much of the privacy budget is spent, or that there is none."""

from typing import Any, ClassVar, final

from tensafe_nb.widgets.feed.annotations import Part
from tensafe_nb.widgets.feed.feed import Source
from tensafe_nb.widgets.live.base import LiveWidget, css, esm


@final
class PrivacyMeter(LiveWidget):
    """Spent ε and its budget, δ, accountant, adjacency and where it will end; "DP off" without differential privacy.

    A rollback never moves it back: what was spent stays spent.

    Args:
        source: A training client, or one of its runs.

    Example:
        >>> PrivacyMeter(tc)
    """

    _esm = esm("wire", "page", "meter", "privacy")
    _css = css("panel")
    parts: ClassVar[tuple[Part, ...]] = ("privacy",)

    def __init__(self, source: Source, **traits: Any) -> None:
        super().__init__(source, **traits)
