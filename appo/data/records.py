"""Records of video questions: one class for every published format, read from .json or .jsonl, checked field by field.

``appo.data.formats`` knows how each format spells its fields; this module has what they become (docs/data.md).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("multiple choice", "numerical", "ocr", "free-form", "regression", "math")
MEDIA_KINDS = ("video", "image")


class DataError(ValueError):
    """A record that cannot be used: the message names file, record and field, what was expected and what came."""


@dataclass(frozen=True)
class Media:
    """One video or image of a record; ``field`` is where the record names it, for error messages."""

    kind: str  # "video" | "image"
    path: Path
    field: str = "path"


@dataclass(frozen=True)
class Record:
    """One question about a video.

    ``options`` are lettered, "A. a red ball"; ``answer`` is then the letter, else the text or number. ``time_spans``
    are the (start, end) seconds that decide the question, where known. ``meta`` keeps what a format has beyond the
    fields, and "file" and "index", which say where the record was read.
    """

    id: str
    question: str
    answer: str
    kind: str
    options: tuple[str, ...] = ()
    media: tuple[Media, ...] = ()
    time_spans: tuple[tuple[float, float], ...] = ()
    duration: float | None = None  # seconds
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def asks_time(self) -> bool:
        """Whether the response is to name the time spans as well (temporal grounding)."""
        return bool(self.meta.get("grounding"))

    @property
    def place(self) -> str:
        """Where the record comes from, as error messages begin: file, index and id."""
        return f"{self.meta.get('file', 'record')}: record {self.meta.get('index', '?')} (id {self.id!r})"
