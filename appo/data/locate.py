"""The place of a medium's file: within the data root, links followed."""

import functools
import os
import re
from pathlib import Path
from typing import Any

from appo.data.records import FRAME_ENDINGS, DataError, Media, Record


def locate(medium: Media, record: Record) -> tuple[Path, ...]:
    """The file of a medium, or its frames, links followed and within the data root.

    Raises DataError naming the record and field: no such file, or outside the root.
    """
    if medium.data is not None:
        return ()
    paths = medium.frames or (medium.path,)
    for path in paths:
        what = "a frame of the video" if medium.frames else f"a {medium.kind} file"
        try:
            is_file, is_folder = path.is_file(), path.is_dir()
        except (OSError, ValueError) as error:
            raise _wrong(record, medium, f"expected {what}, got a path that cannot be looked up: {error}") from error
        if medium.root is not None and not _inside(path, medium.root):
            raise _wrong(
                record, medium, f"expected a file under {str(medium.root)!r}, got {str(path)!r}, a link that leaves "
                "it. Set `allow_outside: true` to take it all the same"
            )  # fmt: skip
        if medium.kind == "video" and is_folder and not medium.frames:
            frames = tuple(sorted((p for p in path.iterdir() if p.suffix.lower() in FRAME_ENDINGS), key=_natural))
            if frames:
                return frames
            raise _wrong(
                record, medium, f"expected a video file or a folder of frames, got {str(path)!r}, a folder of none"
            )
        if not is_file:
            raise _wrong(
                record, medium, f"expected {what}, got {str(path)!r}, which does not exist. Media paths are relative "
                "to `data_root` (default: the folder of the records)"
            )  # fmt: skip
    return paths


def _inside(path: Path, root: Path) -> bool:
    folder, base = _real(path.parent), _real(root)
    real = os.path.realpath(path) if path.is_symlink() else os.path.join(folder, path.name)
    real = os.path.normpath(real)
    return real == base or real.startswith(base.rstrip(os.sep) + os.sep)


@functools.lru_cache(65_536)
def _real(folder: Path) -> str:
    return os.path.realpath(folder)


def _natural(path: Path) -> list[Any]:
    """Frame 10 behind frame 9, with leading zeros or without."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", path.name)]


def _wrong(record: Record, medium: Media, what: str) -> DataError:
    return DataError(f"{record.place}: field `{medium.field}`: {what}.")
