"""Rows of JSON files: a record a line, or a list of records."""

import codecs
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from appo.data import strict_json, structure
from appo.data.records import DataError
from appo.data.span_rows import LARGEST, SpanRows, or_error
from appo.data.strict_json import JSONError

CHUNK = 1 << 20

_SPACE = re.compile(r"[ \t\r\n]*")


class LineRows(SpanRows):
    """JSON lines; blank lines are passed over and still counted."""

    def place(self, index: int) -> str:
        return f"{self.path}: record {index} (line {index + 1})"

    def find(self) -> bool:
        starts, odd = structure.lines(self.source)
        sizes = np.diff(starts)
        if len(sizes) and sizes.max() > LARGEST:
            return False
        with self.source.open("rb") as file:
            if _is_opening(file.readline(LARGEST)):
                return False
        self.put(starts[:-1], sizes, np.arange(len(sizes)))
        blank = [row for row in odd.tolist() if _is_blank(self.line(row))]
        kept = np.delete(np.arange(len(sizes)), blank)
        self.put(starts[:-1][kept], sizes[kept], kept)
        return True

    def scan(self) -> Iterator[tuple[int, Any]]:
        place = 0
        with self.source.open("rb") as file:
            for index, line in enumerate(iter(lambda: file.readline(LARGEST + 1), b"")):
                if index == 0 and _is_opening(line):
                    raise DataError(
                        f"{self.path}: expected a record a line, got JSON over several lines. Rename it to .json."
                    )
                if not _is_blank(line):
                    self.keep(index, place, len(line))
                    yield index, or_error(self.decode, line, index)
                place += len(line)


def _is_opening(line: bytes) -> bool:
    """Whether a first line is that of JSON over several lines."""
    return line.strip().removeprefix(codecs.BOM_UTF8) in (b"[", b"{")


def _is_blank(line: bytes) -> bool:
    return line.strip() in (b"", codecs.BOM_UTF8)


class JSONRows(SpanRows):
    """A JSON list of records, or the records one after another as in JSON lines.

    An object around the list ({"data": [...]}), or one with an object per video (TempCompass), is read whole.
    """

    def __init__(self, path: Path, source: Path) -> None:
        super().__init__(path, source)
        self.whole: Sequence[Any] | None = None

    def __len__(self) -> int:
        return len(self.starts) if self.whole is None else len(self.whole)

    @property
    def placed(self) -> bool:
        return self.whole is None

    def find(self) -> bool:
        items = structure.list_items(self.source, LARGEST)
        if items is not None:
            self.put(*items, np.arange(len(items[0])))
        return items is not None

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
    """The records within one JSON object: the only list of objects in it, those per video and dimension (TempCompass),
    or the questions per video (Perception Test)."""
    if not isinstance(value, dict) or value.keys() & _QUESTIONS:
        return None
    lists = [part for part in value.values() if isinstance(part, list) and part and isinstance(part[0], dict)]
    if len(lists) == 1:
        return list(lists[0])
    if value and all(isinstance(part, dict) and isinstance(part.get("mc_question"), list) for part in value.values()):
        asked = ((video, row) for video, part in value.items() for row in part["mc_question"])
        return [{"video_name": video, **row} if isinstance(row, dict) else row for video, row in asked]
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
