"""Figures: what is drawn is what was measured, and what a plot cannot draw is refused."""

from pathlib import Path

import numpy as np
import pytest

from tensafe_nb.errors import ValidationError
from tensafe_nb.events import Metrics
from tensafe_nb.history.figures import aligned, draw, panels_of, smoothed
from tests.unit.history.test_measured import begun, core, log_of, own, saved


def test_a_figure_has_the_curve_raw_and_smoothed_its_twin_and_the_checkpoints(tmp_path: Path) -> None:
    losses = [5.0, 3.0, 4.0, 2.0]
    history = log_of(
        tmp_path, begun(1), *[core(n, loss) for n, loss in enumerate(losses, 1)], own(4, **{"eval/loss": 2.5}),
        saved("art-4", 4),
    )  # fmt: skip
    (axes,) = history.plot().axes
    raw, smooth, held_out, checkpoints = axes.lines
    assert raw.get_ydata().tolist() == losses and raw.get_xdata().tolist() == [1, 2, 3, 4]
    assert smooth.get_ydata().tolist() == smoothed(np.array(losses), 0.8).tolist()
    assert held_out.get_ydata().tolist() == [2.5] and checkpoints.get_xdata().tolist() == [4]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["loss", "eval/loss", "checkpoint"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss")
    assert len(history.plot(smoothing=0).axes[0].lines) == 3


def test_each_metric_has_a_panel_and_tuples_share_one(tmp_path: Path) -> None:
    history = log_of(tmp_path, begun(1), core(1, 5.0), own(1, **{"eval/loss": 2.5}))
    reading = [history.reading()]
    assert panels_of(["loss", "tokens", "eval/loss"], reading) == [["loss", "eval/loss"], ["tokens"]]
    assert panels_of([("loss", "tokens")], reading) == [["loss", "tokens"]]
    assert panels_of(None, reading) == [["loss", "eval/loss"]]
    for wrong in ([], [3], 7):
        with pytest.raises(ValidationError):
            history.plot(wrong)  # type: ignore[arg-type]


def test_curves_stand_over_tokens_and_seconds_as_well(tmp_path: Path) -> None:
    history = log_of(tmp_path, begun(1), core(1, 5.0), core(2, 4.0), core(3, 3.0))
    assert history.plot("loss", x="tokens").axes[0].lines[0].get_xdata().tolist() == [8, 16, 24]
    seconds = history.plot("loss", x="time").axes[0].lines[0].get_xdata()
    assert seconds[0] == 0 and (np.diff(seconds) >= 0).all()
    with pytest.raises(ValidationError, match="x='epoch' must be 'step' or"):
        history.plot("loss", x="epoch")  # type: ignore[arg-type]
    without = log_of(tmp_path, begun(1, client="tc-2"), own(1, client="tc-2", accuracy=1.0), client="tc-2")
    with pytest.raises(ValidationError, match="has not measured 'tokens'"):
        without.plot("accuracy", x="tokens")


def test_a_figure_is_drawn_into_axes_of_ones_own(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    history = log_of(tmp_path, begun(1), core(1, 5.0))
    mine = Figure().subplots(1, 2)
    assert history.plot(["loss", "tokens"], axes=mine, log=True) is mine[0].figure
    assert mine[1].get_yscale() == "log"
    with pytest.raises(ValidationError, match="must be 1 of matplotlib's Axes"):
        history.plot("loss", axes=mine)
    with pytest.raises(ValidationError, match="smoothing=1"):
        history.plot("loss", smoothing=1)


def test_a_band_is_the_mean_of_runs_and_how_far_they_lie_apart(tmp_path: Path) -> None:
    readings = [
        log_of(tmp_path, begun(1, client=name), core(1, low), core(2, high), client=name).reading()
        for name, low, high in (("tc-1", 1.0, 4.0), ("tc-2", 3.0, 8.0))
    ]
    readings[1].rows.pop()  # the second has measured nothing there
    (axes,) = draw({"lr 1": readings}, "loss").axes
    (mean,) = axes.lines
    assert mean.get_ydata().tolist() == [2.0, 4.0] and mean.get_label() == "lr 1 (n=2)"
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((2 - np.sqrt(2), 2 + np.sqrt(2)))
    vertices = draw({"": readings}, "loss", band="range").axes[0].collections[0].get_paths()[0].vertices
    assert (vertices[:, 1].min(), vertices[:, 1].max()) == (1.0, 3.0)


def test_several_runs_have_their_checkpoints_in_their_colours_and_bands_have_none(tmp_path: Path) -> None:
    first, second = [
        log_of(tmp_path, begun(1, client=name), core(1, 3.0), core(2, 2.0), saved(f"art-{name}", 2, f"{name}/1"),
               client=name).reading()
        for name in ("tc-1", "tc-2")
    ]  # fmt: skip
    axes = draw({"first": [first], "second": [second]}, "loss", smoothing=0).axes[0]
    curves, marks = axes.lines[:2], axes.lines[2:]
    assert [mark.get_color() for mark in marks] == [curve.get_color() for curve in curves]
    assert len({mark.get_ydata()[0] for mark in marks}) == 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["first", "second", "checkpoint"]
    assert len(draw({"both": [first, second]}, "loss").axes[0].lines) == 1


def test_curves_of_other_places_are_interpolated_only_between_what_was_measured() -> None:
    grid, values = aligned(
        [(np.array([0.0, 2.0]), np.array([0.0, 2.0])), (np.array([1.0, 3.0]), np.array([5.0, 7.0]))],
        exact=False,
    )
    assert grid.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(values, [[0, 1, 2, np.nan], [np.nan, 5, 6, 7]])


def test_nothing_is_averaged_across_a_new_reward(tmp_path: Path) -> None:
    steps = [
        Metrics(step=n, values={"reward": r, "reward_version": v}, run_id="tc-1/1")
        for n, (r, v) in enumerate([(1, 1), (1, 1), (1, 1), (9, 2), (9, 2)], 1)
    ]
    axes = log_of(tmp_path, begun(1), *steps).plot("reward").axes[0]
    assert [line.get_ydata().tolist() for line in axes.lines[1:3]] == [[1, 1, 1], [9, 9]]
    assert axes.lines[3].get_xdata() == [4, 4]
