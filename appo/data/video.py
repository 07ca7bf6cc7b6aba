"""Video decoding: a few frames of a file, evenly spread, at a bounded size, with the time of each.

decord decodes where it is installed; PyAV reads what decord cannot. Both run in a process of their own
(``video_worker.py``), which is killed when the time limit is reached: decord is known to hang on some files.
"""

import atexit
import logging
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DECODERS = ("decord", "pyav")
WORKER = Path(__file__).with_name("video_worker.py")


class VideoError(ValueError):
    """A video that cannot be read. The text names the file and what is wrong with it."""


@dataclass(frozen=True)
class Clip:
    """Sampled frames of a video.

    frames: (T, 3, H, W) uint8, RGB; T is even. timestamps: (T,) fp64, seconds from the first frame of the
    file. source_fps: frames per second in the file. duration: seconds.
    """

    frames: Tensor
    timestamps: Tensor
    source_fps: float
    duration: float


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
) -> Clip:
    """Reads an even number of frames spread over the whole file.

    fps: frames to take of each second, within ``min_frames`` and ``max_frames`` in all.
    max_pixels: H * W of a frame is at most this. Both sides are multiples of ``factor`` (patch size times spatial
        merge of the vision tower: 28 for Qwen2.5-VL), and the aspect ratio is kept as well as that allows.
    timeout: seconds after which decoding is stopped, whatever the decoder is doing.
    decoder: "auto" takes decord and, where that is missing or fails, PyAV (with a warning); "decord" or "pyav"
        takes that one.

    Raises VideoError (a ValueError) naming the file: it does not exist, is not a video, is broken, has no frames, or
    decoding it took too long. ValueError for arguments that no video could satisfy.
    """
    _check_arguments(fps, max_frames, min_frames, max_pixels, factor, timeout, decoder)
    name = os.fspath(path)
    if not Path(name).is_file():
        what = "is not a regular file" if Path(name).exists() else "does not exist"
        _fail(name, what, "Check the path and the data root.")
    if os.path.getsize(name) == 0:
        _fail(name, "is empty (0 bytes)", "Fetch it again.")
    deadline = time.monotonic() + timeout
    reasons: list[str] = []
    for choice in DECODERS if decoder == "auto" else (decoder,):
        # Half of the time for the first of two decoders: when it hangs, the second still has its chance.
        share = (deadline - time.monotonic()) / (2 if decoder == "auto" and choice == "decord" else 1)
        status, *result = _decode(choice, name, max(share, 0.001), (fps, max_frames, min_frames))
        if status == "ok":
            frames, seconds, source_fps, duration = result
            pixels = _resize(torch.from_numpy(frames).permute(0, 3, 1, 2), max_pixels, factor)
            return Clip(pixels, torch.from_numpy(seconds), float(source_fps), float(duration))
        reasons.append(f"{choice}: {result[0]}")
        if decoder == "auto" and choice == "decord":
            log = logger.debug if status == "missing" else logger.warning
            log("%s: decord %s (%s); reading it with PyAV", name, status, result[0])
    if status == "timeout":
        _fail(
            name,
            f"could not be decoded within {timeout:g} s ({'; '.join(reasons)})",
            "Re-encode it or raise `timeout`.",
        )
    if status == "missing":
        _fail(name, f"cannot be decoded: no decoder is installed ({'; '.join(reasons)})", "Install decord or av.")
    _fail(name, f"is not a video, or is broken ({'; '.join(reasons)})", "Fetch it again or re-encode it as H.264 mp4.")


def fit_size(height: int, width: int, max_pixels: int, factor: int) -> tuple[int, int]:
    """(height, width) to resize to: multiples of ``factor``, ``max_pixels`` at most, aspect ratio kept.

    A frame that fits already keeps its size, rounded to multiples of ``factor``.
    """
    scale = min(1.0, math.sqrt(max_pixels / (height * width)))
    fitted = [max(factor, round(side * scale / factor) * factor) for side in (height, width)]
    while fitted[0] * fitted[1] > max_pixels:
        # Rounding went over the limit: shorten the side that was lengthened most, but never below one unit.
        ratios = [
            side / original if side > factor else -1.0 for side, original in zip(fitted, (height, width), strict=True)
        ]
        longer = ratios.index(max(ratios))
        fitted[longer] -= factor
    return fitted[0], fitted[1]


def _resize(frames: Tensor, max_pixels: int, factor: int) -> Tensor:
    """(T, 3, H, W) uint8 at the size of ``fit_size``: bicubic, antialiased, as the Qwen processors resize."""
    size = fit_size(frames.shape[-2], frames.shape[-1], max_pixels, factor)
    if size == tuple(frames.shape[-2:]):
        return frames.contiguous()
    resized = torch.nn.functional.interpolate(frames.float(), size=size, mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


class _Worker:
    """One decoding process. A request that runs over its time kills it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # FFmpeg's chatter; what matters comes back as an exception
        )

    def ask(self, request: tuple[Any, ...], seconds: float) -> tuple[Any, ...]:
        """The worker's answer, ("timeout", text) or ("failed", text). After the last two the worker is dead."""
        expired = threading.Event()

        def stop() -> None:
            expired.set()
            self.process.kill()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            assert self.process.stdin is not None and self.process.stdout is not None
            pickle.dump(request, self.process.stdin)
            self.process.stdin.flush()
            return pickle.load(self.process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            self.process.kill()
            code = self.process.wait()
            if expired.is_set():
                return "timeout", f"stopped after {seconds:.3g} s"
            return "failed", f"the decoder crashed (exit status {code}, {type(error).__name__})"
        finally:
            timer.cancel()

    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


# Idle workers, one per thread that decodes at the same time. They belong to the process that started them:
# after a fork the child starts its own.
_idle: list[_Worker] = []
_owner = os.getpid()
_lock = threading.Lock()


def _decode(decoder: str, path: str, seconds: float, sampling: tuple[float, int, int]) -> tuple[Any, ...]:
    global _owner
    with _lock:
        if _owner != os.getpid():
            _idle.clear()
            _owner = os.getpid()
        worker = _idle.pop() if _idle else None
    if worker is None or not worker.alive():
        worker = _Worker()
    try:
        result = worker.ask((decoder, path, *sampling), seconds)
    except BaseException:
        worker.close()  # an interrupted exchange would leave its answer to the next request
        raise
    if worker.alive():
        with _lock:
            _idle.append(worker)
    else:
        worker.close()
    return result


@atexit.register
def _close_workers() -> None:
    with _lock:
        while _idle and _owner == os.getpid():
            _idle.pop().close()


def _check_arguments(
    fps: float, max_frames: int, min_frames: int, max_pixels: int, factor: int, timeout: float, decoder: str
) -> None:
    def wrong(argument: str, expected: str, got: object, remedy: str) -> NoReturn:
        raise ValueError(f"read_video: `{argument}`: expected {expected}, got {got!r}. {remedy}")

    if not fps > 0:
        wrong("fps", "a positive number of frames per second", fps, "1.0 is usual.")
    if not timeout > 0:
        wrong("timeout", "a positive number of seconds", timeout, "30 is usual.")
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
        wrong("decoder", f"one of {('auto', *DECODERS)}", decoder, "auto tries decord, then PyAV.")


def _fail(path: str, what: str, remedy: str) -> NoReturn:
    raise VideoError(f"read_video: {path} {what}. {remedy}")
