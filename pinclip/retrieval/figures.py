"""The report's curves and histograms, as inline SVG that follows the page's light or dark colours.

matplotlib draws with fixed stand-in colours, which are then replaced by the page's CSS variables; text stays
text, in the page's font. No state of matplotlib's is changed for anyone else.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

_POINTS = 240
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_SERIES = ["#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04", "#0a0a05", "#0a0a06"]
_CSS = {_INK: "--ink", _MUTED: "--muted", _GRID: "--rule"} | {
    stand_in: f"--series-{index + 1}" for index, stand_in in enumerate(_SERIES)
}
_RC = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": _INK,
    "lines.solid_capstyle": "round",
}

Series = tuple[Sequence[float], Sequence[float]]


def curves(
    name: str,
    series: Mapping[str, Series],
    *,
    smooth: bool = False,
    markers: bool = False,
    levels: Mapping[str, float] | None = None,
    from_zero: bool = False,
) -> str:
    """An SVG of lines over training steps.

    name: unique in the page (it prefixes the ids). series: {label: (steps, values)}, at most six.
    smooth: a faint line for the values and a strong one for their running mean (`running_mean`).
    markers: dots at the values. levels: {label: y}, dashed horizontal lines. from_zero: y begins at 0.
    Long series are averaged down to 240 points; the picture is the same to the eye.
    """
    with matplotlib.rc_context(_RC):
        figure, axes = _figure()
        for colour, (label, (steps, values)) in zip(_SERIES, series.items()):
            x, y = thin(np.asarray(steps, float), np.asarray(values, float))
            if smooth and len(y) > 8:
                axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
                y = running_mean(y)
            style = {"marker": "o", "markersize": 3.5} if markers or len(y) == 1 else {}
            axes.plot(x, y, color=colour, linewidth=1.7, label=label, **style)
        for label, level in (levels or {}).items():
            axes.axhline(level, color=_MUTED, linewidth=1.1, linestyle=(0, (3, 3)), label=label)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        if from_zero:
            axes.set_ylim(bottom=0)
        if len(series) + len(levels or {}) > 1:
            _legend(axes)
        return _svg(figure, name)


def histogram(name: str, values: np.ndarray, x_label: str, y_label: str) -> str:
    """An SVG of how often each count >= 1 occurs; bins widen geometrically where the counts reach far."""
    values = np.asarray(values)
    with matplotlib.rc_context(_RC):
        figure, axes = _figure()
        edges = count_bins(int(values.max()) if len(values) else 1)
        heights, _ = np.histogram(values, edges)
        axes.bar(np.arange(len(heights)), heights, width=0.86, color=_SERIES[0])
        labels = [f"{a:,}" if b - a == 1 else f"{a:,}–{b - 1:,}" for a, b in itertools.pairwise(edges)]
        every = -(-len(labels) // 6)
        axes.set_xticks(np.arange(len(labels))[::every], labels[::every])
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        return _svg(figure, name)


def count_bins(largest: int, at_most: int = 14) -> np.ndarray:
    """Integer edges from 1 to beyond `largest`: steps of one where that fits, else growing by a ratio."""
    if largest <= at_most:
        return np.arange(1, largest + 2)
    return np.unique(np.rint(np.geomspace(1, largest + 1, at_most)).astype(np.int64))


def running_mean(values: np.ndarray, share: float = 0.06) -> np.ndarray:
    """Mean over a centred window of `share` of the series (at least 3 values), cut off at the ends."""
    half = max(1, round(len(values) * share / 2))
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half, len(values) - 1)
    return (total[last + 1] - total[first]) / (last - first + 1)


def thin(x: np.ndarray, y: np.ndarray, points: int = _POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` points: means of consecutive, nearly equal groups."""
    if len(x) <= points:
        return x, y
    groups = np.array_split(np.arange(len(x)), points)
    return np.array([x[g].mean() for g in groups]), np.array([y[g].mean() for g in groups])


def _figure():
    figure = Figure(figsize=(4.9, 2.9), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    return figure, axes


def _legend(axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=3,
        frameon=False,
        handlelength=1.2,
        columnspacing=1.2,
        borderpad=0,
        fontsize=9,
    )


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # The style element would reach the whole page, and the text shall be in the page's font.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|font-family:[^;]*; ", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"| height="[^"]*pt"', r"\1", text, count=2)
    text = re.sub(r'(\bid="|"#|url\(#)', lambda match: f"{match[1]}{name}-", text)
    for stand_in, variable in _CSS.items():
        text = text.replace(stand_in, f"var({variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
