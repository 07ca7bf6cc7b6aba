"""The page of a benchmark: its table with intervals, of one model or two compared, and how it was scored."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from appo.evaluation.benchmark import Benchmark
from appo.evaluation.intervals import Estimate
from appo.evaluation.scoring import Row, shown
from appo.reports.markup import section, write_page

WIDTH, HEIGHT = 240, 18
COLOURS = ("#2f62d8", "#d9730d")


def write_benchmark_page(output: str | Path, benchmark: Benchmark, rows: Sequence[Row], names: Sequence[str]) -> Path:
    """Write one self-contained page of a benchmark's table.

    Args:
        output: the page, .html.
        benchmark: whose table it is.
        rows: as `appo.evaluation.scoring.table` made them; with differences where two models are compared.
        names: of the models, one, or two in the order of the comparison.

    Returns:
        The path of the page.
    """
    overall = [row for row in rows if not row.facet]
    facets = dict.fromkeys(row.facet for row in rows if row.facet)
    lead = f"{escape(benchmark.paper)}, {rows[0].found.count:,} questions: {escape(' and '.join(names))}"
    parts = [section("Over all questions", "Percent, with 95 % intervals over videos.", _table(overall, names))]
    for facet in facets:
        of = [row for row in rows if row.facet == facet]
        parts.append(section(f"By {facet}", f"{escape(of[0].measure)}, in percent.", _table(of, names)))
    how = f"<p>Prompt and scoring: {escape(benchmark.rules)}.</p>"
    how += f"<p>Where they differ here: {escape(benchmark.departs)}</p>" if benchmark.departs else ""
    how += (
        "<p>Questions about one video are not independent: standard errors are of sums over videos. The bar is the "
        "estimate, the line its interval.</p>"
    )
    body = f"<main><header><h1>{escape(benchmark.title)}</h1><p>{lead}.</p></header>{''.join(parts)}"
    return write_page(Path(output), title=benchmark.title, body=f"{body}{section('How it was scored', '', how)}</main>")


def _table(rows: Sequence[Row], names: Sequence[str]) -> str:
    compared = len(names) > 1
    head = ["", *names, *(["Difference, points"] if compared else []), "", "Questions"]
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = []
    for row in rows:
        found = [row.found, *([row.second] if row.second is not None else [])]
        values = [shown(each) for each in found]
        values += [shown(row.change, sign=True)] if row.change is not None else []
        lines.append(
            f"<tr><td>{escape(row.group or row.measure)}</td>"
            + "".join(f"<td>{escape(value)}</td>" for value in values)
            + f"<td>{_bars(found)}</td><td>{row.found.count:,}</td></tr>"
        )
    return f'<div class="card table"><table><tr>{cells}</tr>{"".join(lines)}</table></div>'


def _bars(found: Sequence[Estimate]) -> str:
    """A bar per model from 0 to 100 %, with its interval as a line."""
    height = HEIGHT * len(found)
    parts = []
    for place, (each, colour) in enumerate(zip(found, COLOURS, strict=False)):
        top, middle = place * HEIGHT + 3, place * HEIGHT + HEIGHT / 2
        parts.append(f'<rect x="0" y="{top}" width="{each.value * WIDTH:.1f}" height="{HEIGHT - 6}" fill="{colour}"/>')
        if each.low == each.low:  # NaN with a single video
            ends = f'x1="{each.low * WIDTH:.1f}" x2="{each.high * WIDTH:.1f}" y1="{middle}" y2="{middle}"'
            parts.append(f'<line {ends} stroke="#1b2430" stroke-width="2"/>')
    frame = f'<rect x="0" y="0" width="{WIDTH}" height="{height}" fill="#eceff3"/>'
    label = ", ".join(shown(each).strip() for each in found)
    return f'<svg width="{WIDTH}" height="{height}" role="img" aria-label="{label}">{frame}{"".join(parts)}</svg>'
