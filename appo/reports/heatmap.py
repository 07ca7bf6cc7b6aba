"""The picture of an inspection: rows of tokens over columns of frames, under the thumbnails, beside the weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from appo.reports.charts import INK, MUTED, STYLE

if TYPE_CHECKING:
    from appo.reports.inspection import Inspection

PICK, TRUTH, WEIGHT = "#d9730d", "#1a8a6a", "#f5a623"
BLUES = LinearSegmentedColormap.from_list("attention", ["#f6f7f9", "#b9cdf5", "#2f62d8", "#16306e"])
GAMMA = 0.7  # below 1, so that weak attention is seen beside strong
MAX_TOKENS = 80  # of a response; more cannot be read on a picture
ROW, THUMBNAIL, LABELS = 0.17, 0.62, 0.44  # inches


def save_heatmap(found: "Inspection", path: Path) -> Path:
    """Draw a right and a wrong response side by side; the first response alone where all are of one kind."""
    right = [i for i, value in enumerate(found.accuracy) if value >= 0.5]
    wrong = [i for i, value in enumerate(found.accuracy) if value < 0.5]
    chosen = [right[0], wrong[0]] if right and wrong else [0]
    count = max(1, *(min(MAX_TOKENS, len(found.tokens[i])) for i in chosen))
    columns = len(found.times)
    width, thumbnail = max(4.6, 1.9 + THUMBNAIL * columns), min(THUMBNAIL, 12 / columns)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        rows, pixels = found.thumbnails[0].shape[:2]
        strip_height = thumbnail * min(2.5, rows / pixels)
        size = (width * len(chosen), 1.5 + strip_height + ROW * count)
        layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01)
        figure = Figure(figsize=size, layout=layout)
        parts = figure.subfigures(1, len(chosen), squeeze=False)[0]
        for part, index in zip(parts, chosen, strict=True):
            grid = part.add_gridspec(
                2, 2, height_ratios=[strip_height + LABELS, ROW * count], width_ratios=[columns * thumbnail, 0.9]
            )
            strip, cells = part.add_subplot(grid[0, 0]), part.add_subplot(grid[1, 0])
            _thumbnails(strip, found, strip_height)
            _cells(cells, found, index)
            _weights(part.add_subplot(grid[1, 1], sharey=cells), found, index)
            length = len(found.tokens[index])
            notes = [f"first {MAX_TOKENS} of {length} tokens"] if length > MAX_TOKENS else []
            if found.answer:  # otherwise nobody knows
                notes.insert(0, "right" if found.accuracy[index] >= 0.5 else "wrong")
            title = f"Answer {index + 1}" + (f" ({', '.join(notes)})" if notes else "")
            part.suptitle(title, x=0.02, ha="left", fontsize=10.5, fontweight="bold", color=INK)
        if found.question:
            figure.suptitle(f"{found.question}\n", x=0.012, ha="left", fontsize=12, color=INK)
        figure.savefig(path, dpi=150, facecolor="white")
    return path


def _thumbnails(axes: Any, found: "Inspection", height: float) -> None:
    """The clip along the columns; picked frames in orange, those that decide the question over a green bar."""
    for index, picture in enumerate(found.thumbnails):
        axes.imshow(picture, extent=(index - 0.46, index + 0.46, 0.0, 1.0), aspect="auto", interpolation="nearest")
        if index in found.selected:
            frame = Rectangle((index - 0.46, 0), 0.92, 1, fill=False, edgecolor=PICK, linewidth=2.2, zorder=3)
            axes.add_patch(frame)
            axes.text(
                index,
                1 + 0.03 / height,
                "picked",
                ha="center",
                va="bottom",
                fontsize=6.5,
                color=PICK,
                fontweight="bold",
            )
        if index in found.labelled:
            axes.add_patch(Rectangle((index - 0.46, -0.08 / height), 0.92, 0.05 / height, color=TRUTH, linewidth=0))
        label = f"{found.times[index][0]:.1f} s"
        if found.videos[-1] > 0 and found.videos[index] != found.videos[index - 1]:  # the first frame of each video
            label += f"\nvideo {found.videos[index] + 1}"
        axes.text(index, -0.11 / height, label, ha="center", va="top", fontsize=6.5, color=MUTED)
    axes.set(xlim=(-0.5, len(found.times) - 0.5), ylim=(-0.26 / height, 1 + 0.18 / height))
    axes.axis("off")


def _cells(axes: Any, found: "Inspection", index: int) -> None:
    mass = found.mass[index][:MAX_TOKENS]
    tokens = found.tokens[index][:MAX_TOKENS]
    if not tokens:  # an empty answer keeps its place
        axes.axis("off")
        return
    finite = mass[np.isfinite(mass)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    # Cells that are no numbers stay white.
    shares = np.where(np.isfinite(mass), (mass - low) / max(high - low, 1e-12), np.nan)
    axes.imshow(shares**GAMMA, aspect="auto", cmap=BLUES, vmin=0, vmax=1)
    axes.set_xlabel(f"attention mass: lightest {low:.3g}, darkest {high:.3g}", fontsize=7, color=MUTED, loc="left")
    for frame in found.selected:
        axes.add_patch(Rectangle((frame - 0.5, -0.5), 1, len(tokens), fill=False, edgecolor=PICK, linewidth=1.2))
    axes.set_yticks(range(len(tokens)), [token[:18] for token in tokens], fontsize=7, color=INK)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)


def _weights(axes: Any, found: "Inspection", index: int) -> None:
    weights = np.nan_to_num(found.weights[index][:MAX_TOKENS], nan=1.0, posinf=1.0, neginf=1.0)
    if not weights.size:
        axes.axis("off")
        return
    axes.barh(range(len(weights)), np.maximum(weights - 1, 0), color=WEIGHT, height=0.66)
    for row, weight in enumerate(weights):
        if weight > 1.005:
            axes.text(weight - 1, row, f" {weight:.2f}", va="center", fontsize=6, color=MUTED)
    axes.set_xlim(0, max(0.1, (found.top_weight - 1) * 1.5))
    axes.tick_params(labelleft=False)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.set_title("weight W", fontsize=7.5, color=MUTED, loc="left", pad=3)
