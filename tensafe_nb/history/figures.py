"""Figures of curves, for a paper or a page: drawn by matplotlib, in whatever style its user has set."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from tensafe_nb import lifetimes
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.history.measured import Axis, Names, Reading
from tensafe_nb.history.table import OPERATOR_VIEW
from tensafe_nb.protocol.batch import Array

Band: TypeAlias = Literal["std", "sem", "range"]
Lines: TypeAlias = Mapping[
    str, Sequence[Reading]
]  # by label: one run, or several of which mean and band are drawn
AXES: Mapping[Axis, str] = {"step": "step", "tokens": "tokens trained on", "time": "seconds"}
SMOOTHING = 0.8  # that of the panel
MARKED_ROWS = 6  # of checkpoints, one above the other
WIDTH, HEIGHT = 6.4, 3.2  # inches of one panel
STYLES = ("-", "--", ":", "-.")


def draw(
    lines: Lines,
    names: Names | None,
    *,
    x: Axis = "step",
    smoothing: float | None = None,
    log: bool = False,
    band: Band = "std",
    axes: Any = None,
) -> Any:
    """Return a figure of lines, one for each label, and for each metric of a panel.

    Args:
        lines: What to draw; of several readings of one label, mean and band.
        names: See `Measured.plot`.
        x: Over what.
        smoothing: None smooths single runs as the panel does, and no bands.
        log: Values on a logarithmic scale.
        band: Around a mean: one standard deviation (n − 1), its standard error, or from the least to the greatest.
        axes: To draw into.

    Raises:
        ValidationError: Nothing to draw, an unknown metric, or numbers that do not fit.
    """
    if smoothing is not None and not 0 <= smoothing < 1:
        raise ValidationError(f"plot: smoothing={smoothing} must be at least 0 and below 1.")
    readings = [reading for group in lines.values() for reading in group]
    if not readings:
        raise ValidationError("There is no run to plot.")
    panels = panels_of(names, readings)
    for reading in readings:
        reading.check(name for panel in panels for name in panel if not _measured_by_some(name, readings))
    figure, places = places_for(len(panels), axes)
    for place, panel in zip(places, panels, strict=True):
        curves = [(label, name) for label in lines for name in panel]
        for label, name in curves:
            number = panel.index(name)
            named = (label if len(panel) == 1 else f"{label} · {name}") if len(readings) > 1 else name
            style = {
                "color": f"C{list(lines).index(label) if len(lines) > 1 else number}",
                "linestyle": STYLES[number % len(STYLES)],
                "label": named,
            }
            measured = [reading for reading in lines[label] if reading.has(name)]
            if len(measured) > 1:
                draw_band(place, measured, name, x, smoothing or 0.0, band, style)
            elif measured:
                weight = SMOOTHING if smoothing is None else smoothing
                draw_curve(place, measured[0], name, x, 0.0 if name.startswith("eval/") else weight, style)
        mark_checkpoints(place, lines, x)
        place.set_xlabel(AXES[x])
        if x == "step" and axes is None:
            place.xaxis.get_major_locator().set_params(integer=True)
        place.set_ylabel(panel[0] if len(panel) == 1 or _are_twins(panel) else ", ".join(panel))
        if log:
            place.set_yscale("log")
        if len(curves) > 1 or len(readings) > 1 or readings[0].checkpoints:
            place.legend()
    if any(reading.private for reading in readings):
        figure.supxlabel(OPERATOR_VIEW, fontsize="x-small")
    return figure


def draw_means(
    curves: Mapping[str, tuple[Array, Array, Array]], name: str, *, private: bool, axes: Any = None
) -> Any:
    """Return a figure of means, each in the band of its interval, one line for each label.

    Args:
        curves: By label: where it was measured, the mean there, and how far the interval reaches; each is (points,).
        name: What was measured.
        private: Whether it tells of private training data.
        axes: To draw into.

    Raises:
        ValidationError: Nothing to draw, or axes that do not fit.
    """
    if not any(len(at) for at, _, _ in curves.values()):
        raise ValidationError("There is nothing to plot: nothing has been measured yet.")
    figure, [place] = places_for(1, axes)
    for number, (label, (at, mean, reach)) in enumerate(curves.items()):
        dots = {"marker": "o", "markersize": 3} if name.startswith("eval/") or len(at) == 1 else {}
        style = {"color": f"C{number}", "linestyle": STYLES[number // 10 % len(STYLES)]}
        place.plot(at, mean, label=label, **style, **dots)
        place.fill_between(at, mean - reach, mean + reach, color=style["color"], alpha=0.2, linewidth=0)
    place.set_xlabel(AXES["step"])
    place.set_ylabel(name)
    place.legend()
    if private:
        figure.supxlabel(OPERATOR_VIEW, fontsize="x-small")
    return figure


def panels_of(names: Names | None, readings: Sequence[Reading]) -> list[list[str]]:
    """Return the metrics of each panel: `eval/NAME` joins `NAME`, and those of a tuple stay together."""
    if names is None:
        curve = readings[0].curve
        twin = f"eval/{curve}"
        return [[curve, twin] if _measured_by_some(twin, readings) else [curve]]
    panels: list[list[str]] = []
    for item in [names] if isinstance(names, str) else names:
        together = [item] if isinstance(item, str) else list(item)
        joined = isinstance(item, str) and next((p for p in panels if _are_twins([*p[:1], item])), None)
        if joined:
            joined.append(str(item))
        elif together:
            panels.append(together)
    if not panels or not all(isinstance(name, str) for panel in panels for name in panel):
        raise ValidationError(f"plot takes the names of metrics, not {as_given(names)}.")
    return panels


def _are_twins(panel: Sequence[str]) -> bool:
    return len(panel) == 2 and f"eval/{panel[0]}" == panel[1]


def _measured_by_some(name: str, readings: Iterable[Reading]) -> bool:
    return any(reading.has(name) for reading in readings)


def places_for(count: int, axes: Any) -> tuple[Any, list[Any]]:
    """Return the figure and the axes of so many panels: new ones, two side by side, or those that were given."""
    if axes is not None:
        places = list(axes.flat) if isinstance(axes, np.ndarray) and axes.size == count else axes
        given = list(places) if isinstance(places, list | tuple) else [places]
        if len(given) != count or not all(hasattr(place, "plot") for place in given):
            raise ValidationError(f"plot: axes={as_given(axes)} must be {count} of matplotlib's Axes.")
        return given[0].figure, given
    columns = min(count, 2)
    rows = math.ceil(count / columns)
    size: dict[str, Any] = {"figsize": (WIDTH * columns, HEIGHT * rows), "layout": "constrained"}
    if (
        lifetimes.in_notebook()
    ):  # pyplot is what teaches a notebook to show figures; one that is open shows twice
        from matplotlib import pyplot

        figure: Any = pyplot.figure(**size)
        pyplot.close(figure)
    else:
        from matplotlib.figure import Figure

        figure = Figure(**size)
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def draw_curve(
    place: Any, reading: Reading, name: str, x: Axis, smoothing: float, style: Mapping[str, Any]
) -> None:
    """Draw a curve as it was measured, faint where a smoothed one lies over it."""
    at, values = reading.points(name, x)
    dots = {"marker": "o", "markersize": 3} if name.startswith("eval/") or len(at) == 1 else {}
    if not smoothing or len(at) < 3:
        place.plot(at, values, **style, **dots)
        return
    place.plot(at, values, color=style["color"], alpha=0.3, linewidth=1)
    breaks = reading.breaks(name, x)
    for number, stretch in enumerate(stretches(at, breaks)):
        label = style["label"] if number == 0 else None
        place.plot(at[stretch], smoothed(values[stretch], smoothing), **{**style, "label": label})
    for step in breaks:
        place.axvline(step, color="0.5", linestyle=":", linewidth=1)


def draw_band(
    place: Any,
    readings: Sequence[Reading],
    name: str,
    x: Axis,
    smoothing: float,
    band: Band,
    style: Mapping[str, Any],
) -> None:
    """Draw the mean of several runs, and how far they lie apart."""
    at, values = aligned(
        [reading.points(name, x) for reading in readings], exact=x == "step"
    )  # (runs, points)
    if smoothing:
        values = np.array([smoothed(row, smoothing) for row in values])
    count = np.isfinite(values).sum(axis=0)
    shown = count > 0
    at, values, count = at[shown], values[:, shown], count[shown]
    mean = np.nanmean(values, axis=0)
    if band == "range":
        low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    else:
        apart = np.sqrt(np.nansum((values - mean) ** 2, axis=0) / np.maximum(count - 1, 1))
        apart = apart / np.sqrt(count) if band == "sem" else apart
        low, high = mean - apart, mean + apart
    (line,) = place.plot(at, mean, **{**style, "label": f"{style['label']} (n={len(readings)})"})
    place.fill_between(at, low, high, where=count > 1, color=line.get_color(), alpha=0.2, linewidth=0)


def aligned(curves: Sequence[tuple[Array, Array]], *, exact: bool) -> tuple[Array, Array]:
    """Return the places where any curve was measured, and the values of each there, NaN where it was not.

    Args:
        curves: Places and values of each.
        exact: Take measured values only; else those in between are interpolated, none outside of what was measured.
    """
    grid = np.unique(np.concatenate([at for at, _ in curves]))
    values = np.full((len(curves), len(grid)), np.nan)
    for number, (at, measured) in enumerate(curves):
        if exact:
            values[number, np.searchsorted(grid, at)] = measured
        elif len(at):
            values[number] = np.interp(grid, at, measured, left=np.nan, right=np.nan)
    return grid, values


def mark_checkpoints(place: Any, lines: Lines, x: Axis) -> None:
    """Mark at the foot of a panel where single runs saved checkpoints, each in the colour of its line, one row each."""
    label: str | None = "checkpoint"
    alone = [(number, group[0]) for number, group in enumerate(lines.values()) if len(group) == 1]
    for row, (number, reading) in enumerate(alone):
        places = reading.places(x)
        at = sorted({places[id(saved)] for saved in reading.checkpoints})
        if at:
            color = f"C{number}" if len(lines) > 1 else "0.5"
            foot = {"transform": place.get_xaxis_transform(), "linestyle": "none", "color": color}
            height = 0.03 + 0.04 * (row % MARKED_ROWS)
            place.plot(at, [height] * len(at), marker="D", markersize=4, label=label, **foot)
            label = None  # once in the legend


def stretches(at: Array, breaks: Sequence[float]) -> Iterable[Array]:
    """Return the stretches between breaks, as indices: what was measured differently is not joined."""
    parts = np.split(np.arange(len(at)), np.searchsorted(at, breaks))
    return [part for part in parts if part.size]


def smoothed(values: Array, weight: float = SMOOTHING) -> Array:
    """Return the bias-corrected exponential mean (Kingma and Ba 2015, section 3); non-finite values do not enter it."""
    result, mean, total = np.full(len(values), np.nan), 0.0, 0.0
    for index, value in enumerate(values):
        if np.isfinite(value):
            mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        if total:  # 1 − weightᵗ after t values: without it the mean would begin at 0
            result[index] = mean / total
    return result
