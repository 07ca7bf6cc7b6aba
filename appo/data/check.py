"""Going through a whole file of records before a run: what is there, what is missing, what cannot be used."""

import random
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appo.data.equal_ids import EqualIds
from appo.data.fields import shown
from appo.data.locate import locate
from appo.data.math_answers import reads
from appo.data.media import check_spans, load_clip, load_image
from appo.data.messages import prompt_messages
from appo.data.opening import Source, open_records
from appo.data.records import DataError, Media, Record

KEPT = 1000  # messages of each sort; the rest are counted

_PLACE = re.compile(r"record (\d+)(?: \(line \d+\))?(?: \(id .*?\))?: ")

PROBLEMS = {
    "broken": "records that cannot be read",
    "truths": "answers that no reward can compare with",
    "missing": "media that are missing or outside the data root",
    "undecodable": "media that do not decode",
    "equal ids": "ids of more than one record",
}


@dataclass
class Findings:
    """The result of `check_file`. ``seconds`` are lengths of clips, decoded or as the records say."""

    records: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    media: Counter[str] = field(default_factory=Counter)
    seconds: "array[float]" = field(default_factory=lambda: array("d"))
    decoded: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # of each of PROBLEMS
    messages: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in PROBLEMS})
    sample: Record | None = None

    @property
    def clean(self) -> bool:
        return self.records > 0 and not any(self.counts.values())

    def add(self, problem: str, message: object) -> None:
        self.counts[problem] += 1
        if len(self.messages[problem]) < KEPT:
            self.messages[problem].append(str(message))

    def lines(self, most: int = 10) -> Iterator[str]:
        """The findings as text, ``most`` messages of each problem."""

        def parts(counts: Counter[str]) -> str:
            return ", ".join(f"{name or 'unnamed'} {count:,}" for name, count in counts.most_common(12)) or "none"

        yield f"records      {self.records:,} ({parts(self.kinds)})"
        yield f"sources      {parts(self.sources)}"
        yield f"media        {parts(self.media)}; {self.decoded:,} decoded"
        if self.seconds:
            ordered = sorted(self.seconds)
            middle, total = ordered[len(ordered) // 2], sum(ordered)
            yield (
                f"durations    {ordered[0]:.1f} to {ordered[-1]:.1f} s, median {middle:.1f} s, {total / 3600:.2f} h in "
                f"{len(ordered):,} clips"
            )
        for name, what in PROBLEMS.items():
            yield f"{name:12} {self.counts[name]:,} {what}"
            kinds = alike(self.messages[name])
            for messages in kinds[:most]:
                yield f"    {messages[0]}"
                if len(messages) > 1:
                    yield f"        and {len(messages) - 1:,} more of the same: {_places(messages[1:])}"
            told = sum(map(len, kinds[:most]))
            if self.counts[name] > told:
                yield f"    and {self.counts[name] - told:,} more"


def alike(messages: Sequence[str]) -> list[list[str]]:
    """Messages in groups that say the same of several records: the same was expected of the same field."""
    found: dict[str, list[str]] = {}
    for message in messages:
        what = _PLACE.sub("", message, count=1)
        field, got, _ = what.partition(", got ")
        found.setdefault(field if got else what, []).append(message)
    return list(found.values())


def _places(messages: Sequence[str]) -> str:
    """The records of the first few messages."""
    places = [match[1] for match in map(_PLACE.search, messages[:8]) if match]
    return f"records {', '.join(places)}{', ...' if len(messages) > 8 else ''}"


def check_file(
    path: str | Path,
    *,
    data_root: str | Path | None = None,
    allow_outside: bool = False,
    seed: int = 0,
    decode: int | None = None,
    sample: int = 0,
    show: Callable[[str, int, int | None], None] = lambda phase, done, total: None,
    timeout: float = 60.0,
) -> Findings:
    """Read every record of a file, look for all media, and decode those of ``decode`` records drawn by ``seed``.

    Nothing but places, hashes of ids and lengths is kept of records that were gone through.

    Args:
        decode: records whose media are decoded; None for all, 0 for none.
        sample: the index of the record kept as ``Findings.sample``; the first that can be used where that cannot.
        show: called with a phase, what is done of it, and how much there is where that is known.

    Raises:
        DataError: no such file, or one that cannot be read at all.
    """
    source = Source(Path(path), None if data_root is None else Path(data_root), seed, allow_outside)
    rows, parse = open_records(source)
    found, ids, whole = Findings(), EqualIds(), array("q")
    for number, (index, raw) in enumerate(_rows(rows, found)):
        show("records", number + 1, None)
        try:
            record = parse(raw, index)
        except DataError as error:
            found.add("broken", error)
            continue
        found.records += 1
        found.kinds[record.kind] += 1
        found.sources[record.source] += 1
        found.media.update(f"{medium.kind}s" for medium in record.media)
        ids.add(record, number)
        if found.sample is None or index == sample:
            found.sample = record
        if record.kind in ("numerical", "math") and not reads(record.answer):
            found.add(
                "truths", f"{record.place}: `answer`: math-verify reads no number or expression in {record.answer!r}."
            )
        if _locate(record, found):
            whole.append(number)
    for numbers in ids.groups():
        records = [parse(rows.read(number), rows.index(number)) for number in numbers[:5]]
        places = ", ".join(str(record.meta["index"]) for record in records)
        found.add("equal ids", f"{shown(records[0].id)} of records {places}{', ...' if len(numbers) > 5 else ''}")
    chosen = list(whole) if decode is None else sorted(random.Random(seed).sample(whole, min(decode, len(whole))))
    decoder = _Decoder(found, timeout)
    for done, number in enumerate(chosen, start=1):
        decoder(parse(rows.read(number), rows.index(number)))
        show("media", done, len(chosen))
    return found


def render(record: Record) -> str:
    """The prompt of a record as text, with its media by name; and what the right answer is."""
    lines = []
    for message in prompt_messages(record):
        parts = []
        for part in message["content"]:
            kind = part["type"]
            parts.append(part["text"] if kind == "text" else f"<{kind} {part[kind]}>")
        lines.append(f"{message['role']}: " + "\n".join(parts))
    lines.append(f"answer: {record.answer}")
    if record.time_spans:
        lines.append("spans: " + ", ".join(f"{start:g} to {end:g} s" for start, end in record.time_spans))
    return "\n".join(lines)


def _rows(rows: Any, found: Findings) -> Iterator[tuple[int, Any]]:
    """All rows, as far as the file can be read; where it cannot, the rest counts as one broken record."""
    try:
        yield from rows.scan()
    except DataError as error:
        found.add("broken", error)


def _locate(record: Record, found: Findings) -> bool:
    complete = True
    for medium in record.media:
        try:
            locate(medium, record)
        except DataError as error:
            found.add("missing", error)
            complete = False
    return complete


class _Decoder:
    """Decodes each medium once, however many records are about it."""

    def __init__(self, found: Findings, timeout: float) -> None:
        self.found, self.timeout = found, timeout
        self._lengths: dict[int, float | None] = {}  # by a hash of the medium; None: it does not decode

    def __call__(self, record: Record) -> None:
        lengths = [self._length(medium, record) for medium in record.media]
        try:
            of_clips = zip(record.media, lengths, strict=True)
            check_spans(
                record, [length for medium, length in of_clips if medium.kind == "video" and length is not None]
            )
        except DataError as error:
            self.found.add("broken", error)

    def _length(self, medium: Media, record: Record) -> float | None:
        key = hash(medium)
        if key not in self._lengths:
            self._lengths[key] = self._decoded(medium, record)
        return self._lengths[key]

    def _decoded(self, medium: Media, record: Record) -> float | None:
        sizes: dict[str, Any] = {"max_pixels": 64 * 28 * 28, "factor": 28}
        length = 0.0
        try:
            if medium.kind == "image":
                load_image(medium, record, **sizes)
            else:
                length = load_clip(medium, record, fps=1.0, max_frames=16, timeout=self.timeout, **sizes).duration
                self.found.seconds.append(length)
        except DataError as error:
            self.found.add("undecodable", error)
            return None
        self.found.decoded += 1
        return length
