"""The page of a matrix: accuracy by perceiver and reasoner, what a better one of each brings, and costs."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from appo.evaluation.intervals import Estimate, difference, estimate
from appo.evaluation.matrix import Matrix
from appo.evaluation.scoring import shown, video_of
from appo.reports.charts import COLOURS, STYLE, data_uri
from appo.reports.markup import section, write_page


def matrix_rows(matrix: Matrix) -> list[tuple[str, str, Estimate]]:
    """(perceiver, reasoner, accuracy with its interval over videos) of every pair."""
    return [
        (perceiver, reasoner, estimate(matrix.accuracy[perceiver, reasoner], _videos(matrix)))
        for perceiver in matrix.perceivers
        for reasoner in matrix.reasoners
    ]


def gains(matrix: Matrix) -> list[tuple[str, Estimate]]:
    """The gain of the last perceiver over the first with each reasoner fixed, and the last reasoner with each perceiver
    fixed: paired differences on the same records."""
    found, videos = [], _videos(matrix)
    first, last = matrix.perceivers[0], matrix.perceivers[-1]
    for reasoner in matrix.reasoners if last != first else ():
        pair = matrix.accuracy[first, reasoner], matrix.accuracy[last, reasoner]
        found.append((f"perception, {first} to {last}, reasoner {reasoner}", difference(*pair, videos)))
    first, last = matrix.reasoners[0], matrix.reasoners[-1]
    for perceiver in matrix.perceivers if last != first else ():
        pair = matrix.accuracy[perceiver, first], matrix.accuracy[perceiver, last]
        found.append((f"reasoning, {first} to {last}, perceiver {perceiver}", difference(*pair, videos)))
    return found


def write_matrix_page(output: str | Path, matrix: Matrix) -> Path:
    """Write one self-contained page about ``matrix`` to ``output``, .html, and the curves beside it as .png."""
    output = Path(output)
    figure = _curves(matrix)
    figure.savefig(output.with_suffix(".png"), dpi=160, facecolor="white")
    curves = f'<div class="card"><img alt="Accuracy by reasoner and by perceiver" src="{data_uri(figure)}"></div>'
    lead = (
        f"{len(matrix.records):,} questions. Each perceiver described every video; each reasoner answered from every "
        "description without seeing a video (the paper's Figure 2)."
    )
    table = _table(
        ["Perceiver", *(f"{name} reasons" for name in matrix.reasoners)],
        [
            [perceiver, *(shown(found) for who, _, found in matrix_rows(matrix) if who == perceiver)]
            for perceiver in matrix.perceivers
        ],
    )
    gained = _table(
        ["With the other fixed", "Points"], [[name, shown(found, sign=True)] for name, found in gains(matrix)]
    )
    costs = _table(
        ["Model", "Tokens read", "Tokens written", "Price"],
        [
            [name, f"{read:,}", f"{written:,}", f"{price:.4f}" if price else "–"]
            for name, (read, written, price) in matrix.costs.items()
        ],
    )
    body = (
        f"<main><header><h1>Perception against reasoning</h1><p>{lead}</p></header>"
        + section("Accuracy", "Percent, with 95 % intervals over videos.", table)
        + section("Curves", "Each line keeps one model and changes the other, in the order of the file.", curves)
        + section("What a better model brings", "Paired differences in points, with 95 % intervals.", gained)
        + section("Costs", "Replies that were kept from an earlier run are counted.", costs)
        + "</main>"
    )
    return write_page(output, title="Perception against reasoning", body=body)


def _videos(matrix: Matrix) -> list[str]:
    return [video_of(record) for record in matrix.records]


def _curves(matrix: Matrix) -> Figure:
    found = {(perceiver, reasoner): each for perceiver, reasoner, each in matrix_rows(matrix)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.2), layout="constrained")
        panels = (
            ("A better reasoner", matrix.reasoners, matrix.perceivers, lambda x, line: found[line, x], "perceiver"),
            ("A better perceiver", matrix.perceivers, matrix.reasoners, lambda x, line: found[x, line], "reasoner"),
        )
        for place, (title, along, lines, at, kind) in enumerate(panels):
            axes = figure.add_subplot(1, 2, place + 1)
            for line, colour in zip(lines, [*COLOURS] * (len(lines) // len(COLOURS) + 1), strict=False):
                each = [at(x, line) for x in along]
                spread = [[e.value - e.low for e in each], [e.high - e.value for e in each]]
                label = f"{kind} {line}"
                axes.errorbar(
                    range(len(along)), [e.value for e in each], spread, fmt="o-", color=colour, capsize=3, label=label
                )
            axes.set_xticks(range(len(along)), along, fontsize=8)
            axes.set_xlim(-0.3, len(along) - 0.7)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
            axes.legend(frameon=False, fontsize=8)
        return figure


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="card table"><table><tr>{cells}</tr>{lines}</table></div>' if rows else ""
