"""Video decoding: a few frames of a file, evenly spread in time, at a bounded size, with the time of each.

PyAV decodes; decord is the second, and a setting, for the files on which it was found to be right. Both run in a
process of their own (``video_worker.py``), which is killed when the time limit is reached: decoders are known to hang
and to crash on some files.
"""

import atexit
import logging
import math
import os
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from appo.data.clip import Clip as Clip
from appo.data.video_cache import ClipCache
from appo.data.video_timeline import Sampling
from appo.data.worker import Worker, WorkerError

logger = logging.getLogger(__name__)

DECODERS = ("pyav", "decord")


class VideoError(ValueError):
    """A video that cannot be read. The text names the file and what is wrong with it."""


def read_video(
    path: str | os.PathLike[str],
    *,
    fps: float,
    max_frames: int,
    max_pixels: int,
    min_frames: int = 2,
    factor: int = 28,
    timeout: float = 30.0,
    decoder: str = "auto",
    start: float | None = None,
    end: float | None = None,
    cache: ClipCache | None = None,
) -> Clip:
    """An even number T of frames, evenly spread in time over the whole file or over a segment of it.

    The i-th frame is the one on the screen when the i-th of T equal parts begins, whatever the frame rate does. Its
    time is the frame's own, or the beginning of the part where the frame has been on the screen since an earlier one;
    a clip of one frame gives it twice, since models merge frames in pairs. Frames are upright (display matrices of
    cameras, mirrored ones too) and have the shape in which they are displayed (pixels that are not square are
    resampled). Interlaced frames are given as they are stored, both fields in one picture.

    fps: frames to take of each second, within ``min_frames`` and ``max_frames`` in all, and no more than the file has.
    max_pixels: H * W of a frame is at most this. Both sides are multiples of ``factor`` (patch size times spatial
        merge of the vision tower: 28 for Qwen2.5-VL), and the aspect ratio is kept as well as that allows.
    timeout: seconds after which decoding is stopped, whatever the decoder is doing.
    decoder: "auto" takes PyAV and, where that is missing or fails, decord (with a warning); "pyav" or "decord" takes
        that one. decord is refused on files on which it gives other frames than those asked for.
    start, end: the segment, in seconds from the first frame of the file; None: the beginning, the end of the file.
    cache: where decoded clips are kept; one that is there is not decoded again.

    Raises VideoError (a ValueError) naming the file: it does not exist, is not a video, is broken, ends early, has no
    frames or no times, does not reach the segment, or decoding it took too long. ValueError for arguments that no
    video could satisfy.
    """
    _check_arguments(fps, max_frames, min_frames, max_pixels, factor, timeout, decoder)
    _check_segment(start, end)
    name = os.fspath(path)
    if not Path(name).is_file():
        what = "is not a regular file" if Path(name).exists() else "does not exist"
        _fail(name, what, "Check the path and the data root.")
    if os.path.getsize(name) == 0:
        _fail(name, "is empty (0 bytes)", "Fetch it again.")
    sampling = Sampling(fps, max_frames, min_frames, max_pixels, factor, start, end)
    known = None if cache is None else cache.get(name, sampling, decoder)
    if known is not None:
        return known
    deadline = time.monotonic() + timeout
    reasons: list[str] = []
    for choice in DECODERS if decoder == "auto" else (decoder,):
        status, *result = _decode(choice, os.path.abspath(name), max(deadline - time.monotonic(), 0.001), sampling)
        if status == "ok":
            frames, seconds, source_fps, duration = result
            clip = Clip(
                frames=torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(),
                timestamps=torch.from_numpy(seconds),
                source_fps=source_fps,
                duration=duration,
                start=start or 0.0,
                end=duration if end is None else min(end, duration),
            )
            if cache is not None:
                cache.put(name, sampling, decoder, clip)
            return clip
        reasons.append(f"{choice}: {result[0]}")
        if status == "refused" and choice in (decoder, "pyav"):
            _fail(name, *result)
        if status == "timeout":
            what = f"could not be decoded within {timeout:g} s ({'; '.join(reasons)})"
            _fail(name, what, "Re-encode it or raise `timeout`.")
        if decoder == "auto" and choice == "pyav":
            logger.warning("%s: PyAV %s (%s); trying decord", name, status, result[0])
    if status == "missing":
        _fail(name, f"cannot be decoded: a decoder is not installed ({'; '.join(reasons)})", "Install av.")
    _fail(name, f"is not a video, or is broken ({'; '.join(reasons)})", "Fetch it again or re-encode it as H.264 mp4.")


# Idle workers, one per thread that decodes at the same time.
_idle: list[Worker] = []


def _decode(decoder: str, path: str, seconds: float, sampling: Sampling) -> tuple[Any, ...]:
    """The answer of a decoding process (``video_worker.py``), ("timeout", text) or ("failed", text)."""
    try:
        worker = _idle.pop()
    except IndexError:
        worker = Worker("appo.data.video_worker")
    try:
        result: tuple[Any, ...] = worker.ask((decoder, path, sampling), seconds)
    except WorkerError as error:
        return ("timeout", str(error)) if error.expired else ("failed", f"the decoder {error}")
    _idle.append(worker)
    return result


@atexit.register
def _close_workers() -> None:
    while _idle:
        _idle.pop().stop()


def _check_arguments(
    fps: float, max_frames: int, min_frames: int, max_pixels: int, factor: int, timeout: float, decoder: str
) -> None:
    def wrong(argument: str, expected: str, got: object, remedy: str) -> NoReturn:
        raise ValueError(f"read_video: `{argument}`: expected {expected}, got {got!r}. {remedy}")

    if not 0 < fps < math.inf:
        wrong("fps", "a positive, finite number of frames per second", fps, "1.0 is usual.")
    if not 0 < timeout <= threading.TIMEOUT_MAX:
        wrong("timeout", f"a positive number of seconds, at most {threading.TIMEOUT_MAX:.0f}", timeout, "30 is usual.")
    if max_frames < 2 or min_frames < 1 or min_frames > max_frames:
        wrong(
            "max_frames",
            f"at least 2 and at least `min_frames` = {min_frames}",
            max_frames,
            "Frames are merged in pairs.",
        )
    if factor < 1:
        wrong("factor", "a positive number of pixels", factor, "Patch size times spatial merge, 28 for Qwen2.5-VL.")
    if max_pixels < factor * factor:
        wrong(
            "max_pixels",
            f"at least `factor` squared = {factor * factor}",
            max_pixels,
            "One token needs that many pixels.",
        )
    if decoder not in ("auto", *DECODERS):
        wrong("decoder", f"one of {('auto', *DECODERS)}", decoder, "auto tries PyAV, then decord.")


def _check_segment(start: float | None, end: float | None) -> None:
    for name, value in (("start", start), ("end", end)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"read_video: `{name}`: expected seconds from the first frame, got {value!r}.")
    if end is not None and not (start or 0.0) < end:
        raise ValueError(f"read_video: `end`: expected more than `start` = {start or 0.0:g} s, got {end!r}.")


def _fail(path: str, what: str, remedy: str) -> NoReturn:
    raise VideoError(f"read_video: {path} {what}. {remedy}")
