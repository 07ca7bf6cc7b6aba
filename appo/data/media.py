"""Finding a record's videos and images on disk and reading them; errors name the record and the field."""

import functools
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from appo.data.pictures import ImageError, read_image
from appo.data.records import FRAME_ENDINGS, SLACK, DataError, Media, Record
from appo.data.video import Clip, VideoError, read_video
from appo.data.video_cache import ClipCache


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


def load_image(medium: Media, record: Record, *, max_pixels: int, factor: int) -> Tensor:
    """(3, H, W) uint8 of a record's image. Raises DataError naming the record."""
    try:
        source = locate(medium, record)[0] if medium.data is None else medium.data
        return read_image(source, max_pixels, factor)
    except ImageError as error:
        raise _unusable(medium, record, error) from error


def load_clip(
    medium: Media,
    record: Record,
    *,
    fps: float,
    max_frames: int,
    max_pixels: int,
    factor: int,
    timeout: float,
    decoder: str = "auto",
    cache: ClipCache | None = None,
) -> Clip:
    """The sampled frames of a record's video: of a file, its bytes, a folder of frames or a list of them.

    Arguments as those of `read_video`; clips of files alone are kept in ``cache``. Raises DataError naming the record.
    """
    sampling: dict[str, Any] = {"fps": fps, "max_frames": max_frames, "max_pixels": max_pixels, "factor": factor}
    try:
        paths = locate(medium, record)
        if medium.frames or paths not in ((medium.path,), ()):
            return read_frames(paths, medium, duration=record.duration, **sampling)
        sampling |= {"timeout": timeout, "decoder": decoder, "start": medium.start, "end": medium.end}
        if medium.data is None:
            return read_video(medium.path, **sampling, cache=cache)
        with as_file(medium.data) as path:
            return read_video(path, **sampling)
    except (VideoError, ImageError, OSError) as error:
        raise _unusable(medium, record, error) from error


def check_spans(record: Record, lengths: Sequence[float]) -> None:
    """The moments that decide a question lie within its clip, of ``lengths`` seconds, give or take rounding."""
    if record.time_spans and len(lengths) == 1 and any(end > lengths[0] + SLACK for _, end in record.time_spans):
        raise DataError(
            f"{record.place}: `time_spans`: expected spans within the clip of {lengths[0]:g} s, got "
            f"{[list(span) for span in record.time_spans]}."
        )


def read_frames(
    paths: tuple[Path, ...],
    medium: Media,
    *,
    fps: float,
    max_frames: int,
    max_pixels: int,
    factor: int,
    duration: float | None,
) -> Clip:
    """A clip of images: the i-th at i / ``medium.fps`` seconds, or evenly over ``duration``, or one a second."""
    rate = medium.fps or (len(paths) / duration if duration else 1.0)
    first, last = (medium.start or 0.0) * rate, len(paths) if medium.end is None else medium.end * rate
    chosen = [index for index in range(len(paths)) if first <= index < last] or [min(int(first), len(paths) - 1)]
    wanted = min(max(round(len(chosen) / rate * fps), 2), max_frames, max(len(chosen), 2))
    count = max(wanted - wanted % 2, 2)
    chosen = [chosen[i * len(chosen) // count] for i in range(count)]
    frames: list[Tensor] = []
    for index in chosen:
        try:
            frames.append(read_image(paths[index], max_pixels, factor))
        except ImageError as error:
            raise ImageError(f"frame {paths[index].name}: {error}") from error
        if frames[-1].shape != frames[0].shape:
            raise ImageError(f"frame {paths[index].name} of another shape than {paths[chosen[0]].name}")
    times = torch.tensor(chosen, dtype=torch.float64) / rate
    seconds = len(paths) / rate
    return Clip(torch.stack(frames), times, rate, seconds, medium.start or 0.0, medium.end or seconds)


@contextmanager
def as_file(data: bytes) -> Iterator[Path]:
    """The bytes of a video as a file, which decoders want, while the context lasts."""
    with tempfile.NamedTemporaryFile(suffix=".video") as file:
        file.write(data)
        file.flush()
        yield Path(file.name)


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


def _unusable(medium: Media, record: Record, error: Exception) -> DataError:
    return DataError(f"{record.place}: field `{medium.field}`: {medium.kind} {str(medium.path)!r}: {error}")
