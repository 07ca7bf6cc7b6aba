"""Rows that are stretches of bytes of a file."""

import os
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from appo.data import strict_json
from appo.data.records import DataError
from appo.data.strict_json import JSONError
from appo.data.structure import Spans

LARGEST = 64 << 20  # bytes of one record
BLOCK = 1 << 18  # bytes read at a time, of records one after another
LARGE = 8 << 20  # bytes of a file that is not kept in memory

_lock = threading.Lock()


class SpanRows:
    """Rows that are stretches of bytes of a file; one that is not kept in memory may not change."""

    text = tabular = False

    def __init__(self, path: Path, source: Path) -> None:
        self.path, self.source = path, source
        self.starts, self.sizes, self.indices = array("q"), array("q"), array("q")
        self._file = source.open("rb")
        self._state = self._now()
        # A small file is kept, so that it may be written again while its records are in use.
        self.large = self._state[0] > LARGE
        self._kept = None if self.large else self._file.read()

    @property
    def placed(self) -> bool:
        """Whether rows are read by their places in the file."""
        return True

    def find(self) -> bool:
        return False

    def put(self, starts: Spans, sizes: Spans, indices: Spans) -> None:
        """The places of all rows."""
        self.starts, self.sizes, self.indices = (
            array("q", values.astype(np.int64).tobytes()) for values in (starts, sizes, indices)
        )

    def places(self, begin: int, end: int) -> Any:
        return self._state, *(part[begin:end] for part in (self.starts, self.sizes, self.indices))

    def scan_places(self, places: Any) -> Iterator[tuple[int, Any]]:
        self._state, *columns = places
        block, begin = b"", 0
        for start, size, index in zip(*columns, strict=True):
            if not begin <= start <= start + size <= begin + len(block):
                block, begin = self._bytes(start, max(size, BLOCK)), start
            yield index, self.decode(block[start - begin : start - begin + size], index)

    def fingerprint(self) -> str:
        return ""

    def __len__(self) -> int:
        return len(self.starts)

    def index(self, row: int) -> int:
        return self.indices[row]

    def _now(self) -> tuple[int, int]:
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns

    def line(self, row: int) -> bytes:
        return self._bytes(self.starts[row], self.sizes[row])

    def _bytes(self, start: int, size: int) -> bytes:
        if self._kept is not None:
            return self._kept[start : start + size]
        if self._now() != self._state:
            raise DataError(f"{self.path}: expected the file as it was when it was loaded, got one that has changed.")
        # pread has no position that threads or forked processes could take from each other.
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), size, start)
        with _lock:
            self._file.seek(start)
            return self._file.read(size)

    def keep(self, index: int, start: int, size: int) -> None:
        if size > LARGEST:
            raise DataError(f"{self.path}: record {index}: expected at most {LARGEST:,} bytes, got {size:,}.")
        self.indices.append(index)
        self.starts.append(start)
        self.sizes.append(size)

    def read(self, row: int) -> Any:
        return self.decode(self.line(row), self.indices[row])

    def decode(self, text: bytes, index: int) -> Any:
        try:
            return strict_json.loads(text)
        except JSONError as error:
            raise DataError(error.at(self.place(index))) from error

    def place(self, index: int) -> str:
        return f"{self.path}: record {index}"


def or_error(read: Callable[[Any, int], Any], value: Any, index: int) -> Any:
    try:
        return read(value, index)
    except DataError as error:
        return error
