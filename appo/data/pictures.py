"""Reading image files: upright, in 8 bits, of a bounded size, or an error that says what they are instead."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from appo.data.video_pixels import fit_size

MOST_PIXELS = 89_000_000  # of an image file; Pillow warns of more as an attack
THINNEST = 200  # long side to short side: what the processors of Qwen take at most


def read_image(source: Path | bytes, max_pixels: int, factor: int) -> Tensor:
    """(3, H, W) uint8 RGB, upright; sides are multiples of ``factor``, ``max_pixels`` at most in all.

    16 bits a channel are scaled to 8, what is transparent is laid on white. Raises ImageError.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise ImageError(f"{width} x {height} pixels; at most {MOST_PIXELS:,}. Shrink it")
            if max(width, height) > THINNEST * min(width, height):
                raise ImageError(f"{width} x {height} pixels: one side more than {THINNEST} times the other. Crop it")
            if getattr(image, "is_animated", False) and image.format in ("GIF", "WEBP", "PNG", "AVIF"):
                raise ImageError("several frames, an animation. Give it as a video, or one frame of it")
            size = fit_size(height, width, max_pixels, factor)
            image.draft("RGB", (size[1], size[0]))  # JPEG is decoded at no more than twice the size
            upright = ImageOps.exif_transpose(image)
            size = fit_size(upright.height, upright.width, max_pixels, factor)
            rgb = _rgb(upright).resize((size[1], size[0]), Image.Resampling.BICUBIC, reducing_gap=3.0)
            return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()
    except Image.DecompressionBombError as error:
        raise ImageError(f"too many pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError("no image, or of an unknown kind") from error
    except (OSError, SyntaxError, ValueError, EOFError, OverflowError, MemoryError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"broken: {error}") from error


class ImageError(ValueError):
    """An image that cannot be used; the text says what it is instead."""


def _rgb(image: Any) -> Any:
    """An image of any mode as RGB."""
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.float64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ImageError("32 bits a pixel, of an unknown scale. Save it with 8 or 16 bits")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("floating-point pixels, of an unknown scale. Save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(paper, layer).convert("RGB")
    return image.convert("RGB")
