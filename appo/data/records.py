"""A record: one question about a video, images or nothing but text. docs/data.md has the formats it is read from."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("multiple choice", "numerical", "ocr", "free-form", "regression", "math")
MEDIA_KINDS = ("video", "image")
# Fields that name a record where no format says which does; of several the first: `id`, which our own files have.
IDS = ("id", "problem_id", "question_id", "sample_id", "qid")
FRAME_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SLACK = 1.0  # seconds that a span may end behind a clip: published times are rounded


class DataError(ValueError):
    """A record that cannot be used: the message names file, record and field, what was expected and what came."""


@dataclass(frozen=True)
class Media:
    """One video or image of a record; ``field`` is where the record names it, for error messages.

    A video is a file (a folder of frames counts as one), or the frames themselves; it may be the segment from ``start``
    to ``end`` seconds of it. ``data`` are the bytes of a file that the record holds itself, as in Parquet.
    """

    kind: str  # "video" | "image"
    path: Path
    field: str = "path"
    frames: tuple[Path, ...] = ()
    fps: float | None = None  # of ``frames``
    start: float | None = None
    end: float | None = None
    data: bytes | None = dataclasses.field(default=None, repr=False)
    root: Path | None = None  # the folder that ``path`` must lie in, links resolved; None: anywhere


@dataclass(frozen=True)
class Record:
    """One question about a video.

    ``options`` are lettered, "A. a red ball"; ``answer`` is then the letter, else the text or number. ``time_spans``
    are the (start, end) seconds of the file that decide the question, where known. ``meta`` keeps what a format has
    beyond the fields, and "file" and "index", which say where the record was read.
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
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def asks_time(self) -> bool:
        """Whether the response is to name the time spans as well (temporal grounding)."""
        return bool(self.meta.get("grounding"))

    @property
    def place(self) -> str:
        """The record's origin, with which error messages begin: file, index and id."""
        return f"{self.meta.get('file', 'record')}: record {self.meta.get('index', '?')} (id {self.id!r})"

    @property
    def key(self) -> tuple[Any, ...]:
        """The identity of a record among all others: its file and place there, and what is asked. Ids may be equal."""
        place = (self.meta.get("file"), self.meta.get("index"))
        asked = (self.question, self.answer, self.kind, self.options, self.media, self.time_spans, self.asks_time)
        return (*place, self.id, *asked)
