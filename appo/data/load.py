"""Reading the records of a file and looking for their media."""

import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from appo.data import checked_index
from appo.data.all_records import Missing, check_all
from appo.data.equal_ids import EqualIds
from appo.data.fields import shown
from appo.data.opening import Source, open_records
from appo.data.records import DataError, Record
from appo.data.rows import Rows

logger = logging.getLogger(__name__)


class Records(Sequence[Record]):
    """The records of a file, each read from it when it is asked for; slices are views.

    It compares equal to any sequence of the same records.
    """

    def __init__(self, source: Source, rows: Rows, parse: Callable[[Any, int], Record], numbers: Sequence[int]) -> None:
        self.source, self._rows, self._parse, self._numbers = source, rows, parse, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> "Records": ...

    def __getitem__(self, index: int | slice) -> "Record | Records":
        if isinstance(index, slice):
            return Records(self.source, self._rows, self._parse, self._numbers[index])
        row = self._numbers[index]
        return self._parse(self._rows.read(row), self._rows.index(row))

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def missing(self) -> Missing:
        """The media that cannot be found."""
        numbers = self._numbers
        if isinstance(numbers, range) and numbers.step == 1 and self._rows.large:
            found = check_all(self.source, self._rows, self._parse, numbers, media=True)
            if found.broken:  # since it was loaded
                raise DataError(found.broken)
            return found.missing
        return missing_media(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self):,} records>"


def load_records(
    path: str | Path,
    *,
    data_root: str | Path | None = None,
    seed: int = 0,
    limit: int | None = None,
    allow_outside: bool = False,
    on_broken: str = "stop",
) -> Records:
    """Check every record of a file and return them; the format of each is recognised from its fields (docs/data.md).

    Records are read again when they are asked for: only their places in the file are kept in memory. Equal ids are
    logged; records are told apart by file and place, not by id.

    Args:
        path: a .json file with a list of records, .jsonl with one a line, .csv, any of them as .gz, .parquet, or a
            folder that `datasets.save_to_disk` wrote.
        data_root: what media paths are relative to, and the folder they must lie in; the folder of ``path`` by default.
        seed: of the options drawn for SEED-Bench-R1. They depend on the seed and the record's id, not on its place.
        limit: read the first ``limit`` records only.
        allow_outside: take media from anywhere: absolute paths, "..", links that leave ``data_root``.
        on_broken: "stop" raises for the first record that cannot be used; "skip" logs it, counts it and leaves it out.

    Raises:
        DataError: no such file, unreadable JSON, no records, an unknown format, or a missing or wrong field. Media are
            looked for by ``check_media``.
    """
    if limit is not None and limit < 1:
        raise DataError(f"load_records: `limit`: expected at least 1, got {limit}. Leave it out to read all records.")
    if on_broken not in ("stop", "skip"):
        raise DataError(f"load_records: `on_broken`: expected stop or skip, got {on_broken!r}.")
    source = Source(Path(path), None if data_root is None else Path(data_root), seed, allow_outside)
    rows, parse = open_records(source)
    numbers: Sequence[int]
    with checked_index.one_process(source, rows):
        notice = checked_index.restore(source, rows)
        if notice is not None:
            numbers = range(min(len(rows), limit or len(rows)))
        else:
            if rows.large and limit is None and on_broken == "stop" and rows.find():
                numbers, notice = _check_all(source, rows, parse)
            else:
                numbers, notice = _scan(source.path, rows, parse, limit, on_broken)
            if len(numbers) == len(rows) and limit is None:
                checked_index.keep(source, rows, notice)
    if notice:
        logger.warning(notice)
    if not numbers:
        raise DataError(f"{path}: expected at least one record, got none. docs/data.md has the formats.")
    return Records(source, rows, parse, numbers)


def _check_all(source: Source, rows: Rows, parse: Callable[[Any, int], Record]) -> tuple[range, str]:
    """The numbers of all records, none of which is broken, and what there is to say of equal ids."""
    found = check_all(source, rows, parse, range(len(rows)))
    if found.broken:
        raise DataError(found.broken)
    return range(len(rows)), _notice(source.path, rows, parse, EqualIds(found.hashes))


def _scan(
    path: Path, rows: Rows, parse: Callable[[Any, int], Record], limit: int | None, on_broken: str
) -> tuple["array[int]", str]:
    """The numbers of the records that can be used, and what there is to say of equal ids."""
    numbers, ids = array("q"), EqualIds()
    broken = 0
    for number, (index, raw) in enumerate(rows.scan()):
        try:
            ids.add(parse(raw, index), number)
        except DataError as error:
            if on_broken == "stop":
                raise
            broken += 1
            if broken <= 5:
                logger.warning("left out: %s", error)
            continue
        numbers.append(number)
        if len(numbers) == limit:
            break
    if broken:
        logger.warning("%s: %d of %d records cannot be used and are left out", path, broken, broken + len(numbers))
    return numbers, _notice(path, rows, parse, ids)


def _notice(path: Path, rows: Rows, parse: Callable[[Any, int], Record], ids: EqualIds) -> str:
    """A sentence on ids that several records have; empty where none are."""
    equal = ids.groups()
    if not equal:
        return ""
    first = [parse(rows.read(number), rows.index(number)) for number in equal[0][:2]]
    places = " and ".join(str(record.meta["index"]) for record in first)
    return (
        f"{path}: {len(equal)} ids are given to more than one record, such as {shown(first[0].id)} to records "
        f"{places}; they are kept apart by their place in the file"
    )


def missing_media(records: Iterable[Record]) -> Missing:
    """The media of ``records`` that cannot be found."""
    missing = Missing()
    for record in records:
        missing.look(record)
    return missing


def check_media(records: Iterable[Record]) -> None:
    """Look for every video and image, before training starts.

    Raises:
        DataError: the first record whose medium is not a file, or lies outside the data root; and how many others.
    """
    missing = records.missing() if isinstance(records, Records) else missing_media(records)
    if missing.count:
        if isinstance(records, Records):
            records.source.check_root()
        more = f" {missing.count - 1} more media are missing." if missing.count > 1 else ""
        raise DataError(f"{missing.first}{more}")
