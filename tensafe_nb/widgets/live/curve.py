"""Charts that stand alone, of a loss or a reward, to be placed beside other widgets; several runs on the same axes."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, final

import traitlets

from tensafe_nb.errors import ValidationError
from tensafe_nb.runs.record import RunRecord
from tensafe_nb.runs.run import TrainingRun
from tensafe_nb.widgets.feed.annotations import Part
from tensafe_nb.widgets.feed.feed import Source, feed_of
from tensafe_nb.widgets.feed.recording import RecordedRun
from tensafe_nb.widgets.live.base import CurveWidget, css, esm
from tensafe_nb.widgets.still.words import Subject

MOST_CURVES = 6  # colours that can be told apart on light and dark


class LoneCurve(CurveWidget):
    """A widget that is one chart: what LossCurve and RewardHistory share."""

    _css = css("panel")
    parts: ClassVar[tuple[Part, ...]] = ("marks",)

    labels = traitlets.List(traitlets.Unicode(), help="Names of the runs that are compared.").tag(sync=True)

    def __init__(self, *sources: Source, **traits: Any) -> None:
        if len(sources) > MOST_CURVES:
            raise ValidationError(
                f"{len(sources)} runs on one chart cannot be told apart by colour: give at most {MOST_CURVES}. "
                f"tensafe_nb.plot_runs draws any number, and those of one setting as a band."
            )
        for source in sources:
            feed_of(source)  # refuses what has no curves
        super().__init__(*sources, **({"labels": labels_of(sources)} | traits))

    @property
    def subject(self) -> Subject:
        return Subject(tuple(self.feeds), "curves", tuple(self.labels), self.curve)

    def status(self) -> dict[str, Any]:
        return super().status() | {"curve": self.curve}

    @property
    @abstractmethod
    def curve(self) -> str:
        """The metric that is drawn."""


@final
class LossCurve(LoneCurve):
    """The loss, or the reward where there is one, as a live curve; the held-out one dashed.

    Args:
        sources: A training run or a training client, and others to compare with on the same axes.
        traits: `smoothing`, `log_scale`, `x_axis`, `selected_step`, `labels`.

    Raises:
        ValidationError: More than six runs (`tn.plot_runs` draws more), or something that is none.

    Example:
        >>> LossCurve(run, other_run)
        >>> HBox([LossCurve(run), LossCurve(other_run, log_scale=True)])
    """

    _esm = esm("line", "wire", "place", "page", "alone", "chart", "download", "curves", "curve")

    @property
    def curve(self) -> str:
        return self.feed.curve


@final
class RewardHistory(LoneCurve):
    """The reward with everything that tells how a run with rewards is doing: signal, length, entropy, KL, update size.

    Args:
        source: A run of `RLVRTrainer`, or its training client.
        traits: `smoothing`, `log_scale`, `x_axis`, `selected_step`.

    Example:
        >>> history, inspector = RewardHistory(run), RolloutInspector(run)
        >>> jslink((history, "selected_step"), (inspector, "selected_step"))
        >>> VBox([history, inspector])
    """

    _esm = esm("line", "wire", "place", "page", "alone", "chart", "download", "curves", "rewards")
    all_curves = True

    def __init__(self, source: Source, **traits: Any) -> None:
        super().__init__(source, **traits)

    @property
    def curve(self) -> str:
        return "reward"


def labels_of(sources: Sequence[Source]) -> list[str]:
    """Return how sources are told from each other on the same axes: by their names where these do that."""
    names = [name_of(source) for source in sources]
    return [
        label_of(source) if name is None or names.count(name) > 1 else name
        for name, source in zip(names, sources, strict=True)
    ]


def name_of(source: Source) -> str | None:
    """Return what a run is called, with its marks."""
    if isinstance(source, RecordedRun):
        return source.record.name and " ".join([*source.client.marks, source.record.name])
    return source.name if isinstance(source, TrainingRun | RunRecord) else None


def label_of(source: Source) -> str:
    """Return a label that is its source's alone."""
    if isinstance(source, TrainingRun | RunRecord | RecordedRun):
        marks = "".join(f"{mark} " for mark in source.client.marks) if isinstance(source, RecordedRun) else ""
        return f"{marks}run {source.run_id.rpartition('/')[2]} of {source.run_id.partition('/')[0]}"
    client: Any = getattr(source, "client", source)
    return str(client.training_client_id)
