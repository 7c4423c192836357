"""The sections of the panel as widgets of their own, to be placed beside others: checkpoints, privacy, rollouts."""

from typing import Any, ClassVar, final

from tensafe_nb.widgets.feed.annotations import Part
from tensafe_nb.widgets.feed.feed import Source
from tensafe_nb.widgets.live.base import LiveWidget, css, esm
from tensafe_nb.widgets.still.words import Topic


class Section(LiveWidget):
    """A widget that shows one part of one training client."""

    _css = css("panel")

    def __init__(self, source: Source, **traits: Any) -> None:
        super().__init__(source, **traits)


@final
class CheckpointTable(Section):
    """The checkpoints there are: step, time, size, hash, how they are sealed, your own metadata, and what to do.

    Args:
        source: A training client, or one of its runs.

    Example:
        >>> CheckpointTable(tc)
    """

    _esm = esm("line", "wire", "place", "page", "alone", "table", "checkpoints")
    parts: ClassVar[tuple[Part, ...]] = ("rows",)
    topic: ClassVar[Topic] = "checkpoints"


@final
class PrivacyMeter(Section):
    """Spent ε and its budget, δ, accountant, adjacency and where it will end; "DP off" without differential privacy.

    A rollback never moves it back: what was spent stays spent.

    Args:
        source: A training client, or one of its runs.

    Example:
        >>> PrivacyMeter(tc)
    """

    _esm = esm("line", "wire", "place", "page", "alone", "meter", "privacy")
    parts: ClassVar[tuple[Part, ...]] = ("privacy",)
    topic: ClassVar[Topic] = "privacy"


@final
class RolloutInspector(Section):
    """The answers of the policy at a step, how they were scored, and what it was taught by them.

    Args:
        source: A run of `RLVRTrainer`, or its training client.
        traits: `selected_step`: the step to show; None follows the newest.

    Example:
        >>> RolloutInspector(run, selected_step=12)
    """

    _esm = esm("line", "wire", "place", "page", "alone", "samples", "inspector")
    parts: ClassVar[tuple[Part, ...]] = ("rollouts",)
    topic: ClassVar[Topic] = "samples"
