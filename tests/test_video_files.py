"""Files as people have them: containers, codecs, cameras and cuts. A frame tells its number and which way is up."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import video_clips
from video_clips import copy, make, number_of

from appo.data.video import DECODERS, VideoError, read_video
from appo.data.video_container import shortage

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


@pytest.mark.parametrize("name", FILES)
def test_every_container_and_codec(tmp_path, name):
    codec, settings = FILES[name]
    path = encoded(tmp_path / name, codec, **settings)
    rate = settings.get("rate", 10)
    # Every frame, and few (long gaps, so that whole groups of pictures are skipped).
    for changes in ({"fps": 30.0, "max_frames": 200, "frames": 100}, {"max_frames": 6}):
        check(path, rate=rate, **changes)
        check_decord(path, rate=rate, **changes)


def test_decord_reads_what_it_is_right_on(tmp_path):
    for name in ("h264.mp4", "h264.mkv", "vp9.webm"):
        codec, settings = FILES[name]
        check(encoded(tmp_path / name, codec, **settings), "decord")


# The eight ways in which a camera can be held or mirror: the display matrix turns counterclockwise, then mirrors.
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_frames_are_upright(tmp_path, rotation, flip, suffix):
    def stored(picture):
        return np.rot90(picture[:, ::-1] if flip else picture, -rotation // 90)

    size = (64, 48) if rotation % 180 else (48, 64)
    path = make(tmp_path / f"held.{suffix}", range(20), rotation=rotation, flip=flip, turn=stored, shown=size)
    clip = check(path, frames=20)
    assert clip.frames.shape[2:] == size
    check_decord(path, frames=20)


def test_an_orientation_within_the_stream_counts_too(tmp_path):
    plain = make(tmp_path / "plain.mp4", range(20), turn=lambda picture: np.rot90(picture, 2))
    path = tmp_path / "sei.mkv"
    with av.open(str(plain)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        chain = av.BitStreamFilterContext(
            "h264_metadata=display_orientation=insert:rotate=180", old.streams.video[0], stream
        )
        for packet in old.demux(video=0):
            for changed in chain.filter(packet if packet.size else None):
                changed.stream = stream
                new.mux(changed)
    check(path, frames=20)
    check_decord(path, frames=20)


def test_a_turn_that_is_no_quarter_is_an_error(tmp_path):
    path = make(tmp_path / "tilted.mp4", range(4), rotation=30)
    with pytest.raises(VideoError, match=r"tilted\.mp4 .*turned by 30 degrees"):
        read(path)


# Pixels twice as wide as high and the other way round; a ratio that only a mistake can be.
@pytest.mark.parametrize(("ratio", "size"), [((2, 1), (48, 128)), ((1, 2), (48, 32)), ((100, 1), (48, 64))])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_pixels_that_are_not_square(tmp_path, ratio, size, suffix):
    path = make(tmp_path / f"wide.{suffix}", range(20), sar=Fraction(*ratio))
    for decoder in DECODERS:
        assert check(path, decoder, frames=20).frames.shape[2:] == size


# Containers that keep a start time, and those that turn it into an edit list.
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "flv"])
def test_times_count_from_the_first_frame(tmp_path, suffix):
    path = make(tmp_path / f"late.{suffix}", start=5.0)
    check(path)
    check_decord(path)


# The beginning hidden by an edit list (within a group of pictures), and a gap before it.
@pytest.mark.parametrize("shift", [-25, 25])
@pytest.mark.parametrize("kind", ["h264.mp4", "open.mp4", "hevc.mp4", "mpeg2.mp4"])
def test_edit_lists(tmp_path, kind, shift):
    codec, settings = FILES[kind]
    source = encoded(tmp_path / kind, codec, **settings)
    rate = settings.get("rate", 10)
    with av.open(str(source)) as container:
        ticks = round(1 / (container.streams.video[0].time_base * rate))
    path = copy(source, tmp_path / "edited.mp4", shift=shift * ticks)
    hidden = max(0, -shift)
    check(path, frames=100 - hidden, first=hidden, rate=rate)
    check_decord(path, frames=100 - hidden, first=hidden, rate=rate)


# `-c copy` from a keyframe, and from the middle of a group of pictures, whose frames cannot be shown.
@pytest.mark.parametrize("begin", [20, 15])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "flv"])
def test_cuts_without_encoding(tmp_path, begin, suffix):
    source = make(tmp_path / "source.mp4", gop=10, options={"x264-params": "scenecut=0:bframes=2:b-pyramid=none"})
    path = copy(source, tmp_path / f"cut.{suffix}", lambda place, _: begin <= place < 80)
    check(path, frames=60, first=20)
    check_decord(path, frames=60, first=20)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm"])
def test_evenly_spread_is_in_time(tmp_path, suffix):
    times = [0.1 * i for i in range(16)] + [1.6 + 2.0 * i for i in range(20)]
    path = make(
        tmp_path / f"slides.{suffix}", range(36), times=times, codec="libvpx-vp9" if suffix == "webm" else "libx264"
    )
    for decoder in DECODERS:
        numbers, clip = read(path, decoder, fps=1.0, max_frames=24)
        asked = np.arange(24) * clip.duration / 24
        shown = [int(np.searchsorted(times, when + 1e-3, side="right")) - 1 for when in asked]
        assert numbers == shown
        # The time of a frame is its own, or that at which it is still on the screen.
        assert all(
            abs(times[n] - t) < 2e-3 or abs(a - t) < 1e-9
            for n, t, a in zip(numbers, clip.timestamps, asked, strict=True)
        )


# Gaps where frames are missing from the container: the frame before stays on the screen.
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_missing_frames(tmp_path, suffix):
    source = make(tmp_path / "source.mp4", codec="libx264", options={"x264-params": "bframes=0:keyint=1"})
    path = copy(source, tmp_path / f"gaps.{suffix}", lambda place, _: not 31 <= place < 44)
    numbers, clip = read(path, fps=10.0, max_frames=20)
    there = [n for n in range(100) if not 31 <= n < 44]
    asked = np.arange(20) * 0.5
    assert numbers == [max(n for n in there if n / 10 <= when + 1e-3) for when in asked]
    assert clip.duration == pytest.approx(10.0, abs=0.01)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", ["few.mp4", "few.mkv", "few.avi", "few.ts", "few.gif", "few.webm", "few.mpg"])
def test_one_two_and_three_frames(tmp_path, name, count):
    codec = {"avi": "mpeg4", "gif": "gif", "webm": "libvpx-vp9", "mpg": "mpeg2video"}.get(name[4:], "libx264")
    rate = 25 if codec == "mpeg2video" else 10
    path = encoded(
        tmp_path / name, codec, numbers=range(7, 7 + count), rate=rate, pix_fmt="gray" if codec == "gif" else "yuv420p"
    )
    for decoder in DECODERS:
        try:
            numbers, clip = read(path, decoder)
        except VideoError as error:
            assert decoder == "decord" and "is not read with decord" in str(error)
        else:
            assert numbers == ([7, 7] if count == 1 else [7, 7 + count // 2])
            assert clip.duration == pytest.approx(count / rate, abs=0.01)


@pytest.mark.parametrize("name", ["odd.mp4", "odd.mkv"])
def test_odd_sizes(tmp_path, name):
    path = make(tmp_path / name, range(20), size=(51, 65), pix_fmt="yuv444p")
    for decoder in DECODERS:
        assert check(path, decoder, frames=20).frames.shape[2:] == (48, 64)


@pytest.mark.parametrize("name", ["sound.mp4", "sound.mkv", "sound.avi", "sound.ts", "sound.mpg"])
def test_sound_that_goes_on_longer(tmp_path, name):
    rate = 25 if name.endswith("mpg") else 10
    codec = {"avi": "mpeg4", "mpg": "mpeg2video"}.get(name[6:], "libx264")
    path = make(tmp_path / name, range(50), codec=codec, rate=rate, audio=9.0)
    check(path, frames=50, rate=rate)
    check_decord(path, frames=50, rate=rate)


def test_the_film_and_not_its_cover(tmp_path):
    path = tmp_path / "covered.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 90, 60, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        film = container.add_stream("libx264", rate=10)
        film.height, film.width, film.pix_fmt = 48, 64, "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.zeros((90, 60, 3), np.uint8), format="rgb24")
        container.mux(cover.encode(picture))
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(video_clips.picture(number), format="rgb24")
            container.mux(film.encode(frame))
        container.mux(film.encode())
        container.mux(cover.encode())
    check(path, frames=20)


@pytest.mark.parametrize("begin, end", [(3.0, 7.0), (None, 4.0), (5.5, None), (3.05, 3.08)])
def test_segments(tmp_path, begin, end):
    path = make(tmp_path / "whole.mp4", gop=10)
    first, last = begin or 0.0, 10.0 if end is None else end
    for decoder in DECODERS:
        numbers, clip = read(path, decoder, start=begin, end=end, fps=2.0)
        asked = first + (last - first) * np.arange(len(numbers)) / len(numbers)
        assert numbers == [int(10 * when + 1e-3) for when in asked]
        assert len(numbers) == max(2, round(2 * (last - first)) // 2 * 2)
        assert clip.timestamps[0] >= first and clip.timestamps[-1] < last
        assert (clip.start, clip.end, clip.duration) == (first, last, pytest.approx(10.0))


@pytest.mark.parametrize(
    ("begin", "end", "reason"), [(11.0, None, "comes after `start` = 11 s"), (1.0, 90.0, "short of `end` = 90 s")]
)
def test_segments_of_another_clip(tmp_path, begin, end, reason):
    path = make(tmp_path / "short.mp4", range(20))
    with pytest.raises(VideoError, match=f"short.mp4 lasts 2.000 s.*{reason}"):
        read(path, start=begin, end=end)


CUT = [
    "h264.mp4",
    "h264.mov",
    "fragments.mp4",
    "h264.mkv",
    "vp9.webm",
    "h264.ts",
    "mpeg2.mpg",
    "mpeg4-b.avi",
    "wmv2.wmv",
    "h264.flv",
    "palette.gif",
]


# An index that was moved to the front, and a recording whose length was not known while it was written.
UNUSUAL = {"index-first.mp4": {"movflags": "faststart"}, "live.mkv": {"live": "1"}}


# Half-downloaded files, down to the first bytes and up to the last ones.
@pytest.mark.parametrize("name", [*CUT, *UNUSUAL])
def test_files_that_end_early(tmp_path, name):
    codec, settings = FILES.get(name) or ("libx264", {"gop": 10, "container_options": UNUSUAL[name]})
    whole = encoded(tmp_path / name, codec, **settings).read_bytes()
    assert shortage(str(tmp_path / name)) is None
    cut = tmp_path / f"cut-{name}"
    for share in (0.02, 0.1, 0.3, 0.52, 0.7, 0.9, 0.97):
        cut.write_bytes(whole[: int(share * len(whole))])
        for decoder in ("auto", *DECODERS):
            with pytest.raises(VideoError, match="ends early") as caught:
                read(cut, decoder)
            assert str(cut) in str(caught.value)


# Zeros and junk behind the end of a file take nothing away from it.
@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "mpeg4-b.avi", "palette.gif"])
def test_what_follows_the_end_of_a_file_is_nothing(tmp_path, name):
    codec, settings = FILES[name]
    path = encoded(tmp_path / name, codec, **settings)
    for tail in (bytes(1000), b"junk" * 200):
        path.write_bytes(path.read_bytes() + tail)
        check(path)


# Names that FFmpeg would take for an option, a protocol, a pattern or an address.
@pytest.mark.parametrize(
    "name", ["-i.mp4", "a:b.mp4", "pipe:0", "%d.mp4", "x?#.mp4", "视频 é.mp4", "list.m3u8", "text.txt"]
)
def test_any_name(tmp_path, name, monkeypatch):
    source = make(tmp_path / "source.mp4", range(20))
    source.rename(tmp_path / name)
    check(tmp_path / name, frames=20)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)  # the decoding process was started in another folder
    check(f"../{name}", frames=20)


def test_streams_one_after_the_other_are_refused(tmp_path):
    """Two recordings in one MPEG-TS file have the same times twice."""
    parts = [make(tmp_path / f"{i}.ts", range(50 * i, 50 * i + 50)).read_bytes() for i in range(2)]
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    with pytest.raises(VideoError, match=r"both\.ts has frames without a time, or several with one"):
        read(tmp_path / "both.ts")


def test_a_damaged_time_is_no_long_clip(tmp_path):
    source = make(tmp_path / "whole.flv", options={"x264-params": "bframes=0"})
    data = bytearray(source.read_bytes())
    tags = [place for place in range(len(data) - 11) if data[place] == 9 and data[place + 8 : place + 11] == bytes(3)]
    last = tags[-2]  # of a frame; the very last tag says that the stream ends
    data[last + 4] = 0x7F  # the highest byte of its time, in milliseconds
    damaged = tmp_path / "damaged.flv"
    damaged.write_bytes(data)
    with pytest.raises(
        VideoError, match=r"damaged\.flv has damaged times: its frames go on for .* header says 10\.\d+ s"
    ):
        read(damaged)


def test_a_file_that_was_never_finished(tmp_path):
    path = make(tmp_path / "camera.mp4")
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"moov") - 4])
    with pytest.raises(VideoError, match=r"ends early: the index .moov. that is written last is missing"):
        read(path)


def test_packed_frames(tmp_path):
    """DivX's packed bitstream: a P frame and the B frame before it in one packet, then an empty one."""
    source = make(
        tmp_path / "source.avi", codec="mpeg4", max_b_frames=1, gop=12, options={"bf": "1", "b_strategy": "0"}
    )
    path = tmp_path / "packed.avi"
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        video = old.streams.video[0]
        stream = new.add_stream_from_template(video)
        packets = [p for p in old.demux(video) if p.size]
        kinds = [bytes(p)[bytes(p).index(b"\0\0\1\xb6") + 4] >> 6 for p in packets]  # 0: I, 1: P, 2: B
        marker = b"\0\0\1\xb2DivX503b1393p"
        place = 0
        while place < len(packets):
            data = bytes(packets[place])
            pieces = [data]
            if place + 1 < len(packets) and kinds[place + 1] == 2:
                pieces = [data + bytes(packets[place + 1]), b"\0\0\1\xb6" + struct.pack("B", 0b01010000) + b"\x7f"]
            for piece in pieces:
                packet = av.Packet(marker + piece if place == 0 else piece)
                packet.pts = packet.dts = packets[place].dts
                packet.is_keyframe = kinds[place] == 0 and piece is pieces[0]
                packet.stream, packet.time_base = stream, video.time_base
                new.mux(packet)
                place += 1
    assert kinds.count(2) > 20
    numbers, clip = read(path)
    assert [round(10 * t) for t in clip.timestamps.tolist()] == numbers


@pytest.mark.slow
# Every fourth packet left out, one at a time: where a decoder can tell that a reference is missing it is an error.
def test_damage_in_hevc_is_an_error_or_right(tmp_path):
    source = encoded(tmp_path / "source.mp4", "libx265", gop=10, options=X265)
    for lost in range(21, 80, 4):
        path = copy(source, tmp_path / "lossy.mkv", lambda place, _, lost=lost: place != lost)
        try:
            numbers, clip = read(path, fps=10.0, max_frames=100)
        except VideoError as error:
            assert "lossy.mkv" in str(error)
        else:
            assert all(-0.01 < t * 10 - n < 2 for n, t in zip(numbers, clip.timestamps.tolist(), strict=True))
