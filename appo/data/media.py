"""Reading a record's videos and images; errors name the record and the field."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from appo.data.locate import locate
from appo.data.pictures import ImageError, read_image
from appo.data.records import SLACK, DataError, Media, Record
from appo.data.video import Clip, VideoError, read_video
from appo.data.video_cache import ClipCache


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


def _unusable(medium: Media, record: Record, error: Exception) -> DataError:
    return DataError(f"{record.place}: field `{medium.field}`: {medium.kind} {str(medium.path)!r}: {error}")
