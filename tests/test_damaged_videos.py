"""Files that are cut, damaged or oddly packed: an error that names the file, or the right frames."""

import struct

import av
import pytest
from video_clips import copy, make
from video_files import FILES, X265, check, encoded, read

from appo.data.video import DECODERS, VideoError
from appo.data.video_container import shortage

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
