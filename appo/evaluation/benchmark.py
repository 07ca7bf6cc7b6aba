"""A benchmark: its records, how they are asked, how an answer is scored and what its table shows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from appo.data.records import DataError, Record
from appo.evaluation.intervals import Group

Scores = dict[str, float]  # by measure, within 0 and 1


@dataclass(frozen=True)
class Facet:
    """A way to group records, such as by task; ``of`` names a record's group, "" where it is in none."""

    name: str
    of: Callable[[Record], str]


@dataclass(frozen=True)
class Benchmark:
    """One published benchmark. docs/evaluation.md has the table that users read.

    Attributes:
        name: as ``appo eval --benchmark`` takes it.
        title: as people write it.
        paper, rules: where it was published, and whose code or text the prompt and the scoring follow.
        departs: where the scoring here differs from that; "" where nowhere.
        files: its files in a folder: patterns with spaces between, the first line of which any is found.
        sources: the ``source`` of records that are its own.
        ask: the text of a question, after the video; None asks as in training (`appo.data.prompts`).
        score: the scores of an answer to a record.
        headline: measures that are shown over all records, the first being the number that people quote.
        facets: groupings that are shown below, with the means of ``headline[0]``.
        averaged: the group of a record, and the part of that, over which means are means of means
            (`appo.evaluation.intervals`); None: all records count alike.
        needs: what each of its records must have, or DataError.
        settings: defaults of the configuration for it, such as the length of answers.
    """

    name: str
    title: str
    paper: str
    rules: str
    files: tuple[str, ...]
    sources: tuple[str, ...]
    score: Callable[[str, Record], Scores]
    ask: Callable[[Record], str] | None = None
    departs: str = ""
    headline: tuple[str, ...] = ("accuracy",)
    facets: tuple[Facet, ...] = ()
    averaged: Callable[[Record], Group] | None = None
    needs: Callable[[Record], None] = lambda record: None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def check(self, records: Sequence[Record]) -> None:
        """Raise DataError for a record that is not of this benchmark, or lacks what its scoring needs."""
        for record in records:
            if record.source not in self.sources:
                raise DataError(
                    f"{record.place}: expected a record of {self.title}, got one of {record.source or 'another format'}"
                    f". Pass the files of the benchmark, {', or '.join(self.files)} (docs/evaluation.md)."
                )
            self.needs(record)


def by_meta(name: str, key: str) -> Facet:
    """Records grouped by what their format keeps under ``key``."""
    return Facet(name, lambda record: str(record.meta.get(key, "")))


def choice(read: Callable[[str, Record], str | None]) -> Callable[[str, Record], Scores]:
    """The scores of an answer that names an option: right or wrong, and whether it could be read."""

    def score(text: str, record: Record) -> Scores:
        letter = read(text, record)
        return {"accuracy": float(letter == record.answer), "unreadable": float(letter is None)}

    return score


def lettered(record: Record, form: str = "{letter}. {text}") -> str:
    """The options of a record, one a line."""
    return "\n".join(form.format(letter=option[0], text=option[3:]) for option in record.options)
