"""Typed fields out of one raw record; each method raises DataError naming file, record and field."""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from appo.data.math_answers import is_number, number
from appo.data.options import LETTERS, LabelError, label, letter_options
from appo.data.paths import why_not_path
from appo.data.records import FRAME_ENDINGS, IDS, SLACK, DataError, Media, Record

_TAGGED = "<answer>", "</answer>"
_SEGMENTS = (("start", "end"), ("video_start", "video_end"), ("start_time", "end_time"))


@dataclass(slots=True)  # not frozen, which would take twice as long to make, for each record of a large file
class Fields:
    """One raw record, and where it was read.

    text_only: its values are all text (CSV). nulls: fields of null, where null says more than that a table has the
    column.
    """

    raw: dict[str, Any]
    file: Path
    index: int
    root: Path
    allow_outside: bool = False
    text_only: bool = False
    nulls: frozenset[str] = frozenset()

    def of(self, changes: dict[str, Any]) -> "Fields":
        """The same record with other values in some fields."""
        return replace(self, raw=self.raw | changes)

    def fail(self, name: str, expected: str, got: Any) -> NoReturn:
        known = next((self.raw[key] for key in IDS if key in self.raw), None)
        missing = "null" if name in self.nulls else "no such field"
        came = shown(got) if name in self.raw else missing
        raise DataError(
            f"{self.file}: record {self.index} (id {shown(known)}): field `{name}`: expected {expected}, got {came}."
        )

    def id(self, name: str) -> str:
        """The record's id as text; its index where the format has none in this record."""
        value = self.raw.get(name, self.index)
        if not isinstance(value, (int, str)) or isinstance(value, bool) or value == "" or len(str(value)) > 1000:
            self.fail(name, "a number or text", value)
        return str(value)

    def text(self, name: str) -> str:
        value = self.raw.get(name)
        if not isinstance(value, str) or not value.strip():
            self.fail(name, "text", value)
        if "\0" in value:
            self.fail(name, "text without NUL characters", value)
        return value.strip()

    def scalar(self, name: str) -> str:
        """Text, or a number as text."""
        value = self.raw.get(name)
        return (
            f"{value:.17g}"
            if is_real(value) and isinstance(value, float)
            else (str(value) if is_real(value) else self.text(name))
        )

    def optional_text(self, *names: str, default: str = "") -> str:
        """The first of the fields that is there, as text."""
        name = next((name for name in names if name in self.raw), None)
        return default if name is None else self.text(name)

    def texts(self, name: str) -> tuple[str, ...]:
        return self._texts(name, self.listed(name))

    def _texts(self, name: str, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            self.fail(name, "a list of texts", value)
        found = tuple([text.strip() for text in value])
        if not all(found):
            self.fail(name, "a list of texts", value)
        return found

    def listed(self, name: str) -> Any:
        """The field's value; a list that a table holds as text is read."""
        value = self.raw.get(name)
        if self.text_only and isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            try:
                return json.loads(value)
            except (ValueError, RecursionError):
                try:
                    return json.loads(re.sub(r"'((?:[^'\\]|\\.)*)'", lambda m: json.dumps(m[1]), value))
                except (ValueError, RecursionError):
                    self.fail(name, "a list as JSON", value)
        return value

    def flag(self, name: str) -> bool:
        value = self.raw.get(name, False)
        if self.text_only and isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if not isinstance(value, bool):
            self.fail(name, "true or false", value)
        return value

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self.raw.get(name)
        if not isinstance(value, str) or value not in allowed:
            self.fail(name, f"one of {', '.join(allowed)}", value)
        return value

    def options(self, name: str) -> tuple[str, ...]:
        """Two or more options, lettered "A. text" whether they came as "A. text", "(A) text" or "text".

        They may be an object by letter, {"A": "text", ...}, or a list that is written as text.
        """
        value = self.raw.get(name)
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            value = replace(self, text_only=True).listed(name)
        if isinstance(value, dict) and list(value) == list(LETTERS[: len(value)]):
            value = list(value.values())
        return self.lettered(name, self._texts(name, value))

    def lettered(self, name: str, texts: tuple[str, ...], *, distinct: bool = True) -> tuple[str, ...]:
        try:
            return letter_options(texts, distinct=distinct)
        except LabelError as error:
            self.fail(name, str(error), list(texts))

    def letter(self, name: str, answer: str, options: tuple[str, ...]) -> str:
        """The letter of the option that ``answer`` names, by letter or text."""
        try:
            return label(answer, options)
        except LabelError as error:
            self.fail(name, str(error), answer)

    def position(self, name: str, count: int) -> str:
        """The letter of a 0-based option index, given as a number, its digits, or already a letter."""
        value = self.raw.get(name)
        text = str(value).strip().strip("()").upper() if isinstance(value, (int, str)) else ""
        place = int(text) if text.isdecimal() and len(text) < 10 else LETTERS.find(text) if len(text) == 1 else -1
        if isinstance(value, bool) or not 0 <= place < count:
            self.fail(name, f"an option's index, 0 to {count - 1}, or its letter", value)
        return LETTERS[place]

    def truth(self, name: str, answer: str, kind: str) -> str:
        """``answer`` as the truth of a record of ``kind``: what a reward will be able to compare with."""
        if (kind == "regression" and number(answer) is None) or (
            kind in ("numerical", "regression") and not is_number(answer)
        ):
            self.fail(name, "a finite number", answer)
        if kind == "math" and re.fullmatch(r"\s*[-+]?(?:nan|inf|infinity)\s*", answer, re.IGNORECASE):
            self.fail(name, "a mathematical expression", answer)
        return answer

    def tagged(self, name: str, *, required: bool = True) -> str:
        """The text of the only <answer>...</answer> of a field; the whole text where there is none and it need not
        be."""
        text = self.scalar(name)
        opening, closing = _TAGGED
        if not required and opening not in text and closing not in text:
            return text
        if text.count(opening) != 1 or text.count(closing) != 1:
            self.fail(name, "one <answer>...</answer> with text in it", text)
        answer = text[text.index(opening) + len(opening) :].partition(closing)[0].strip()
        if not answer:
            self.fail(name, "one <answer>...</answer> with text in it", text)
        return answer

    def seconds(self, name: str) -> float | None:
        value = self._number(self.raw.get(name))
        if value is None:
            return None
        if not is_real(value) or not 0 < value < 1e9:
            self.fail(name, "seconds, more than 0", value)
        return float(value)

    def spans(self, name: str, *, required: bool = False) -> tuple[tuple[float, float], ...]:
        """Sorted (start, end) seconds, 0 <= start < end; empty where the field is absent and not required."""
        value = self.listed(name)
        if value is None and not required:
            return ()
        expected = "a list of [start, end] in seconds, 0 <= start < end"
        if not isinstance(value, list) or (required and not value):
            self.fail(name, expected, value)
        if len(value) == 2 and all(map(is_real, value)):
            self.fail(name, f"{expected}, such as [[{shown(value[0])}, {shown(value[1])}]]", value)
        for pair in value:
            if not isinstance(pair, list) or len(pair) != 2 or not all(map(is_real, pair)):
                self.fail(name, expected, value)
            if not 0 <= pair[0] < pair[1] < 1e9:
                self.fail(name, expected, value)
        duration = self.seconds("duration") if is_real(self._number(self.raw.get("duration"))) else None
        if duration is not None and any(end > duration + SLACK for _, end in value):
            self.fail(name, f"spans within the duration of {duration:g} s", value)
        return tuple(sorted((float(start) + 0.0, float(end)) for start, end in value))  # 0, not -0

    def segment(self) -> tuple[float | None, float | None]:
        """The (start, end) seconds of the file that the record is about; None where it begins or ends with the file."""
        for first, last in _SEGMENTS:
            if first in self.raw or last in self.raw:
                start, end = (self._number(self.raw.get(name)) for name in (first, last))
                for name, value in ((first, start), (last, end)):
                    if value is not None and not (is_real(value) and 0 <= value < 1e9):
                        self.fail(name, "seconds from the start of the file", value)
                if end is not None and not (start or 0) < end:
                    self.fail(last, f"more than `{first}` = {start or 0:g}", end)
                return None if start is None else float(start), None if end is None else float(end)
        return None, None

    def media(self, kind: str, name: str, folders: tuple[str, ...] = (".",)) -> Media:
        """The medium a field names, in the first of ``folders`` under the data root that has it, else in the first."""
        if name not in self.raw:
            self.fail(name, "text", None)
        return self.medium(kind, name, self.listed(name), folders)

    def media_list(self, kind: str, name: str) -> tuple[Media, ...]:
        """The media of a field that names one or a list of them."""
        value = self.listed(name)
        if value is None or value == []:
            return ()
        if kind == "image" or not isinstance(value, list) or any(isinstance(part, (list, dict)) for part in value):
            return tuple(self.medium(kind, name, part) for part in (value if isinstance(value, list) else [value]))
        if len(value) > 1 and all(_is_image(part) for part in value):
            return (self.medium(kind, name, value),)  # the frames of one video
        return tuple(self.medium(kind, name, part) for part in value)

    def medium(self, kind: str, name: str, value: Any, folders: tuple[str, ...] = (".",)) -> Media:
        """A medium from a path, {"path": ..., "bytes": ...} or, for a video, the list of its frames."""
        start, end = self.segment() if kind == "video" else (None, None)
        root = None if self.allow_outside else self.root
        if isinstance(value, dict):
            data = value.get("bytes")
            path = next(
                (value[key] for key in ("path", kind, f"{kind}_path", f"{kind}_url", "url") if value.get(key)), None
            )
            if isinstance(path, dict):
                path = path.get("url")
            if data is not None and data is not False:
                if not isinstance(data, (bytes, bool)):
                    self.fail(name, "the bytes of a file", data)
                shown_path = path if isinstance(path, str) and path else f"{kind} of record {self.index}"
                return Media(
                    kind,
                    Path(shown_path),
                    name,
                    start=start,
                    end=end,
                    data=data if isinstance(data, bytes) else b"",
                    root=root,
                )
            value = path
        if isinstance(value, list) and kind == "video":
            if not value:
                self.fail(name, "frames", value)
            if any(_is_no_image(frame) for frame in value):
                self.fail(name, "a list of image files, the frames of a video", value)
            frames = tuple(self.path(name, frame, folders) for frame in value)
            return Media(
                kind, frames[0].parent, name, frames=frames, fps=self.seconds("fps"), start=start, end=end, root=root
            )
        return Media(
            kind, self.path(name, value, folders), name, fps=self.seconds("fps") if "fps" in self.raw else None,
            start=start, end=end, root=root,
        )  # fmt: skip

    def path(self, name: str, value: Any, folders: tuple[str, ...] = (".",)) -> Path:
        """The path that ``value`` names under the data root; ".." and absolute paths may not leave it."""
        if not isinstance(value, str) or not value.strip():
            self.fail(name, "a path" if isinstance(value, (dict, list)) else "text", value)
        text = value.strip().removeprefix("file://") or "/"
        expected = why_not_path(text, None if self.allow_outside else self.root)
        if expected is not None:
            self.fail(name, expected, value)
        if folders == (".",):
            return self.root / text
        places = [self.root / folder / text for folder in folders]
        return next((place for place in places if place.exists()), places[0])

    def record(self, *, id_field: str, meta: dict[str, Any], id: str | None = None, **values: Any) -> Record:
        """A Record with the fields that every format shares."""
        place = {"file": str(self.file), "index": self.index}
        if "duration" not in values:
            values["duration"] = self.seconds("duration")
        return Record(id=self.id(id_field) if id is None else id, meta=meta | place, **values)

    def _number(self, value: Any) -> Any:
        if self.text_only and isinstance(value, str):
            found = number(value)
            return value if found is None else found
        return value


def is_real(value: Any) -> bool:
    """Whether a value is a finite number that can be counted with."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shown(value: Any) -> str:
    """A value as an error message prints it."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # a list too deep, a number too long to print
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:200] + "..."


def _is_image(value: Any) -> bool:
    return isinstance(value, str) and PurePosixPath(value).suffix.lower() in FRAME_ENDINGS


def _is_no_image(value: Any) -> bool:
    """Whether a value is the path of something else, by its ending; paths may have none."""
    return isinstance(value, str) and bool(PurePosixPath(value).suffix) and not _is_image(value)
