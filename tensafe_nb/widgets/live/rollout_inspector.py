"""The rollouts of a step, prompt by prompt and token by token."""

from typing import Any, ClassVar, final

from tensafe_nb.widgets.feed.annotations import Part
from tensafe_nb.widgets.feed.feed import Source
from tensafe_nb.widgets.live.base import LiveWidget, css, esm


@final
class RolloutInspector(LiveWidget):
    """What the policy answered at a step, how it was scored, and what it was taught by it.

    Args:
        source: A run of `RLVRTrainer`, or its training client.
        traits: `selected_step`: the step to show; None follows the newest.

    Example:
        >>> RolloutInspector(run, selected_step=12)
    """

    _esm = esm("wire", "page", "samples", "inspector")
    _css = css("panel")
    parts: ClassVar[tuple[Part, ...]] = ("rollouts",)

    def __init__(self, source: Source, **traits: Any) -> None:
        super().__init__(source, **traits)
