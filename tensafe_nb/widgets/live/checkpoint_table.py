"""The checkpoints of a training client as a table: load, branch, export, delete."""

from typing import Any, ClassVar, final

from tensafe_nb.widgets.feed.annotations import Part
from tensafe_nb.widgets.feed.feed import Source
from tensafe_nb.widgets.live.base import LiveWidget, css, esm


@final
class CheckpointTable(LiveWidget):
    """The checkpoints there are: step, time, size, hash, how they are sealed, your own metadata, and what to do.

    Args:
        source: A training client, or one of its runs.

    Example:
        >>> CheckpointTable(tc)
    """

    _esm = esm("wire", "page", "table", "checkpoints")
    _css = css("panel")
    parts: ClassVar[tuple[Part, ...]] = ("rows",)

    def __init__(self, source: Source, **traits: Any) -> None:
        super().__init__(source, **traits)
