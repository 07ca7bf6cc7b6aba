"""Drawing clips and encoding them as mp4: shapes on a noisy background, one of which changes for a moment."""

import os
from dataclasses import dataclass, field

import av
import numpy as np

# Coloured flashes keep about the brightness of the neutral shape, so that the hue has to be seen, not a jump
# in brightness.
COLOURS = {"red": (225, 60, 60), "green": (50, 185, 80), "blue": (70, 100, 235), "yellow": (215, 195, 50)}
NEUTRAL = (150, 150, 150)
WHITE = (255, 255, 255)
SHAPES = ("circle", "square", "diamond")


@dataclass(frozen=True)
class Moment:
    """From ``start`` to ``end`` (seconds) a shape has a colour or an offset (y, x; in sides), or it is gone."""

    start: float
    end: float
    colour: tuple[int, int, int] | None = None
    strength: float = 1.0
    offset: tuple[float, float] = (0.0, 0.0)
    visible: bool = True


@dataclass(frozen=True)
class Shape:
    """A shape around ``centre`` (y, x) that drifts by ``drift`` a second; lengths in units of the clip's side."""

    kind: str
    centre: tuple[float, float]
    radius: float
    drift: tuple[float, float] = (0.0, 0.0)
    moments: tuple[Moment, ...] = ()


@dataclass(frozen=True)
class Scene:
    """Shapes, later ones on top. background, and standard deviation of the noise, in grey levels."""

    shapes: tuple[Shape, ...]
    background: float = 45.0
    noise: float = 8.0
    # Side of a noise cell in pixels: finer noise would be averaged away when frames are resized.
    grain: int = field(default=4)


def draw(scene: Scene, *, side: int, fps: float, duration: float, rng: np.random.Generator) -> np.ndarray:
    """The frames of a scene, (T, side, side, 3) uint8 RGB, with T = round(duration * fps)."""
    count = round(duration * fps)
    cells = -(-side // scene.grain)
    noise = rng.normal(0.0, scene.noise, (count, cells, cells, 3)).astype(np.float32)
    noise = noise.repeat(scene.grain, 1).repeat(scene.grain, 2)[:, :side, :side]
    frames = np.full((count, side, side, 3), scene.background, np.float32)
    # The middle of a frame's time on screen decides whether a moment shows in it.
    times = (np.arange(count, dtype=np.float32) + 0.5) / fps
    for shape in scene.shapes:
        _paint(frames, shape, times)
    return np.clip(frames + noise, 0, 255).round().astype(np.uint8)


def _paint(frames: np.ndarray, shape: Shape, times: np.ndarray) -> None:
    """Draws a shape over all frames, (T, side, side, 3), shown at ``times`` (T,) seconds."""
    side = frames.shape[1]
    centre = np.array(shape.centre, np.float32) + times[:, None] * np.array(shape.drift, np.float32)  # (T, 2)
    colour = np.tile(np.array(NEUTRAL, np.float32), (len(times), 1))  # (T, 3)
    visible = np.ones(len(times), bool)
    for moment in shape.moments:
        now = (moment.start <= times) & (times < moment.end)
        visible[now] &= moment.visible
        centre[now] += np.array(moment.offset, np.float32)
        if moment.colour is not None:
            colour[now] += moment.strength * (np.array(moment.colour, np.float32) - colour[now])
    pixels = (np.arange(side, dtype=np.float32) + 0.5) / side
    down, across = (np.abs(pixels - centre[:, axis, None]) for axis in (0, 1))  # (T, side) each
    down, across = down[:, :, None], across[:, None, :]
    if shape.kind == "circle":
        distance = np.sqrt(down**2 + across**2)
    elif shape.kind == "square":
        distance = np.maximum(down, across) / np.float32(0.9)
    else:
        distance = (down + across) / np.float32(1.25)
    coverage = np.clip((np.float32(shape.radius) - distance) * side + np.float32(0.5), 0.0, 1.0)  # (T, side, side)
    coverage *= visible[:, None, None]
    frames += coverage[..., None] * (colour[:, None, None, :] - frames)


def encode(frames: np.ndarray, path: str | os.PathLike[str], *, fps: int, crf: int = 14) -> None:
    """Writes (T, H, W, 3) uint8 RGB frames with even sides as H.264 mp4; the same frames give the same bytes.

    crf: x264's quality, lower is better; up to about 20 a flash of half a second at 56 x 56 pixels stays what
    it was.
    """
    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        # mb-tree sums over blocks in an order that differs from run to run on CPUs with AVX-512.
        stream.options = {"crf": str(crf), "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
        for array in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
