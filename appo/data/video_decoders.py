"""Exact frames of a file at chosen times, by PyAV and by decord.

PyAV is the measure: `Source` knows the time of every frame from the packets, seeks only where that skips whole groups
of pictures, and compares every frame that comes out with the one that is due. decord counts frames instead, so it is
used only for files on which that count was found to be right, with its times compared.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from appo.data.video_container import shortage
from appo.data.video_pixels import Shaper, orientation
from appo.data.video_timeline import (
    RefusedError,
    Sampling,
    Timeline,
    check_times,
    choose,
    from_first_frame,
    read_timeline,
    video_stream,
)

# Demuxers that read one local file. Playlists (hls, concat) would open other files and addresses.
FORMATS = (
    "mov,matroska,avi,asf,flv,live_flv,mpeg,mpegts,gif,apng,ogg,mxf,nut,dv,rm,wtv,ivf,"
    "h264,hevc,vvc,m4v,mpegvideo,mjpeg,obu"
)
MOST_PIXELS = 1 << 26  # of a stored frame: 8K has 33 million
# Containers that do not say how long they are: where they end early, the last frame is damaged if any is.
WITHOUT_LENGTH = ("mpegts", "mpeg")
# What decord 0.6 was found to decode right, together with a closed group of pictures and a display from the first
# packet on (tests/test_video_decoders.py).
DECORD_FORMATS = ("mov", "matroska")
DECORD_CODECS = ("h264", "hevc", "vp8", "vp9")
USE_PYAV = 'Read it with PyAV: decoder "pyav" or "auto".'


class UnexpectedFrameError(ValueError):
    """A frame came out that was not the one due."""


class Source:
    """A file of which frames are decoded at given places of its timeline."""

    def __init__(self, path: str) -> None:
        self.av = importlib.import_module("av")
        self.path = path
        short = shortage(path)
        if short:
            raise RefusedError(f"ends early: {short}")
        self.container: Any = None
        self._open()
        self.timeline: Timeline = read_timeline(self.container, self.stream)
        # Containers turn every frame; streams say it at the first one, or at every keyframe.
        self.turn = orientation(self._first_frame()) or (0, False)

    def _open(self) -> None:
        self.close()
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        try:
            self.container = self.av.open(f"file:{self.path}", options=options)
        except self.av.ArgumentError:
            raise RefusedError("is not a video, but an image, sound, text or a playlist") from None
        self.stream = video_stream(self.container)
        self.stream.thread_type = "NONE"
        # Damaged data is an error, not something to be painted over.
        self.stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MOST_PIXELS)}

    def close(self) -> None:
        if self.container is not None:
            self.container.close()
            self.container = None

    def _first_frame(self) -> Any:
        """The first frame that can be decoded, from which times are counted."""
        _, frame = next(self._output(0), (0, None))
        if frame is None:
            raise ValueError("no frame could be decoded")
        if not self.timeline.by_count:
            self.timeline = from_first_frame(self.timeline, frame.pts)
            if not len(self.timeline.order):
                raise ValueError("the first frame has a time that no packet has")
        return frame

    @property
    def seconds(self) -> np.ndarray:
        """(F,) fp64 seconds from the first frame."""
        return (self.timeline.times - self.timeline.times[0]) * self.timeline.tick

    @property
    def duration(self) -> float:
        return float(self.timeline.stop - self.timeline.times[0]) * self.timeline.tick

    @property
    def fps(self) -> float:
        """Frames per second of the file, on average."""
        return len(self.timeline.order) / self.duration

    @property
    def aspect(self) -> Any:
        """Width / height of a stored pixel, or None."""
        return self.stream.sample_aspect_ratio or self.stream.codec_context.sample_aspect_ratio

    def frames(self, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        """(index, frame) of the wanted indices, ascending and distinct. Raises ValueError where one is missing."""
        chosen, last = set(wanted.tolist()), len(self.timeline.order) - 1
        if self.container.format.name in WITHOUT_LENGTH and last not in chosen:
            wanted = np.append(wanted, last)
        yield from ((index, frame) for index, frame in self._frames(wanted) if index in chosen)

    def _frames(self, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        if self.timeline.by_count:
            yield from self._by_count(wanted)
            return
        done = 0
        try:
            for index, frame in self._by_time(wanted, seek=True):
                yield index, frame
                done += 1
        except (UnexpectedFrameError, self.av.FFmpegError):
            # Containers without an index do not land where they are asked to; from the beginning nothing is missed.
            yield from self._by_time(wanted[done:], seek=False)

    def _by_time(self, wanted: np.ndarray, *, seek: bool) -> Iterator[tuple[int, Any]]:
        timeline = self.timeline
        output: Iterator[tuple[int, Any]] = iter(())
        fed, due, begun = -1, 0, False  # the last packet decoded, the frame that comes next, whether one has come
        for index in wanted.tolist():
            entry = timeline.entry(int(timeline.order[index])) if seek else 0
            if fed < 0 or entry > fed:
                output, begun = self._output(entry), False
                due = int(np.searchsorted(timeline.times, timeline.pts[entry])) if entry else 0
            while due <= index:
                fed, frame = next(output, (fed, None))
                if frame is not None and frame.pts is not None and frame.pts < timeline.times[due] and not begun:
                    continue  # hidden by an edit list, or before the first frame that counts
                if frame is None or frame.pts != timeline.times[due]:
                    raise UnexpectedFrameError(f"the frame at {self.seconds[due]:.3f} s could not be decoded")
                due, begun = due + 1, True
            yield index, frame

    def _by_count(self, wanted: np.ndarray) -> Iterator[tuple[int, Any]]:
        """Decodes all frames: their number has to be that of the packets, for the times to belong to them."""
        count, chosen = 0, set(wanted.tolist())
        step = self.timeline.times[1] - self.timeline.times[0] if len(self.timeline.order) > 1 else 1
        anchor: int | None = None
        for _, frame in self._output(0):
            if not self.timeline.known and frame.pts is not None and count < len(self.timeline.order):
                offset = frame.pts - int(self.timeline.times[count])
                anchor = offset if anchor is None else anchor
                if abs(offset - anchor) >= step:
                    raise ValueError("frames without times, and no constant rate fits those that have one")
            if count in chosen:
                yield count, frame
            count += 1
        if count != len(self.timeline.order):
            raise ValueError(f"{count} frames could be decoded of {len(self.timeline.order)}")

    def _output(self, entry: int) -> Iterator[tuple[int, Any]]:
        """(position of the last packet decoded, frame) in the order of display, from the keyframe ``entry`` on."""
        timeline = self.timeline
        if entry:
            self.container.seek(int(timeline.dts[entry]), stream=self.stream)
            position = -1  # not known before the keyframe is seen
        else:
            self._open()  # a seek to the first time does not reach the first packet in every container
            position = 0
        started = False
        for packet in self.container.demux(self.stream):
            flush = packet.size == 0 and packet.pts is None and packet.dts is None
            if packet.size == 0 and not flush:
                continue
            if position < 0:
                if flush or (packet.dts is not None and packet.dts > timeline.dts[entry]):
                    raise UnexpectedFrameError(f"no keyframe at {timeline.pts[entry] * timeline.tick:.3f} s")
                if not (packet.is_keyframe and packet.pts == timeline.pts[entry]):
                    continue
                position = entry
            if entry and not flush and timeline.pts[position] < timeline.pts[entry]:
                position += 1
                continue  # it depends on frames before the keyframe, and nothing that is wanted depends on it
            if not flush and timeline.damaged[position] and (started or entry):
                raise ValueError(f"damaged at {timeline.pts[position] * timeline.tick:.3f} s")
            try:
                decoded = self.stream.codec_context.decode(None if flush else packet)
            except self.av.FFmpegError:
                if started or entry:
                    raise
                decoded = []  # what a cut has left at the beginning
            for frame in decoded:
                if frame.is_corrupt and not started:
                    continue
                started = True
                yield position, frame
            if not flush:
                position += 1


def _shaped(source: Source, frame: Any, shaper: Shaper) -> np.ndarray:
    return shaper(frame.to_ndarray(format="rgb24"), *(orientation(frame) or source.turn))


def decode_pyav(path: str, sampling: Sampling) -> tuple[Any, ...]:
    source = Source(path)
    try:
        indices, seconds = choose(source.seconds, source.duration, sampling)
        check_times(seconds, source.duration)
        shaper = Shaper(sampling.max_pixels, sampling.factor, source.aspect)
        found = {index: _shaped(source, frame, shaper) for index, frame in source.frames(np.unique(indices))}
        return np.stack([found[index] for index in indices.tolist()]), seconds, source.fps, source.duration
    finally:
        source.close()


def decode_decord(path: str, sampling: Sampling) -> tuple[Any, ...]:
    decord = importlib.import_module("decord")
    source = Source(path)
    try:
        reason = _decord_reason(source)
        if reason:
            raise RefusedError(f"is not read with decord, which is wrong on {reason}", USE_PYAV)
        indices, seconds = choose(source.seconds, source.duration, sampling)
        check_times(seconds, source.duration)
        reader = decord.VideoReader(path, num_threads=1)
        spans = np.asarray(reader.get_frame_timestamp(list(range(len(reader)))), np.float64).reshape(-1, 2)
        if len(spans) != len(source.seconds) or abs(spans[:, 0] - spans[0, 0] - source.seconds).max() > 2e-3:
            raise RefusedError("is not read with decord, whose times are not those of the packets", USE_PYAV)
        shaper = Shaper(sampling.max_pixels, sampling.factor, source.aspect)
        found = {index: shaper(reader[index].asnumpy()) for index in np.unique(indices).tolist()}
        return np.stack([found[index] for index in indices.tolist()]), seconds, source.fps, source.duration
    finally:
        source.close()


def _decord_reason(source: Source) -> str | None:
    """The kind of file on which decord 0.6 gives other frames than those asked for."""
    timeline = source.timeline
    names = source.container.format.name.split(",")
    codec = source.stream.codec_context.codec.canonical_name
    if not any(name in names for name in DECORD_FORMATS):
        return f"files of the format {names[0]}"
    if codec not in DECORD_CODECS:
        return f"{codec} in a file of the format {names[0]}"
    if not timeline.closed():
        return "open groups of pictures"
    if not timeline.shown.all() or len(timeline.order) != len(timeline.pts):
        return "files whose beginning is hidden by an edit list or cannot be decoded"
    if source.turn != (0, False):
        return "turned or mirrored frames"
    return None


DECODERS = {"pyav": decode_pyav, "decord": decode_decord}
