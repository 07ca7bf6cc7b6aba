"""Frames of a video as the rest of the package takes them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """Sampled frames of a video, or of its segment from ``start`` to ``end``.

    frames: (T, 3, H, W) uint8, RGB; T is even. timestamps: (T,) fp64, ascending, seconds from the first frame of the
    file, of a segment too. source_fps: frames per second in the file, on average. duration: seconds, of the file.
    start, end: seconds from the first frame of the file.
    """

    frames: Tensor
    timestamps: Tensor
    source_fps: float
    duration: float
    start: float
    end: float
