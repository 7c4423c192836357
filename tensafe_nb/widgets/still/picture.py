"""The picture that stays in the file: drawn by matplotlib, in few colours, readable on white and on black."""

import io
from typing import Any

import numpy as np

from tensafe_nb.history.figures import smoothed, stretches
from tensafe_nb.history.log import RunHistory
from tensafe_nb.protocol.batch import Array
from tensafe_nb.widgets.still.words import Subject, current, current_of, led_of

COLUMNS = 900  # of the picture; a longer curve is drawn as the extremes per column, so no spike is lost
BLUE, ORANGE, GREY = "#2a7de1", "#c9661a", "#777777"
INK = "#787878"  # 4.4:1 on white, 4.3:1 on the black of dark themes: no viewer says which of them it has
COLOURS = (BLUE, ORANGE, "#1f8f5f", "#a04fc0", "#8a6d00", "#c23b5a")  # of training clients side by side
DASHES = ("-", "--", ":", "-.", "--", ":")


def draw(subject: Subject, title: str) -> bytes | None:
    """Return a PNG of a curve, its held-out twin and the marks along them; None where there is nothing to draw.

    Several training clients stand on the same axes, each in its colour. The words of the title are in the file as well,
    as the PNG's Description.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curve = subject.curve
    is_measured = any(curve in feed.history for feed in subject.feeds)
    if not is_measured and not any(feed.history.names for feed in subject.feeds):
        return None
    figure = Figure(figsize=(9.6, 3.0), dpi=100, layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    if not is_measured:  # something was, and it is not what was asked for
        return png_of_nothing(FigureCanvasAgg(figure), axes, curve, title)
    first = subject.feeds[0]
    marks = first.annotations.marks()  # (step, kind, what)
    breaks = [step for step, kind, _ in marks if kind == "v" and "reward" in curve]
    if len(subject.feeds) == 1:
        draw_curve(axes, first.history, curve, BLUE, curve, breaks)
        draw_held_out(axes, first.history, f"eval/{curve}", breaks)
    else:
        for number, feed in enumerate(subject.feeds):
            draw_curve(axes, feed.history, curve, COLOURS[number], subject.labels[number], [], DASHES[number])
    draw_marks(axes, marks, breaks)
    style_axes(axes, title)
    return png_of(FigureCanvasAgg(figure), title)


def png_of_nothing(canvas: Any, axes: Any, curve: str, title: str) -> bytes:
    """Return a picture that says that there is no such curve, in place of one that is missing without a word."""
    words = f"No {curve} was measured so far."
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", fontsize=11, color=INK)
    axes.set_title(title, fontsize=9, loc="left", color=INK)
    axes.set_axis_off()
    return png_of(canvas, f"{words} {title}")


def draw_curve(
    axes: Any, history: RunHistory, name: str, colour: str, label: str, breaks: list[int], dash: str = "-"
) -> None:
    """Draw a curve raw and smoothed; faint, beneath the rest, what a rollback gave up: it was trained all the same."""
    steps, values = history.series(name)
    kept = current(steps, led_of(history, name, len(steps)))
    for piece in abandoned(steps, kept):
        axes.plot(*extremes(steps[piece], values[piece]), color=colour, alpha=0.2, linewidth=1)
    steps, values = steps[kept], values[kept]
    for number, stretch in enumerate(stretches(steps, breaks)):
        axes.plot(*extremes(steps[stretch], values[stretch]), color=colour, alpha=0.35, linewidth=1)
        axes.plot(
            *extremes(steps[stretch], smoothed(values[stretch])),
            color=colour, linestyle=dash, linewidth=2, label=label if number == 0 else None,
        )  # fmt: skip


def draw_held_out(axes: Any, history: RunHistory, name: str, breaks: list[int]) -> None:
    """Draw what was measured on held-out data, dashed."""
    steps, values = current_of(history, name)
    for number, stretch in enumerate(stretches(steps, breaks)):
        axes.plot(
            steps[stretch],
            values[stretch],
            color=ORANGE,
            linestyle="--",
            marker="o",
            markersize=3,
            label=name if number == 0 else None,
        )


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


def png_of(canvas: Any, words: str) -> bytes:
    """Return what is drawn, on no ground of its own, with its words.

    In 96 colours: half the size, and notebooks keep every byte.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    canvas.draw()
    info = PngInfo()
    info.add_itxt("Description", words)
    target = io.BytesIO()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba()))  # (300, 960, 4)
    pixels.quantize(96, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        target, "PNG", optimize=True, pnginfo=info
    )
    return target.getvalue()


def style_axes(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left", color=INK)
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.tick_params(labelsize=9, length=0, labelcolor=INK)
    axes.grid(color=INK, alpha=0.25, linewidth=0.8)
    axes.legend(fontsize=9, frameon=False, labelcolor=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(INK)


def abandoned(steps: Array, kept: Array) -> list[Array]:
    """Return the stretches of points that rollbacks have left behind, as indices; each goes forwards only."""
    left = np.flatnonzero(~kept)
    return [
        gap
        for gap in np.split(left, np.flatnonzero((np.diff(left) > 1) | (np.diff(steps[left]) <= 0)) + 1)
        if gap.size
    ]


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
