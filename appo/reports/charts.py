"""Charts as small SVG pictures that a page carries inside itself."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Blue, orange, green, magenta, brown, grey: told apart with the common kinds of colour blindness.
COLOURS = ("#2f62d8", "#d9730d", "#1a8a6a", "#b0378f", "#7a5a3a", "#5f6b7a")
INK, MUTED, RULE = "#1b2430", "#66717f", "#e3e7ec"

STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Segoe UI", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.parse_math": False,  # a dollar sign is a dollar sign
    "svg.fonttype": "none",  # text stays text: sharp, small and searchable
    "svg.hashsalt": "appo",  # the same run gives the same bytes
}


@dataclass(frozen=True)
class Series:
    """One line: its values by step, or single marked values (an evaluation) that are neither smoothed nor faded."""

    label: str
    colour: str
    steps: Sequence[int]
    values: Sequence[float]
    dashed: bool = False
    marked: bool = False


def smoothing_window(steps: int) -> int:
    """Over how many steps lines are averaged: a tenth of the run, at least 1."""
    return max(1, round(steps / 10))


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """Each value's mean with the up to ``window - 1`` before it."""
    return [sum(part) / len(part) for part in (values[max(0, i - window + 1) : i + 1] for i in range(len(values)))]


def draw_lines(
    axes: Any, series: Sequence[Series], *, window: int, percent: bool = False, floor: float | None = None
) -> None:
    """Lines over steps: the trailing mean drawn firmly over the raw values drawn faintly."""
    for line in series:
        style = "--" if line.dashed else "-"
        if line.marked:
            axes.plot(line.steps, line.values, "o-", color=line.colour, linewidth=1.1, markersize=5, zorder=4)
            continue
        if window > 1:
            axes.plot(line.steps, line.values, style, color=line.colour, linewidth=0.8, alpha=0.28)
        smooth = trailing_mean(line.values, window)
        lone = {"marker": "o", "markersize": 4} if len(smooth) == 1 else {}
        axes.plot(line.steps, smooth, style, color=line.colour, linewidth=1.9, solid_capstyle="round", zorder=3, **lone)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.margins(x=0.02, y=0.12)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        low, high = axes.get_ylim()
        axes.set_ylim(max(0.0, low) if floor is None else floor, min(1.02, high) if high > 0.25 else max(high, 0.05))
    elif floor is not None:
        axes.set_ylim(floor, max(axes.get_ylim()[1], floor + 1e-9))
    axes.set_xlabel("step", loc="right", fontsize=8, labelpad=1)


def line_chart(series: Sequence[Series], **options: Any) -> str:
    """A data URI with one panel of lines."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel()
        draw_lines(axes, series, **options)
        return data_uri(figure)


def stacked_chart(steps: Sequence[int], layers: Sequence[tuple[str, str, Sequence[float]]]) -> str:
    """A data URI with (label, colour, values by step) layers stacked over steps."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel()
        values = [values for _, _, values in layers]
        if len(steps) == 1:  # a single step has no width
            steps, values = [steps[0], steps[0] + 1], [[*layer, *layer] for layer in values]
        axes.stackplot(steps, values, colors=[colour for _, colour, _ in layers], linewidth=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0)
        axes.set_ylim(0, max(axes.get_ylim()[1], 1e-9))
        axes.set_xlabel("step", loc="right", fontsize=8, labelpad=1)
        return data_uri(figure)


def _panel() -> tuple[Figure, Any]:
    """A panel with margins that fit labels such as 0.0025; measuring each label would double the time a page takes."""
    figure = Figure(figsize=(4.0, 2.25))
    return figure, figure.add_axes((0.125, 0.165, 0.865, 0.81))


def save_row(panels: Sequence[tuple[str, Sequence[Series], dict[str, Any]]], path: Any) -> None:
    """A PNG with (title, lines, options) panels in a row and one legend, for use outside the page."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(panels), 2.7), layout="constrained")
        for index, (title, series, options) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), index + 1)
            draw_lines(axes, series, **options)
            axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
        labels = {line.label: line.colour for _, series, _ in panels for line in series if not line.dashed}
        if len(labels) > 1:
            handles = [matplotlib.lines.Line2D([], [], color=colour, linewidth=2) for colour in labels.values()]
            figure.legend(handles, list(labels), loc="outside lower center", ncols=len(labels), frameon=False)
        figure.savefig(path, dpi=160, facecolor="white")


def data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
