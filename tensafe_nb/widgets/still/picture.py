"""The picture that stays in the file: drawn by matplotlib, on white, in few colours, never with a spike left out."""

import io
from typing import Any

import numpy as np

from tensafe_nb.history.figures import smoothed, stretches
from tensafe_nb.protocol.batch import Array
from tensafe_nb.widgets.feed.feed import Feed

COLUMNS = 900  # of the picture; a longer curve is drawn as the extremes per column, so no spike is lost
BLUE, ORANGE, GREY = "#2a7de1", "#c9661a", "#777777"


def draw(feed: Feed, names: tuple[str, str], title: str) -> bytes | None:
    """Return a PNG of a curve, its held-out twin and the marks along them; None where there is nothing to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    history = feed.history
    name, held_out = names
    steps, values = history.series(name)
    if not len(steps):
        return None
    figure = Figure(figsize=(9.6, 3.0), dpi=100, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    marks = feed.annotations.marks()  # (step, kind, what)
    breaks = [step for step, kind, _ in marks if kind == "v" and "reward" in name]
    for piece in abandoned(
        steps
    ):  # faint, beneath the rest: what a rollback gave up was trained all the same
        axes.plot(*extremes(steps[piece], values[piece]), color=BLUE, alpha=0.2, linewidth=1)
    steps, values = (column[current(steps)] for column in (steps, values))
    for number, stretch in enumerate(stretches(steps, breaks)):
        axes.plot(*extremes(steps[stretch], values[stretch]), color=BLUE, alpha=0.35, linewidth=1)
        label = name if number == 0 else None
        axes.plot(*extremes(steps[stretch], smoothed(values[stretch])), color=BLUE, linewidth=2, label=label)
    if held_out in history:
        measured, points = history.series(held_out)
        measured, points = (column[current(measured)] for column in (measured, points))
        for number, stretch in enumerate(stretches(measured, breaks)):
            axes.plot(
                measured[stretch],
                points[stretch],
                color=ORANGE,
                linestyle="--",
                marker="o",
                markersize=3,
                label=held_out if number == 0 else None,
            )
    draw_marks(axes, marks, breaks)
    style_axes(axes, title)
    return png_of(FigureCanvasAgg(figure))


def draw_marks(axes: Any, marks: list[tuple[int, str, str]], breaks: list[int]) -> None:
    at_the_bottom = axes.get_xaxis_transform()
    for kind, marker, label in (("c", "D", "checkpoint"), ("f", "^", "branch")):
        steps = [step for step, which, _ in marks if which == kind]
        if steps:
            axes.plot(
                steps,
                [0.03] * len(steps),
                transform=at_the_bottom,
                linestyle="none",
                marker=marker,
                markersize=5,
                color=GREY,
                label=label,
            )
    for step in breaks:
        axes.axvline(step, color=GREY, linestyle=":", linewidth=1)


def png_of(canvas: Any) -> bytes:
    """Return what is drawn, in 64 colours: half the size, and notebooks keep every byte."""
    from PIL import Image

    canvas.draw()
    target = io.BytesIO()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")  # (300, 960, 3)
    pixels.quantize(64, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        target, "PNG", optimize=True
    )
    return target.getvalue()


def style_axes(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left", color="#444444")
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=9, length=0)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.legend(fontsize=9, frameon=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def current(steps: Array) -> Array:
    """Return which points belong to the curve as it stands: after a rollback, not those that were abandoned."""
    # The least step that comes after each point: a point is current if no later one stands before it.
    later = np.append(np.minimum.accumulate(steps[::-1])[::-1][1:], np.iinfo(np.int64).max)
    kept: Array = steps < later
    return kept


def abandoned(steps: Array) -> list[Array]:
    """Return the stretches of points that rollbacks have left behind, as indices."""
    left = np.flatnonzero(~current(steps))
    return [gap for gap in np.split(left, np.flatnonzero(np.diff(left) > 1) + 1) if gap.size]


def extremes(steps: Array, values: Array, columns: int = COLUMNS) -> tuple[Array, Array]:
    """Return the least and the greatest value of each of `columns` stretches, in order, if there are more points."""
    if len(steps) <= 2 * columns:
        return steps, values
    kept: list[int] = []
    for column in np.array_split(np.arange(len(steps)), columns):  # of pixels
        finite = column[np.isfinite(values[column])]  # indices
        if len(finite):
            low, high = finite[np.argmin(values[finite])], finite[np.argmax(values[finite])]
            kept += sorted({int(low), int(high)})
    return steps[kept], values[kept]
