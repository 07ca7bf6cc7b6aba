"""Drawing short clips and encoding them as mp4: a few shapes on a noisy background, one of which changes for a moment."""

import os
from dataclasses import dataclass, field

import av
import numpy as np

# Coloured flashes keep about the brightness of the neutral shape, so that the hue has to be seen, not a jump in brightness.
COLOURS = {"red": (225, 60, 60), "green": (50, 185, 80), "blue": (70, 100, 235), "yellow": (215, 195, 50)}
NEUTRAL = (150, 150, 150)
WHITE = (255, 255, 255)
SHAPES = ("circle", "square", "diamond")


@dataclass(frozen=True)
class Moment:
    """What happens to a shape between ``start`` and ``end`` (seconds): a colour, an offset (y, x, in sides), or it is gone."""

    start: float
    end: float
    colour: tuple[int, int, int] | None = None
    strength: float = 1.0
    offset: tuple[float, float] = (0.0, 0.0)
    visible: bool = True


@dataclass(frozen=True)
class Shape:
    """A shape of radius ``radius`` around ``centre`` (y, x), drifting by ``drift`` a second; all in units of the clip's side."""

    kind: str
    centre: tuple[float, float]
    radius: float
    drift: tuple[float, float] = (0.0, 0.0)
    moments: tuple[Moment, ...] = ()


@dataclass(frozen=True)
class Scene:
    """Shapes are drawn in order, later ones on top. background: grey level; noise: standard deviation in grey levels."""

    shapes: tuple[Shape, ...]
    background: float = 45.0
    noise: float = 8.0
    grain: int = field(
        default=4
    )  # side of a noise cell in pixels: finer noise would be averaged away when frames are resized


def draw(scene: Scene, *, side: int, fps: float, duration: float, rng: np.random.Generator) -> np.ndarray:
    """The frames of a scene, (T, side, side, 3) uint8 RGB, with T = round(duration * fps)."""
    count = round(duration * fps)
    cells = -(-side // scene.grain)
    noise = rng.normal(0.0, scene.noise, (count, cells, cells, 3)).astype(np.float32)
    noise = noise.repeat(scene.grain, 1).repeat(scene.grain, 2)[:, :side, :side]
    frames = np.full((count, side, side, 3), scene.background, np.float32)
    pixels = (np.arange(side, dtype=np.float32) + 0.5) / side
    for index in range(count):
        # The middle of the frame's time on screen decides whether a moment shows in it.
        now = (index + 0.5) / fps
        for shape in scene.shapes:
            _paint(frames[index], shape, now, pixels, side)
    return np.clip(frames + noise, 0, 255).round().astype(np.uint8)


def _paint(frame: np.ndarray, shape: Shape, now: float, pixels: np.ndarray, side: int) -> None:
    colour = np.array(NEUTRAL, np.float32)
    centre = np.array(shape.centre) + now * np.array(shape.drift)
    for moment in shape.moments:
        if moment.start <= now < moment.end:
            if not moment.visible:
                return
            centre = centre + moment.offset
            if moment.colour is not None:
                colour = colour + moment.strength * (np.array(moment.colour, np.float32) - colour)
    down, across = np.abs(pixels - centre[0])[:, None], np.abs(pixels - centre[1])[None, :]
    if shape.kind == "circle":
        distance = np.sqrt(down**2 + across**2)
    elif shape.kind == "square":
        distance = np.maximum(down, across) / 0.9
    else:
        distance = (down + across) / 1.25
    coverage = np.clip((shape.radius - distance) * side + 0.5, 0.0, 1.0)[..., None]
    frame += coverage * (colour - frame)


def encode(frames: np.ndarray, path: str | os.PathLike[str], *, fps: int, crf: int = 14) -> None:
    """Writes (T, H, W, 3) uint8 RGB frames with even sides as H.264 mp4. One thread: the same frames give the same bytes.

    crf: x264's quality, lower is better; up to about 20 a flash of half a second at 56 x 56 pixels stays what it was.
    """
    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        stream.options = {"crf": str(crf), "preset": "veryfast", "threads": "1"}
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
