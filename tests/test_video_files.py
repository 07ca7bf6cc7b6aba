"""Files as people have them: containers, codecs, cameras and cuts. A frame tells its number and which way is up."""

from fractions import Fraction

import av
import numpy as np
import pytest
import video_clips
from video_clips import copy, make
from video_files import FILES, check, check_decord, encoded, read

from appo.data.video import DECODERS, VideoError


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


# Containers of the two families of time bases, with codecs that allow any times.
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


# Fewer frames than a codec delays; containers that know their length, that do not, and that have no times.
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


# A frame of odd height and width: no multiple of a patch, nor of a chroma sample.
@pytest.mark.parametrize("name", ["odd.mp4", "odd.mkv"])
def test_odd_sizes(tmp_path, name):
    path = make(tmp_path / name, range(20), size=(51, 65), pix_fmt="yuv444p")
    for decoder in DECODERS:
        assert check(path, decoder, frames=20).frames.shape[2:] == (48, 64)


# Containers whose length is that of the longest stream.
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


# Both ends given, either, and a segment shorter than a frame.
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


# A beginning and an end behind the end of the file.
@pytest.mark.parametrize(
    ("begin", "end", "reason"), [(11.0, None, "comes after `start` = 11 s"), (1.0, 90.0, "short of `end` = 90 s")]
)
def test_segments_of_another_clip(tmp_path, begin, end, reason):
    path = make(tmp_path / "short.mp4", range(20))
    with pytest.raises(VideoError, match=f"short.mp4 lasts 2.000 s.*{reason}"):
        read(path, start=begin, end=end)


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
