"""The frames of a video file in the order of decoding and of display, without decoding one; and a choice of them."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

# Containers that store one time per packet and in which that of a codec with frames out of order is the time of
# decoding: there, the n-th frame that comes out has the n-th time.
DECODING_TIMES = ("avi", "asf")
IN_ORDER = ("mjpeg", "msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "wmv1", "wmv2", "flv1", "h263", "rawvideo", "huffyuv")
# Elementary streams: FFmpeg makes up a time for each frame.
WITHOUT_TIMES = ("h264", "hevc", "vvc", "m4v", "mpegvideo", "mjpeg", "av1", "obu", "rawvideo")


class RefusedError(ValueError):
    """A file that no decoder is to be tried on: what is wrong with it, as the end of a sentence, and what to do."""

    def __init__(self, what: str, remedy: str = "Fetch it again, or re-encode it as H.264 mp4.") -> None:
        super().__init__(what)
        self.remedy = remedy


@dataclass(frozen=True)
class Sampling:
    """The frames that are asked for: the arguments of ``read_video``."""

    fps: float
    max_frames: int
    min_frames: int
    max_pixels: int
    factor: int
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Timeline:
    """The packets of a video stream, N in the order of decoding, and what is shown when.

    pts, dts: (N,) ticks of ``tick`` seconds; dts of ``pts`` where the container has none. key: (N,) whether decoding
    can begin there. shown: (N,) whether it is displayed (edit lists hide frames). damaged: (N,). order: (F,) positions
    of shown packets in the order of display. stop: tick at which the last frame ends. by_count: the times belong to
    the frames in the order in which they come out, whatever time the frames carry. known: whether all times are known;
    where not, those of ``order`` were computed from the frame rate.
    """

    pts: np.ndarray
    dts: np.ndarray
    key: np.ndarray
    shown: np.ndarray
    damaged: np.ndarray
    order: np.ndarray
    stop: int
    tick: float
    by_count: bool
    known: bool = True

    @property
    def times(self) -> np.ndarray:
        """(F,) int64 ticks, ascending."""
        return self.pts[self.order]

    def closed(self) -> bool:
        """Whether no frame is displayed before a keyframe that is decoded before it (no open group of pictures)."""
        least = np.minimum.accumulate(self.pts[::-1])[::-1]
        return bool((least[self.key] == self.pts[self.key]).all())

    def entry(self, position: int) -> int:
        """The position at which decoding has to begin for the frame of packet ``position`` to be right."""
        keys = np.flatnonzero(self.key[: position + 1] & (self.pts[: position + 1] <= self.pts[position]))
        return int(keys[-1]) if len(keys) else 0


def video_stream(container: Any) -> Any:
    """The stream to read: the first that is not a cover picture, the default one if any is marked so."""
    videos = [stream for stream in container.streams.video if not stream.disposition & stream.disposition.attached_pic]
    if not videos:
        cover = "a cover picture only" if len(container.streams.video) else "no video stream"
        raise RefusedError(f"has {cover}")
    stream = next((stream for stream in videos if stream.disposition & stream.disposition.default), videos[0])
    if stream.codec_context is None:
        raise RefusedError("has a video stream that no decoder of this FFmpeg reads")
    return stream


def read_timeline(container: Any, stream: Any) -> Timeline:
    """Demux the whole file. Raises RefusedError where it ends early or has no times."""
    format_name = container.format.name
    packets, ends = [], [0.0]
    for packet in container.demux():
        if packet.size == 0:
            continue  # the end of a stream, or "the last frame again" in .avi
        if packet.stream_index == stream.index:
            packets.append(packet)
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None:
            ends.append(float((stamp + (packet.duration or 0)) * packet.time_base))
    if not packets:
        raise RefusedError("has no frames")
    if format_name in WITHOUT_TIMES:
        raise RefusedError(f"is a bare {format_name} stream without times: put it into a container such as .mp4")
    if packets[-1].is_corrupt:
        raise RefusedError("ends early: its last frame is incomplete")
    timeline = _timeline(packets, stream, format_name)
    _check_end(container, stream, timeline, max(ends))
    return timeline


def _timeline(packets: list[Any], stream: Any, format_name: str) -> Timeline:
    tick = float(stream.time_base)
    shown = np.array([not p.is_discard for p in packets])
    times = [p.pts for p in packets]
    by_count = format_name in DECODING_TIMES and stream.codec_context.name not in IN_ORDER
    if not by_count and _distinct(times):
        # A packet without a time belongs to the frame before it (the second field of interlaced video).
        shown &= [time is not None for time in times]
    else:
        by_count, times = True, [p.dts for p in packets]
    complete = _distinct(times)
    if not complete:
        # Few frames have a time (H.264 in .mpg). Constant steps are checked later against those that have one.
        if not stream.average_rate or format_name not in ("mpeg", "avi"):
            raise RefusedError("has frames without a time, or several with one")
        first = next((p.pts for p in packets if p.pts is not None), 0)
        step = 1 / (float(stream.average_rate) * tick)
        times = (first + np.round(np.arange(len(packets)) * step)).astype(np.int64).tolist()
    pts = np.array(_filled(times), np.int64)
    dts = np.array([p.dts if p.dts is not None else time for p, time in zip(packets, pts.tolist(), strict=True)])
    order = np.flatnonzero(shown)
    order = order[np.argsort(pts[order], kind="stable")]
    if len(order) == 0:
        raise RefusedError("shows no frame: its edit list hides them all")
    timeline = Timeline(
        pts=pts,
        dts=dts,
        key=np.array([p.is_keyframe for p in packets]),
        shown=shown,
        damaged=np.array([p.is_corrupt for p in packets]),
        order=order,
        stop=0,
        tick=tick,
        by_count=by_count,
        known=complete,
    )
    last = packets[int(order[-1])]
    steps = np.diff(timeline.times)
    usual = int(np.median(steps)) if len(steps) else round(1 / (float(stream.average_rate or 1) * tick))
    return _replaced(timeline, stop=int(timeline.times[-1]) + int((last.duration if complete else 0) or usual or 1))


def _distinct(times: list[int | None]) -> bool:
    """Whether no two are the same and most are known."""
    known = [time for time in times if time is not None]
    return len(set(known)) == len(known) and 2 * len(known) > len(times)


def _filled(times: list[int | None]) -> list[int]:
    """Times with unknown ones replaced by the one before (the next, at the beginning)."""
    last = next((time for time in times if time is not None), 0)
    return [last := time if time is not None else last for time in times]


def _replaced(timeline: Timeline, **changes: Any) -> Timeline:
    return Timeline(**{**timeline.__dict__, **changes})


def from_first_frame(timeline: Timeline, pts: int) -> Timeline:
    """The timeline without what comes before the first frame that could be decoded (leading frames after a cut)."""
    return _replaced(timeline, order=timeline.order[timeline.times >= pts])


def _check_end(container: Any, stream: Any, timeline: Timeline, end: float) -> None:
    """Refuse a file whose packets end well before its header says, or go on long after.

    The first was cut (the sizes of `shortage` see most of them), the second has damaged times.
    end: seconds at which the last packet of any stream ends: headers of some containers give one duration for all.
    """
    names = container.format.name.split(",")
    if "mov" in names and stream.duration and stream.frames:  # 0: of fragments, of which it may know some only
        declared = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
        end = float(timeline.pts.max() + timeline.stop - timeline.times[-1]) * timeline.tick
    elif container.duration and any(name in names for name in ("matroska", "flv", "asf")):
        declared = container.duration / 1e6
    else:  # the duration is FFmpeg's own estimate
        return
    slack = max(1.0, 0.05 * declared)
    if declared - end > slack:
        raise RefusedError(f"ends early: at {end:.2f} s of {declared:.2f} s")
    # Headers leave out start times and the last frame's rest; only what is far beyond them is a damaged time.
    length = float(timeline.stop - timeline.times[0]) * timeline.tick
    if length > 2 * declared + 10:
        raise RefusedError(f"has damaged times: its frames go on for {length:.2f} s, its header says {declared:.2f} s")


def choose(times: np.ndarray, duration: float, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """An even number T of frames, evenly spread in time: (T,) indices into ``times`` and (T,) fp64 seconds.

    times: (F,) fp64 seconds of all frames, ascending from 0. Sample i of T stands for the i-th of T equal parts of the
    clip (or of the segment from ``start`` to ``end``): it is the frame that is on the screen when that part begins, and
    its time is that of the frame, or of the beginning of the part where the frame has been on the screen since an
    earlier one. There are about ``fps`` samples a second, and no more than frames unless there is only one.
    """
    begin, stop = _segment(duration, sampling)
    slack = min(1e-3, duration / len(times) / 4)  # containers round times, to milliseconds for instance
    first = max(int(np.searchsorted(times, begin + slack, side="right")) - 1, 0)
    last = max(int(np.searchsorted(times, stop - slack, side="left")) - 1, first)
    wanted = round((stop - begin) * sampling.fps)
    wanted = min(max(wanted, sampling.min_frames), sampling.max_frames, last - first + 1)
    count = max(wanted - wanted % 2, 2)
    asked = begin + (stop - begin) * np.arange(count) / count
    indices = np.clip(np.searchsorted(times, asked + slack, side="right") - 1, first, last)
    fresh = np.diff(indices, prepend=-1) > 0
    fresh[0] = times[indices[0]] >= begin
    return indices, np.where(fresh, times[indices], asked)


def _segment(duration: float, sampling: Sampling) -> tuple[float, float]:
    begin = sampling.start or 0.0
    stop = duration if sampling.end is None else sampling.end
    if begin >= duration:
        raise RefusedError(
            f"lasts {duration:.3f} s: nothing of it comes after `start` = {begin:g} s", "Mend the segment."
        )
    # Annotations are rounded and end a little after the clip; more than that is a span of another clip.
    if stop > duration + max(1.0, 0.05 * duration):
        raise RefusedError(f"lasts {duration:.3f} s, well short of `end` = {stop:g} s", "Mend the segment.")
    return begin, min(stop, duration)


def check_times(seconds: np.ndarray, duration: float) -> None:
    """Assert what every decoder promises of its times."""
    if not (np.isfinite(seconds).all() and math.isfinite(duration) and (np.diff(seconds) > 0).all()):
        raise ValueError(f"times that are not ascending: {seconds[:8].tolist()}")
    if seconds[0] < 0 or seconds[-1] > duration:
        raise ValueError(f"times from {seconds[0]:g} to {seconds[-1]:g} s in a clip of {duration:g} s")
