"""The rows of a file of records (JSON, JSON lines, CSV, Parquet, Hugging Face folders), each read when it is asked for.

Only where each row begins is kept in memory, 24 bytes a row; processes on one machine share the file's pages.
"""

import gzip
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from appo.data.arrow_rows import ArrowRows, is_arrow_folder
from appo.data.cache import cached
from appo.data.csv_rows import CSVRows
from appo.data.json_rows import JSONRows, LineRows
from appo.data.records import DataError

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")


class Rows(Protocol):
    """Rows by number. ``scan`` goes through the file once, from the start, and finds out where each row is."""

    text: bool  # every value is text (CSV)
    tabular: bool  # every row has every column: null says nothing
    large: bool  # not kept in memory, and checked by several processes

    def scan(self) -> Iterator[tuple[int, Any]]:
        """(index, value) of each row; the index is its place in the file as errors name it.

        The value is a DataError where a row cannot be read and the next ones can. Raises DataError for other files.
        """

    def find(self) -> bool:
        """Find where all rows are without decoding them; False where only `scan` can."""

    def places(self, begin: int, end: int) -> Any:
        """The places of rows that were found, for `scan_places`, also of another process."""

    def scan_places(self, places: Any) -> Iterator[tuple[int, Any]]:
        """(index, value) of the rows at ``places`` of the file, as those of ``scan``."""

    def fingerprint(self) -> str:
        """State of the file beyond the path, size and time of what was opened: of its parts, where it has several."""

    def __len__(self) -> int:
        """The number of rows that have been found."""

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
                shutil.copyfileobj(packed, plain, 1 << 20)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: expected a gzip file, got one that does not unpack: {error}.") from error

    return cached(path, suffix, make)
