"""Video files of every container and codec, and how what is read out of them is checked."""

import av
import numpy as np
import pytest
from video_clips import make, number_of

from appo.data.video import VideoError, read_video

READ = {"fps": 3.0, "max_frames": 16, "max_pixels": 128 * 128, "factor": 16}
OPEN = {"x264-params": "open-gop=1:scenecut=0"}
X265 = {"x265-params": "keyint=10:log-level=none:pools=1:frame-threads=1"}  # x265 opens groups of pictures by default
AV1 = {"preset": "8", "crf": "20"}


def read(path, decoder="pyav", **changes):
    """(numbers, clip); the promises that hold for every file are checked on the way."""
    clip = read_video(path, decoder=decoder, **{**READ, **changes})
    times = clip.timestamps
    assert times.isfinite().all() and (times.diff() > 0).all()
    assert times[0] >= 0 and times[-1] <= clip.duration
    assert len(times) == len(clip.frames) and len(times) % 2 == 0
    return [number_of(frame) for frame in clip.frames], clip


def check(path, decoder="pyav", *, frames=100, rate=10, first=0, **changes):
    """A clip of constant rate: the frames and times of the asked parts, in the file's own duration."""
    numbers, clip = read(path, decoder, **changes)
    assert numbers == [first + i * frames // len(numbers) for i in range(len(numbers))]
    np.testing.assert_allclose(clip.timestamps, (np.array(numbers) - first) / rate, atol=2e-3)
    assert clip.duration == pytest.approx(frames / rate, abs=0.01)
    assert clip.source_fps == pytest.approx(rate, rel=0.01)
    return clip


def check_decord(path, **expected):
    """decord gives the same, or is refused by name."""
    try:
        check(path, "decord", **expected)
    except VideoError as error:
        assert "is not read with decord" in str(error) and str(path) in str(error), error


def encoded(path, codec, **settings):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    return make(path, codec=codec, **settings)


# Every codec in the containers it is found in: one group of pictures and many, closed and open, with frames stored out
# of order (the default of x264, x265, VP9 and AV1; b=2 of the MPEG family), times of decoding only (.avi, .wmv), and
# none (H.264 in .mpg).
FILES = {
    "one-group.mp4": ("libx264", {}),
    **{
        f"h264.{suffix}": ("libx264", {"gop": 10}) for suffix in ["mp4", "mov", "mkv", "avi", "ts", "flv", "mpg", "wmv"]
    },
    **{f"open.{suffix}": ("libx264", {"gop": 10, "options": OPEN}) for suffix in ["mp4", "mkv", "ts"]},
    "fragments.mp4": ("libx264", {"gop": 10, "container_options": {"movflags": "frag_keyframe+empty_moov"}}),
    "refresh.mp4": ("libx264", {"gop": 20, "options": {"x264-params": "intra-refresh=1:bframes=0"}}),
    "interlaced.mp4": ("libx264", {"options": {"x264-params": "interlaced=1"}}),
    **{f"hevc.{suffix}": ("libx265", {"gop": 10, "options": X265}) for suffix in ["mp4", "mkv", "ts"]},
    "ten-bit.mp4": ("libx265", {"pix_fmt": "yuv420p10le", "options": X265}),
    "ten-bit.mkv": ("libx264", {"pix_fmt": "yuv420p10le"}),
    **{f"mpeg4.{suffix}": ("mpeg4", {"gop": 12}) for suffix in ["mp4", "avi"]},
    **{f"mpeg4-b.{suffix}": ("mpeg4", {"gop": 12, "max_b_frames": 2}) for suffix in ["mp4", "avi", "mkv", "wmv", "ts"]},
    "msmpeg4.avi": ("msmpeg4", {"gop": 12}),
    "wmv1.wmv": ("wmv1", {"gop": 12}),
    "wmv2.wmv": ("wmv2", {"gop": 12}),
    **{f"mpeg1.{suffix}": ("mpeg1video", {"gop": 12, "max_b_frames": 2, "rate": 25}) for suffix in ("mpg", "avi")},
    **{
        f"mpeg2.{suffix}": ("mpeg2video", {"gop": 12, "max_b_frames": 2, "rate": 25})
        for suffix in ["mpg", "ts", "mp4", "avi", "mkv"]
    },
    "vp8.webm": ("libvpx", {"gop": 12, "options": {"cpu-used": "8", "deadline": "realtime"}}),
    "vp9.webm": ("libvpx-vp9", {"gop": 12, "options": {"cpu-used": "8", "lag-in-frames": "10", "auto-alt-ref": "1"}}),
    "vp9.mp4": ("libvpx-vp9", {"gop": 12, "options": {"cpu-used": "8"}}),
    "av1.mp4": ("libsvtav1", {"size": (96, 128), "options": AV1, "bitrate": 0}),
    "av1.webm": ("libsvtav1", {"size": (96, 128), "options": AV1, "bitrate": 0}),
    "mjpeg.avi": ("mjpeg", {"pix_fmt": "yuvj420p"}),
    "mjpeg.mov": ("mjpeg", {"pix_fmt": "yuvj420p"}),
    "sorenson.flv": ("flv", {"gop": 12}),
    "palette.gif": ("gif", {"pix_fmt": "gray"}),
}
