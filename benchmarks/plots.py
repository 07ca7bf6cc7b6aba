"""Pictures of results: contests of ours, peers and lower bounds, and differences with their intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {"ours": "#1b6ca8", "peer": "#b0b0b0", "bound": "#2e8b57"}


def contests(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel per case: bars of time relative to our first row, each with its time and its extra memory."""
    figures = pyplot()
    cases = list(dict.fromkeys((row["op"], row["shape"], row["dtype"]) for row in rows))
    columns = min(2, len(cases))
    lines = -(-len(cases) // columns)
    figure, panels = figures.subplots(lines, columns, figsize=(6.4 * columns, 2.3 * lines), squeeze=False)
    for panel in panels.flat[len(cases) :]:
        panel.set_visible(False)
    for panel, case in zip(panels.flat, cases, strict=False):
        chosen = [row for row in rows if (row["op"], row["shape"], row["dtype"]) == case][::-1]
        times = [row["to_ours"] for row in chosen]
        bars = panel.barh([row["name"] for row in chosen], times, color=[COLOURS[row["role"]] for row in chosen])
        labels = [f"{row['to_ours']:.2g}x, {row['extra_bytes'] / 2**20:,.0f} MiB" for row in chosen]
        panel.bar_label(bars, labels, padding=3, fontsize=7)
        panel.set_xlim(0, 1.35 * max(times))
        operator, shape, dtype = case
        panel.set_title(f"{operator}, {dtype}\n", fontsize=9, loc="left", fontweight="bold")
        work = f"from {shape.split('/')[0]}: {chosen[0]['work']}"
        panel.text(0, 1.03, work, fontsize=6.5, transform=panel.transAxes)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("time, ours = 1 (bars: median; beside them: peak extra memory)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    figures.close(figure)


def differences(panels_by_title: Mapping[str, Sequence[tuple[str, float, float]]], path: Path) -> None:
    """A panel per title: (name, difference, half width of its interval) as a point with a bar, zero marked."""
    figures = pyplot()
    most = max(len(points) for points in panels_by_title.values())
    count = len(panels_by_title)
    figure, panels = figures.subplots(1, count, figsize=(4.8 * count, 1.2 + 0.3 * most), squeeze=False, sharey=True)
    for panel, (title, points) in zip(panels[0], panels_by_title.items(), strict=True):
        for place, (_, mean, width) in enumerate(points):
            clear = abs(mean) > width
            panel.errorbar(mean, place, xerr=width, fmt="o", color="#1b6ca8" if clear else "#808080", capsize=3)
        panel.axvline(0, color="0.5", linestyle="--", linewidth=1)
        panel.set_yticks(range(len(points)), [name for name, _, _ in points])
        panel.set_title(title, fontsize=9, loc="left", fontweight="bold")
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].invert_yaxis()
    figure.supxlabel("points of accuracy more than GRPO, mean and 95% interval; blue: zero is outside", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    figures.close(figure)


def pyplot() -> Any:
    """matplotlib's, for files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
