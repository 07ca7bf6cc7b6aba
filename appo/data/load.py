"""Reading the records of a file and looking for their media."""

import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from appo.data import checked_index
from appo.data.fields import shown
from appo.data.formats import parse_record
from appo.data.media import locate
from appo.data.records import DataError, Record
from appo.data.rows import Rows, open_rows

logger = logging.getLogger(__name__)


class Records(Sequence[Record]):
    """The records of a file, each read from it when it is asked for; slices are views.

    It compares equal to any sequence of the same records.
    """

    def __init__(self, rows: Rows, parse: Callable[[Any, int], Record], numbers: Sequence[int]) -> None:
        self._rows, self._parse, self._numbers = rows, parse, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> "Records": ...

    def __getitem__(self, index: int | slice) -> "Record | Records":
        if isinstance(index, slice):
            return Records(self._rows, self._parse, self._numbers[index])
        row = self._numbers[index]
        return self._parse(self._rows.read(row), self._rows.index(row))

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

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
    rows, parse = open_records(path, data_root=data_root, seed=seed, allow_outside=allow_outside)
    if limit is not None and limit < 1:
        raise DataError(f"load_records: `limit`: expected at least 1, got {limit}. Leave it out to read all records.")
    if on_broken not in ("stop", "skip"):
        raise DataError(f"load_records: `on_broken`: expected stop or skip, got {on_broken!r}.")
    root = _root(Path(path), data_root)
    with checked_index.one_process(rows, root, allow_outside):
        notice = checked_index.restore(rows, root, allow_outside)
        if notice is None:
            numbers, notice = _scan(Path(path), rows, parse, limit, on_broken)
            if len(numbers) == len(rows) and limit is None:
                checked_index.keep(rows, root, allow_outside, notice)
        else:
            numbers = array("q", range(min(len(rows), limit or len(rows))))
    if notice:
        logger.warning(notice)
    if not numbers:
        raise DataError(f"{path}: expected at least one record, got none. docs/data.md has the formats.")
    return Records(rows, parse, numbers)


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
    equal = ids.groups()
    if not equal:
        return numbers, ""
    first = [parse(rows.read(number), rows.index(number)) for number in equal[0][:2]]
    places = " and ".join(str(record.meta["index"]) for record in first)
    return numbers, (
        f"{path}: {len(equal)} ids are given to more than one record, such as {shown(first[0].id)} to records "
        f"{places}; they are kept apart by their place in the file"
    )


def _root(path: Path, data_root: str | Path | None) -> Path:
    return Path(data_root) if data_root is not None else path.parent


def open_records(
    path: str | Path, *, data_root: str | Path | None = None, seed: int = 0, allow_outside: bool = False
) -> tuple[Rows, Callable[[Any, int], Record]]:
    """The rows of a file and how one of them becomes a record, for those who go through it themselves."""
    path = Path(path)
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(str(path))}: expected the path of a file of records: {error}.") from error
    if not exists:
        raise DataError(f"{path}: no such file. Pass the path of a .json or .jsonl file of records (docs/data.md).")
    if data_root is not None and not Path(data_root).is_dir():
        logger.warning("data_root: no such folder: %s", data_root)
    root = _root(path, data_root)
    try:
        rows = open_rows(path)
    except OSError as error:
        raise DataError(f"{path}: expected a file that can be read: {error}.") from error

    def parse(raw: Any, index: int) -> Record:
        if isinstance(raw, DataError):
            raise raw
        return parse_record(
            raw,
            file=path,
            index=index,
            root=root,
            seed=seed,
            allow_outside=allow_outside,
            text_only=rows.text,
            tabular=rows.tabular,
        )

    return rows, parse


def check_media(records: Iterable[Record]) -> None:
    """Look for every video and image, before training starts.

    Raises:
        DataError: the first record whose medium is not a file, or lies outside the data root; and how many others.
    """
    first, others = None, 0
    for record in records:
        for medium in record.media:
            try:
                locate(medium, record)
            except DataError as error:
                first, others = (first or error), others + 1
    if first is not None:
        more = f" {others - 1} more media are missing." if others > 1 else ""
        raise DataError(f"{first}{more}")


class EqualIds:
    """Finds ids that several records share, in 8 bytes a record."""

    def __init__(self) -> None:
        self._hashes, self._numbers = array("q"), array("q")

    def add(self, record: Record, number: int) -> None:
        # NExT-QA counts its questions within each video.
        video = record.media[0].path.name if record.source.startswith("NExT") and record.media else ""
        self._hashes.append(hash((record.id, video)))
        self._numbers.append(number)

    def groups(self) -> list[list[int]]:
        """The numbers of the records of each id that is there more than once, in order."""
        import numpy as np

        hashes = np.frombuffer(self._hashes, np.int64) if self._hashes else np.empty(0, np.int64)
        values, counts = np.unique(hashes, return_counts=True)
        shared = values[counts > 1]
        if not len(shared):
            return []
        places = np.flatnonzero(np.isin(hashes, shared))
        found: dict[int, list[int]] = {}
        for place in places.tolist():
            found.setdefault(int(hashes[place]), []).append(self._numbers[place])
        return list(found.values())
