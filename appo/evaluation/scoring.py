"""The table of a benchmark: scores of answers, over all questions and by group, of one model or two compared."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from appo.data.records import Record
from appo.evaluation.benchmark import Benchmark, Scores
from appo.evaluation.intervals import Estimate, difference, estimate


@dataclass(frozen=True)
class Row:
    """One line of a table: ``facet`` and ``group`` are empty over all questions."""

    measure: str
    facet: str
    group: str
    found: Estimate
    change: Estimate | None = None  # how much the second model is above the first, on the same questions
    second: Estimate | None = None

    @property
    def label(self) -> str:
        return f"{self.measure}, {self.facet} {self.group}" if self.facet else self.measure


def score_answers(benchmark: Benchmark, records: Sequence[Record], texts: Sequence[str]) -> list[Scores]:
    """The scores of one answer per record, ``texts`` (n,), by the benchmark's own rule. Raises DataError for records
    that are not the benchmark's, ValueError unless there is a text for each."""
    if len(texts) != len(records):
        raise ValueError(f"score_answers: `texts`: expected one per record, {len(records)}, got {len(texts)}.")
    benchmark.check(records)
    return [benchmark.score(text, record) for text, record in zip(texts, records, strict=True)]


def table(
    benchmark: Benchmark, records: Sequence[Record], scores: Sequence[Scores], second: Sequence[Scores] | None = None
) -> list[Row]:
    """The benchmark's headline, how many answers could not be read, and the first measure by each facet.

    second: the scores of another model on the same records; each row then has the difference as well.
    """
    everywhere = range(len(records))
    measures = (*benchmark.headline, *(name for name in scores[0] if name not in benchmark.headline))
    rows = [_row(benchmark, records, scores, second, name, everywhere) for name in measures]
    for facet in benchmark.facets:
        of = [facet.of(record) for record in records]
        for group in sorted(set(of) - {""}, key=_in_order):
            places = [place for place in everywhere if of[place] == group]
            rows.append(_row(benchmark, records, scores, second, benchmark.headline[0], places, facet.name, group))
    return rows


def _row(
    benchmark: Benchmark,
    records: Sequence[Record],
    scores: Sequence[Scores],
    second: Sequence[Scores] | None,
    measure: str,
    places: Sequence[int],
    facet: str = "",
    group: str = "",
) -> Row:
    clusters = [video_of(records[place]) for place in places]
    groups = None if benchmark.averaged is None else [benchmark.averaged(records[place]) for place in places]
    first = [scores[place][measure] for place in places]
    found = estimate(first, clusters, groups)
    if second is None:
        return Row(measure, facet, group, found)
    other = [second[place][measure] for place in places]
    return Row(
        measure, facet, group, found, difference(first, other, clusters, groups), estimate(other, clusters, groups)
    )


def video_of(record: Record) -> str:
    """The cluster of a record's answer: its video, or itself where it has none."""
    return str(record.media[0].path) if record.media else record.place


def _in_order(group: str) -> tuple[float, str]:
    """Numbers by size, in front of words."""
    return (float(group), "") if group.isdecimal() else (math.inf, group)


def changed(first: Sequence[Scores], second: Sequence[Scores], measure: str) -> tuple[int, int]:
    """The numbers of answers that the second model has better, and worse."""
    pairs = [(one[measure], two[measure]) for one, two in zip(first, second, strict=True)]
    return sum(two > one for one, two in pairs), sum(two < one for one, two in pairs)


def text_table(rows: Sequence[Row], write: Callable[[str], None]) -> None:
    """The rows as lines of text, percent with their 95 % intervals."""
    width = max(len(row.label) for row in rows)
    for row in rows:
        line = f"{row.label:{width}}  {shown(row.found)}"
        if row.second is not None and row.change is not None:
            line += f"   {shown(row.second)}   {shown(row.change, sign=True)}"
        write(f"{line}  {row.found.count:6} questions")


def shown(found: Estimate, *, sign: bool = False) -> str:
    """An estimate in percent, "41.2 [38.0, 44.5]"; a difference in points, with its sign."""
    form = "{:+6.1f} [{:+.1f}, {:+.1f}]" if sign else "{:6.1f} [{:.1f}, {:.1f}]"
    if math.isnan(found.low):
        return form.split(" ")[0].format(100 * found.value)
    return form.format(100 * found.value, 100 * found.low, 100 * found.high)
