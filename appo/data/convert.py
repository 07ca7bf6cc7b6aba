"""Writing records of any known format in ours."""

import json
import os
from dataclasses import replace
from pathlib import Path

from appo.data.formats_plain import as_row
from appo.data.load import load_records
from appo.data.records import DataError, Media, Record


def convert_file(
    file: Path,
    output: Path,
    *,
    data_root: Path | None = None,
    allow_outside: bool = False,
    seed: int = 0,
    skip_broken: bool = False,
    force: bool = False,
) -> tuple[int, Path]:
    """Write the records of ``file`` to ``output``, one JSON object a line; the file appears whole or not at all.

    Returns the number of records and the folder that their media are relative to. Media that records hold themselves
    are written there, in a folder named after ``output``.

    Raises:
        DataError: a record that cannot be used (unless ``skip_broken``), or an output that exists (unless ``force``).
    """
    if output.suffix != ".jsonl":
        raise DataError(f"{output}: expected an output that ends in .jsonl, got {output.suffix or 'no ending'!r}.")
    if output.exists() and (not force or output.samefile(file)):
        raise DataError(f"{output}: expected a file that does not exist yet. Choose another name, or --force.")
    root = data_root or file.parent
    records = load_records(
        file, data_root=root, seed=seed, allow_outside=allow_outside, on_broken="skip" if skip_broken else "stop"
    )
    partial = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as lines:
            for record in records:
                row = as_row(_with_files(record, root, output.stem), root)
                lines.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        os.replace(partial, output)
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)
    return len(records), root


def _with_files(record: Record, root: Path, name: str) -> Record:
    """``record`` with files in place of the bytes that it holds."""
    media: list[Media] = []
    for number, medium in enumerate(record.media):
        if medium.data is not None:
            ending = Path(medium.path.name).suffix or (".mp4" if medium.kind == "video" else _ending(medium.data))
            path = root / f"{name}-media" / f"{record.meta['index']:07d}-{number}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(medium.data)
            medium = replace(medium, path=path, data=None)
        media.append(medium)
    return replace(record, media=tuple(media))


def _ending(data: bytes) -> str:
    kinds = {b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}
    return next((ending for start, ending in kinds.items() if data.startswith(start)), ".jpg")
