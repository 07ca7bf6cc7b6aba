"""Records of video questions: one class for every published format, read from .json or .jsonl, checked field by field.

``appo.formats`` knows how each format spells its fields; this module has what they become, and the file around them.
Specification: section 8.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
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


def load_records(
    path: str | Path, *, data_root: str | Path | None = None, seed: int = 0, limit: int | None = None
) -> list[Record]:
    """Read records; the format of each is recognised from its fields, so one file may mix them.

    Formats: Video-R1 and Perception Test, SEED-Bench-R1 (training and evaluation form), NExT-QA and NExT-GQA,
    VideoChat-R1 and TW-GRPO grounding. Video-R1 records may add ``time_spans`` [[start, end], ...] in seconds,
    ``duration``, ``task`` and ``grounding`` (true: the response is to name the spans).

    Args:
        path: a .json file with a list of records, or a .jsonl file with one a line.
        data_root: what media paths are relative to; the folder of ``path`` by default.
        seed: of the options drawn for SEED-Bench-R1. They depend on the seed and the record's id, not on its place.
        limit: read the first ``limit`` records only.

    Raises:
        DataError: no such file, unreadable JSON, no records, an unknown format, or a missing or wrong field. Media are
            looked for by ``check_media``.
    """
    from appo.formats import parse_record

    path = Path(path)
    if limit is not None and limit < 1:
        raise DataError(f"load_records: `limit`: expected at least 1, got {limit}. Leave it out to read all records.")
    if not path.is_file():
        raise DataError(f"{path}: no such file. Pass the path of a .json or .jsonl file of records.")
    root = Path(data_root) if data_root is not None else path.parent
    records: list[Record] = []
    for index, raw in _read(path):
        if limit is not None and len(records) == limit:
            break
        records.append(parse_record(raw, file=path, index=index, root=root, seed=seed))
    if not records:
        raise DataError(f"{path}: expected at least one record, got none. See SPEC section 8 for the formats.")
    return records


def check_media(records: Iterable[Record]) -> None:
    """Look for every video and image, before training starts.

    Raises:
        DataError: the first record whose medium is not a file, with the path tried; and how many others there are.
    """
    missing = [(record, media) for record in records for media in record.media if not media.path.is_file()]
    if missing:
        record, media = missing[0]
        others = f" {len(missing) - 1} more media are missing." if len(missing) > 1 else ""
        raise DataError(
            f"{record.place}: field `{media.field}`: expected a {media.kind} file, got {str(media.path)!r}, which does "
            f"not exist. Media paths are relative to `data_root` (default: the folder of the records).{others}"
        )


SYSTEM_PROMPT = (
    "You watch the video and answer the question about it. First reason about what you see inside <think> </think> "
    "tags, then give the final answer inside <answer> </answer> tags."
)
TIME_PROMPT = (
    " After the answer, name the moments of the video that decide it, in seconds, inside <time> </time> tags, such as "
    "<time>8.4 to 12.5, 25 to 30.2</time>."
)
ANSWER_PROMPTS = {
    "multiple choice": "Answer with the letter of one option.",
    "numerical": "Answer with one number.",
    "regression": "Answer with one number.",
    "math": "Answer with one mathematical expression.",
    "ocr": "Answer with the text as it is written.",
    "free-form": "Answer in a short sentence.",
}


def prompt_messages(record: Record, *, instructions: bool = True) -> list[dict[str, Any]]:
    """The chat messages that ask a record's question: the format to answer in, the media, the question, its options.

    ``instructions=False`` leaves out the system message and the line on how to answer, for a model that was trained on
    the format.
    """
    text = "\n".join((record.question, *record.options, *([ANSWER_PROMPTS[record.kind]] if instructions else [])))
    content: list[dict[str, Any]] = [{"type": media.kind, media.kind: str(media.path)} for media in record.media]
    user = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
    if not instructions:
        return [user]
    system = SYSTEM_PROMPT + (TIME_PROMPT if record.asks_time else "")
    return [{"role": "system", "content": [{"type": "text", "text": system}]}, user]


def _read(path: Path) -> Iterator[tuple[int, Any]]:
    """(index, record) pairs of a .json list or .jsonl lines; blank lines are passed over and still counted."""
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path}: expected a file that ends in .json or .jsonl, got {path.suffix or 'no ending'!r}.")
    if path.suffix == ".jsonl":
        with path.open("rb") as file:
            for index, line in enumerate(file):
                if line.strip():
                    yield index, _decode(line, f"{path}: record {index} (line {index + 1})")
        return
    loaded = _decode(path.read_bytes(), str(path))
    if not isinstance(loaded, Sequence) or isinstance(loaded, str):
        raise DataError(f"{path}: expected a list of records, got {type(loaded).__name__}. Wrap the records in [ ].")
    yield from enumerate(loaded)


def _decode(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{place}: expected JSON, got text that does not parse: {error}.") from error
