"""Clips made for tests: every frame carries its number in blocks that survive compression, and which way is up.

A frame is a grid of 4 x 3 blocks, white or black: the first row says which way is up, eight blocks hold the number.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

FPS = 10
SIZE = (48, 64)  # height, width
UP = (1, 1, 0, 1)  # no flip or turn of it by 180 degrees is the same; a turn by 90 changes the shape of the frame


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """(H, W, 3) uint8: the frame with that number, 0 to 255."""
    blocks = np.array([*UP, *(number >> bit & 1 for bit in range(8))], np.float64).reshape(3, 4)
    rows = np.arange(size[0]) * 3 // size[0]
    columns = np.arange(size[1]) * 4 // size[1]
    grey = (30 + 190 * blocks[rows][:, columns]).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, 2)


def number_of(frame: Any) -> int:
    """The number in a (3, H, W) frame of any size; -1 where its blocks are not clear or it is not upright."""
    grey = np.asarray(frame, np.float64).mean(0)
    height, width = grey.shape
    values = np.array(
        [
            grey[
                int((r + 0.3) * height / 3) : int((r + 0.7) * height / 3) + 1,
                int((c + 0.3) * width / 4) : int((c + 0.7) * width / 4) + 1,
            ].mean()
            for r in range(3)
            for c in range(4)
        ]
    )
    if (abs(values - 125) < 45).any():
        return -1
    bits = (values > 125).astype(int).tolist()
    return -1 if tuple(bits[:4]) != UP else sum(bit << place for place, bit in enumerate(bits[4:]))


def make(
    path: Path,
    numbers: Iterable[int] = range(100),
    *,
    codec: str = "libx264",
    size: tuple[int, int] = SIZE,
    shown: tuple[int, int] | None = None,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    times: Sequence[float] | None = None,
    rate: int = FPS,
    start: float = 0.0,
    rotation: float = 0,
    flip: bool = False,
    sar: Fraction | None = None,
    bitrate: int = 400_000,
    audio: float = 0.0,
    max_b_frames: int | None = None,
    gop: int | None = None,
    container_options: dict[str, str] | None = None,
    format: str | None = None,
    turn: Any = None,
) -> Path:
    """A clip of the numbered frames, at ``rate`` a second or at ``times``; ``audio`` seconds of silence beside it."""
    with av.open(str(path), "w", format=format, options=container_options or {}) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        stream.bit_rate = bitrate
        if sar is not None:
            stream.codec_context.sample_aspect_ratio = sar
        if max_b_frames is not None:
            stream.codec_context.max_b_frames = max_b_frames
        if gop is not None:
            stream.codec_context.gop_size = gop
        if rotation or flip:
            stream.set_display_rotation(rotation, hflip=flip)
        if times is not None or start:
            stream.codec_context.time_base = Fraction(1, 1000)
        stream.options = options or {}
        sound: Any = None
        if audio:
            sound = container.add_stream("mp2", rate=44100)
            sound.layout = "mono"
        packets = []
        for index, number in enumerate(numbers):
            array = picture(number, shown or size)
            frame = av.VideoFrame.from_ndarray(
                array if turn is None else np.ascontiguousarray(turn(array)), format="rgb24"
            )
            if times is not None or start:
                frame.pts = round(1000 * (start + (times[index] if times is not None else index / rate)))
                frame.time_base = Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode()
        if sound is not None:
            samples = np.zeros((1, round(audio * 44100)), np.int16)
            piece = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            piece.sample_rate = 44100
            packets += sound.encode(piece)
            packets += sound.encode()
            packets.sort(key=lambda p: float((p.dts or 0) * p.time_base))
        container.mux(packets)
    return path


def copy(
    source: Path, target: Path, keep: Any = None, *, shift: int = 0, options: dict[str, str] | None = None
) -> Path:
    """The packets of ``source`` for which keep(position, packet) holds, without decoding (`ffmpeg -c copy`)."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options or {}) as new:
        streams = {s.index: new.add_stream_from_template(s) for s in old.streams}
        counts = dict.fromkeys(streams, 0)
        for packet in old.demux():
            if packet.dts is None and packet.pts is None:
                continue
            index = packet.stream_index
            counts[index] += 1
            if keep is None or keep(counts[index] - 1, packet):
                if shift:
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = streams[index]
                new.mux(packet)
    return target
