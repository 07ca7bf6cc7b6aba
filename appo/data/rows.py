"""The rows of a file of records (JSON, JSON lines, CSV, Parquet, Hugging Face folders), each read when it is asked for.

Only where each row begins is kept in memory, 16 bytes a row; processes on one machine share the file's pages.
"""

import codecs
import csv
import gzip
import io
import os
import re
import shutil
import threading
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from appo.data import strict_json
from appo.data.arrow_rows import ArrowRows, is_arrow_folder
from appo.data.cache import cached
from appo.data.records import DataError
from appo.data.strict_json import JSONError

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
LARGEST = 64 << 20  # bytes of one record
CHUNK = 1 << 20
LARGE = 8 << 20  # bytes of a file that is not kept in memory

_SPACE = re.compile(r"[ \t\r\n]*")
_lock = threading.Lock()


class Rows(Protocol):
    """Rows by number. ``scan`` goes through the file once, from the start, and finds out where each row is."""

    text: bool  # every value is text (CSV)

    def scan(self) -> Iterator[tuple[int, Any]]:
        """(index, value) of each row; the index is its place in the file as errors name it.

        The value is a DataError where a row cannot be read and the next ones can. Raises DataError for other files.
        """

    def __len__(self) -> int:
        """The number of rows that have been scanned."""

    def index(self, row: int) -> int:
        """The place in the file of row number ``row``."""

    def read(self, row: int) -> Any: ...


def open_rows(path: Path) -> Rows:
    """The rows of ``path``, by its ending. Raises DataError for a file of another kind."""
    if path.is_dir():
        if is_arrow_folder(path):
            return ArrowRows(path)
        names = sorted(p.name for p in path.iterdir())[:5]
        raise DataError(
            f"{path}: expected a file of records, a folder of .parquet files or one that datasets' save_to_disk wrote, "
            f"got a folder with {', '.join(names) or 'nothing in it'}."
        )
    name = path.name.lower()
    inner = Path(name.removesuffix(".gz")).suffix
    if inner not in ENDINGS or (name.endswith(".gz") and inner in (".parquet", ".arrow")):
        raise DataError(
            f"{path}: expected a file that ends in {', '.join(ENDINGS)} (or .json.gz, .jsonl.gz, .csv.gz), got "
            f"{path.suffix or 'no ending'!r}. See docs/data.md."
        )
    source = _unpacked(path, inner) if name.endswith(".gz") else path
    if inner in (".parquet", ".arrow"):
        return ArrowRows(path)
    if inner in (".csv", ".tsv"):
        return CSVRows(path, source, "\t" if inner == ".tsv" else ",")
    return LineRows(path, source) if inner in (".jsonl", ".ndjson") else JSONRows(path, source)


def _unpacked(path: Path, suffix: str) -> Path:
    def make(target: Path) -> None:
        try:
            with gzip.open(path, "rb") as packed, target.open("wb") as plain:
                shutil.copyfileobj(packed, plain, CHUNK)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: expected a gzip file, got one that does not unpack: {error}.") from error

    return cached(path, suffix, make)


class SpanRows:
    """Rows that are stretches of bytes of a file; one that is not kept in memory may not change."""

    text = False

    def __init__(self, path: Path, source: Path) -> None:
        self.path, self.source = path, source
        self.starts, self.sizes, self.indices = array("q"), array("q"), array("q")
        self._file = source.open("rb")
        self._state = self._now()
        # A small file is kept, so that it may be written again while its records are in use.
        self.large = self._state[0] > LARGE
        self._kept = None if self.large else self._file.read()

    def __len__(self) -> int:
        return len(self.starts)

    def index(self, row: int) -> int:
        return self.indices[row]

    def _now(self) -> tuple[int, int]:
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns

    def line(self, row: int) -> bytes:
        if self._kept is not None:
            return self._kept[self.starts[row] : self.starts[row] + self.sizes[row]]
        if self._now() != self._state:
            raise DataError(f"{self.path}: expected the file as it was when it was loaded, got one that has changed.")
        # pread has no position that threads or forked processes could take from each other.
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), self.sizes[row], self.starts[row])
        with _lock:
            self._file.seek(self.starts[row])
            return self._file.read(self.sizes[row])

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


def _or_error(read: Callable[[Any, int], Any], value: Any, index: int) -> Any:
    try:
        return read(value, index)
    except DataError as error:
        return error


class LineRows(SpanRows):
    """JSON lines; blank lines are passed over and still counted."""

    def place(self, index: int) -> str:
        return f"{self.path}: record {index} (line {index + 1})"

    def scan(self) -> Iterator[tuple[int, Any]]:
        place = 0
        with self.source.open("rb") as file:
            for index, line in enumerate(iter(lambda: file.readline(LARGEST + 1), b"")):
                if line.strip() and line.strip() != codecs.BOM_UTF8:
                    self.keep(index, place, len(line))
                    yield index, _or_error(self.decode, line, index)
                place += len(line)


class JSONRows(SpanRows):
    """A JSON list of records, or the records one after another as in JSON lines.

    An object around the list ({"data": [...]}), or one with an object per video (TempCompass), is read whole.
    """

    def __init__(self, path: Path, source: Path) -> None:
        super().__init__(path, source)
        self.whole: Sequence[Any] | None = None

    def __len__(self) -> int:
        return len(self.starts) if self.whole is None else len(self.whole)

    def index(self, row: int) -> int:
        return row

    def read(self, row: int) -> Any:
        return super().read(row) if self.whole is None else self.whole[row]

    def scan(self) -> Iterator[tuple[int, Any]]:
        values = self._values()
        first = next(values, None)
        if first is None:
            return
        second = None if self._listed else next(values, None)
        if second is None and not self._listed:
            if (rows := _inside(first)) is not None:
                self.whole = rows
                yield from enumerate(rows)
                return
            if not isinstance(first, dict) or not (first.keys() & _QUESTIONS):
                fields = f" with the fields {sorted(first)[:10]}" if isinstance(first, dict) else ""
                raise DataError(
                    f"{self.path}: expected a list of records, got {type(first).__name__}{fields}. Wrap the records in "
                    "[ ]."
                )
        started = [first] if second is None else [first, second]
        yield from enumerate(chain(started, values))

    def _values(self) -> Iterator[Any]:
        """Each value of the list, or of the file, while its place is kept."""
        window = _Window(self.source, self.path)
        self._listed = window.peek() == "["
        if self._listed:
            window.skip(1)
        index, wanted = 0, ""
        while True:
            character = window.peek()
            if character == "" or (self._listed and character == "]"):
                break
            if wanted and character != wanted:
                raise self._broken(index, f"text that does not parse: {character!r} instead of a comma")
            if wanted:
                window.skip(1)
            start, size, value = window.value(self.place(index))
            self.keep(index, start, size)
            yield value
            index, wanted = index + 1, "," if self._listed else ""
        if self._listed and window.peek() != "]":
            raise self._broken(index, "text that does not parse: the list does not end")
        if self._listed:
            window.skip(1)
            if window.peek():
                raise DataError(f"{self.path}: expected JSON, got text that does not parse: more behind the list.")

    def _broken(self, index: int, what: str) -> DataError:
        return DataError(f"{self.path}: record {index}: expected JSON, got {what}.")


_QUESTIONS = frozenset({"problem", "question", "messages", "conversations", "prompt"})


def _inside(value: Any) -> list[Any] | None:
    """The records within one JSON object: the only list of objects in it, or those per video and dimension."""
    if not isinstance(value, dict) or value.keys() & _QUESTIONS:
        return None
    lists = [part for part in value.values() if isinstance(part, list) and part and isinstance(part[0], dict)]
    if len(lists) == 1:
        return list(lists[0])
    nested = []
    for video, dimensions in value.items():
        if not isinstance(dimensions, dict) or not all(isinstance(rows, list) for rows in dimensions.values()):
            return None
        for dimension, rows in dimensions.items():
            if not all(isinstance(row, dict) for row in rows):
                return None
            nested += [{"video_id": video, "dim": dimension, **row} for row in rows]
    return nested or None


class _Window:
    """A part of a file as text, moved along it; a JSON value may be longer than the part read first."""

    def __init__(self, source: Path, path: Path) -> None:
        self.file, self.path = source.open("rb"), path
        self.offset = 3 if self.file.read(3) == codecs.BOM_UTF8 else 0  # bytes of the file before ``place``
        self.file.seek(0)
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.place, self.end = "", 0, False

    def more(self, size: int = CHUNK) -> bool:
        data = self.file.read(size)
        self.end = not data
        try:
            self.text, self.place = self.text[self.place :] + self.decoder.decode(data, final=self.end), 0
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: expected JSON, got text that does not parse: {error}.") from error
        return not self.end

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.place)
            self.skip(match.end() - self.place if match else 0)
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.more():
                return ""

    def skip(self, count: int) -> None:
        """Go on by characters of one byte each."""
        self.place += count
        self.offset += count

    def value(self, place: str) -> tuple[int, int, Any]:
        """(first byte, bytes, value) of the JSON value that begins here."""
        self.peek()
        while True:
            try:
                value, end = strict_json.raw_decode(self.text, self.place)
            except (JSONError, RecursionError) as error:
                text = self.text[self.place :].encode()
                wrong = DataError(strict_json.located(text, error).at(place))
                after = strict_json.end_of(self.text, self.place)
                if after is None:
                    raise wrong from error
                value, end = wrong, after
            except ValueError as error:
                length = len(self.text) - self.place
                if self.end or length > LARGEST:
                    raise DataError(f"{place}: expected JSON, got text that does not parse: {error}.") from error
                self.more(max(CHUNK, length))
                continue
            if end == len(self.text) and not self.end:
                self.more()  # a number may go on
                continue
            text = self.text[self.place : end].encode("utf-8", "surrogatepass")
            if not isinstance(value, DataError):
                try:
                    strict_json.check(value, text)
                except JSONError as error:
                    value = DataError(error.at(place))
            start = self.offset
            self.place, self.offset = end, start + len(text)
            return start, len(text), value


class CSVRows(SpanRows):
    """Rows of a table with a header line; every value is text, and an empty cell is no value."""

    text = True

    def __init__(self, path: Path, source: Path, delimiter: str) -> None:
        super().__init__(path, source)
        self.delimiter = delimiter
        self.header: list[str] = []

    def scan(self) -> Iterator[tuple[int, Any]]:
        place = 0
        consumed = 0

        def lines() -> Iterator[str]:
            nonlocal consumed
            with self.source.open("rb") as file:
                for number, line in enumerate(file):
                    consumed += len(line)
                    try:
                        yield line.decode("utf-8-sig" if number == 0 else "utf-8")
                    except UnicodeDecodeError as error:
                        raise DataError(f"{self.path}: line {number + 1}: expected UTF-8 text: {error}.") from error

        reader = csv.reader(lines(), delimiter=self.delimiter, strict=True)
        try:
            self.header = next(reader, [])
            if len(set(self.header)) < len(self.header):
                raise DataError(f"{self.path}: expected column names that differ, got {self.header}.")
            place = consumed
            for index, cells in enumerate(reader):
                start, place = place, consumed
                if not any(cells):
                    continue
                self.keep(index, start, place - start)
                yield index, _or_error(self._row, cells, index)
        except csv.Error as error:
            raise DataError(f"{self.path}: line {reader.line_num}: expected a table: {error}.") from error

    def decode(self, text: bytes, index: int) -> Any:
        lines = io.StringIO(text.decode("utf-8"), newline="")
        return self._row(next(csv.reader(lines, delimiter=self.delimiter)), index)

    def _row(self, cells: list[str], index: int) -> dict[str, str]:
        if len(cells) != len(self.header):
            raise DataError(
                f"{self.path}: record {index}: expected {len(self.header)} cells, as the header has, got {len(cells)}."
            )
        return {name: cell for name, cell in zip(self.header, cells, strict=True) if cell.strip()}
