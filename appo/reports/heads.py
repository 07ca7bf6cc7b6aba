"""The heads that look at the video: a picture of layers x heads, and the numbers as a table."""

import csv
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from appo.reports.charts import MUTED, STYLE
from appo.reports.heatmap import BLUES
from appo.train.looking import HeadShares

COLUMNS = ("layer", "head", "video", "labelled_share", "labelled_chance")


def write_heads(shares: HeadShares, folder: Path) -> list[Path]:
    """Write ``heads.png`` and ``heads.csv`` into ``folder`` and return their paths.

    The table has a line for each layer and head, those that look most first: the share of attention on the video, and,
    where the frames that decide are known, the share of that on them, and what that share would be by chance.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [_picture(shares, folder / "heads.png"), _table(shares, folder / "heads.csv")]


def ranked(shares: HeadShares) -> list[dict[str, Any]]:
    """A row of ``COLUMNS`` for each layer and head, by falling share of attention on the video."""
    rows = [
        dict.fromkeys(COLUMNS, "")
        | {"layer": layer, "head": head, "video": float(shares.video[place, head])}
        | (
            {}
            if shares.labelled_share is None
            else {"labelled_share": float(shares.labelled_share[place, head]), "labelled_chance": shares.chance}
        )
        for place, layer in enumerate(shares.layers)
        for head in range(shares.video.shape[1])
    ]
    return sorted(rows, key=lambda row: -row["video"])


def _table(shares: HeadShares, path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in ranked(shares):
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            )
    return path


def _picture(shares: HeadShares, path: Path) -> Path:
    panels = [("Attention on the video", shares.video)]
    if shares.labelled_share is not None:
        panels.append((f"Of that, on deciding frames (by chance {shares.chance:.0%})", shares.labelled_share))
    depth, heads = shares.video.shape
    size = ((1.6 + max(2.4, 0.16 * heads)) * len(panels), 1.1 + max(1.2, 0.16 * depth))
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=size, layout="constrained")
        for axes, (title, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            image = axes.imshow(values.numpy(), cmap=BLUES, vmin=0, aspect="auto", interpolation="nearest")
            axes.set_title(title, fontsize=9, loc="left")
            axes.set_xlabel("head")
            axes.set_ylabel("layer", color=MUTED)
            places = [
                int(tick) for tick in MaxNLocator(12, integer=True).tick_values(0, depth - 1) if 0 <= tick < depth
            ]
            axes.set_yticks(places, [str(shares.layers[place]) for place in places])
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1.0, decimals=None), pad=0.02)
            bar.outline.set_visible(False)
        figure.savefig(path, dpi=160, metadata={"Software": ""})
    return path
