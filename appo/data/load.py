"""Reading the records of a file and looking for their media."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from appo.data.formats import parse_record
from appo.data.records import DataError, Record


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
        raise DataError(f"{path}: expected at least one record, got none. docs/data.md lists the formats.")
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
