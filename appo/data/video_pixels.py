"""From a decoded frame to the picture a model sees: upright, of the shape it is displayed in, at a bounded size."""

import math
from typing import Any

import numpy as np


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


def orientation(frame: Any) -> tuple[int, bool] | None:
    """(quarter turns counterclockwise, whether it is mirrored left to right before them) that make a frame upright.

    None where the frame says nothing of it. Cameras store how they were held as a display matrix, in the container or
    in the stream; it maps the stored (x, y) to where it is displayed (FFmpeg's libavutil/display.h). Raises ValueError
    for any that is no quarter turn.
    """
    data = next((bytes(side) for side in frame.side_data if side.type.name == "DISPLAYMATRIX"), None)
    if data is None:
        return None
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].astype(np.float64).tolist()
    length = math.hypot(a, b)
    turned = a * d - b * c
    if length == 0 or turned == 0:
        return None  # a matrix of zeros says nothing
    mirrored = turned < 0
    if mirrored:
        a, b = -a, -b  # the matrix is: mirror x, then turn
    angle = -math.degrees(math.atan2(b, a))  # x to the right, y down: this is counterclockwise
    quarters = round(angle / 90)
    if abs(angle - 90 * quarters) > 1:
        raise ValueError(f"frames turned by {angle:.0f} degrees, which is not a multiple of 90")
    return quarters % 4, mirrored


def display_size(height: int, width: int, aspect: Any) -> tuple[int, int]:
    """(height, width) of square pixels for stored pixels of the ratio ``aspect`` (width / height; None: square).

    As players do it, the height is kept. Ratios beyond 4 to 1 are mistakes of the file and ignored.
    """
    ratio = float(aspect) if aspect else 1.0
    return (height, max(1, round(width * ratio))) if 0.25 <= ratio <= 4 else (height, width)


class Shaper:
    """Turns decoded pictures of one clip upright and to one size; the first of them decides the size."""

    def __init__(self, max_pixels: int, factor: int, aspect: Any) -> None:
        self.max_pixels, self.factor, self.aspect = max_pixels, factor, aspect
        self.size: tuple[int, int] | None = None

    def __call__(self, picture: np.ndarray, quarters: int = 0, mirrored: bool = False) -> np.ndarray:
        """picture: (h, w, 3) uint8 as stored. Returns (H, W, 3) uint8."""
        from PIL import Image

        height, width = display_size(picture.shape[0], picture.shape[1], self.aspect)
        if quarters % 2:
            height, width = width, height
        if self.size is None:
            self.size = fit_size(height, width, self.max_pixels, self.factor)
        height, width = self.size[::-1] if quarters % 2 else self.size
        if picture.shape[:2] != (height, width):
            # Bicubic with antialiasing, as the Qwen processors resize.
            image = Image.fromarray(np.ascontiguousarray(picture))
            picture = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        if mirrored:
            picture = picture[:, ::-1]
        return np.rot90(picture, quarters)
