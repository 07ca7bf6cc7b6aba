"""Rows of tables as text."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from appo.data.records import DataError
from appo.data.span_rows import SpanRows, or_error


class CSVRows(SpanRows):
    """Rows of a table with a header line; every value is text, and an empty cell is no value."""

    text = tabular = True

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
            other = next((sign for sign in ";\t|," if sign != self.delimiter and sign in "".join(self.header)), None)
            if len(self.header) == 1 and other is not None:
                raise DataError(
                    f"{self.path}: expected columns parted by {self.delimiter!r}, got {other!r} in the header "
                    f"{self.header[0]!r}. Save it with {self.delimiter!r}, or with tabs as .tsv."
                )
            if len(set(self.header)) < len(self.header):
                raise DataError(f"{self.path}: expected column names that differ, got {self.header}.")
            place = consumed
            for index, cells in enumerate(reader):
                start, place = place, consumed
                if not any(cells):
                    continue
                self.keep(index, start, place - start)
                yield index, or_error(self._row, cells, index)
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
