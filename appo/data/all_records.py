"""Every record of a large file checked, by as many processes as there are cores, each its part of the file.

The processes import no torch, so that they start in a fraction of a second and are small.
"""

import logging
import os
from array import array
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from appo.data.equal_ids import id_hash
from appo.data.locate import locate
from appo.data.opening import Source, open_records
from appo.data.records import DataError, Record
from appo.data.rows import Rows
from appo.data.worker import Worker, WorkerError, serve

logger = logging.getLogger(__name__)

PROCESSES = 8  # at most
SMALLEST_PART = 5000  # records, that a process is started for
SECONDS = 3600.0  # that a part may take


@dataclass
class Missing:
    """Media that cannot be found: what is wrong with the first, and their number."""

    first: str = ""
    count: int = 0

    def look(self, record: Record) -> None:
        for medium in record.media:
            try:
                locate(medium, record)
            except DataError as error:
                self.add(Missing(str(error), 1))

    def add(self, other: "Missing") -> None:
        self.first, self.count = self.first or other.first, self.count + other.count


@dataclass
class Checked:
    """The result of going through records: hashes of their ids and ``missing`` media, up to the first that is
    ``broken``."""

    hashes: "array[int]" = field(default_factory=lambda: array("q"))
    broken: str = ""
    missing: Missing = field(default_factory=Missing)


def check_all(
    source: Source, rows: Rows, parse: Callable[[Any, int], Record], numbers: range, *, media: bool = False
) -> Checked:
    """Check the records ``numbers`` of an opened file, whose places are known; with ``media`` look for theirs too.

    rows, parse: of `open_records`. Other processes open ``source`` themselves.
    """
    count = max(1, min(_cores(), PROCESSES, len(numbers) // SMALLEST_PART))
    edges = [numbers.start + len(numbers) * i // count for i in range(count + 1)]
    requests = [(source, rows.places(begin, end), media) for begin, end in pairwise(edges)]
    if count == 1:
        return check_opened(rows, parse, *requests[0][1:])
    with ThreadPoolExecutor(count) as pool:
        return _joined(pool.map(_ask, requests))


def check(source: Source, places: Any, media: bool) -> Checked:
    """`check_opened` of a file that is opened for it."""
    return check_opened(*open_records(source), places, media)


def check_opened(rows: Rows, parse: Callable[[Any, int], Record], places: Any, media: bool) -> Checked:
    """Check the records at ``places`` of a file, up to the first that cannot be used."""
    found = Checked()
    try:
        for index, raw in rows.scan_places(places):
            record = parse(raw, index)
            found.hashes.append(id_hash(record))
            if media:
                found.missing.look(record)
    except DataError as error:
        found.broken = str(error)
    return found


def main() -> None:
    serve(check)


def _joined(parts: Iterable[Checked]) -> Checked:
    """The parts in their order: the first broken record is that of the first part that has one."""
    whole = Checked()
    for part in parts:
        whole.hashes.extend(part.hashes)
        whole.missing.add(part.missing)
        whole.broken = whole.broken or part.broken
    return whole


def _ask(request: tuple[Source, Any, bool]) -> Checked:
    worker = Worker("appo.data.all_records")
    try:
        found: Checked = worker.ask(request, SECONDS)
        return found
    except WorkerError as error:
        logger.warning("%s: records are checked without a process of their own: %s", request[0].path, error)
        return check(*request)
    finally:
        worker.stop()


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
