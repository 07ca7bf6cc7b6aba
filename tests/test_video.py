"""Decoding: which frames come back, at what size, and what is said about files that cannot be read."""

import logging
import time

import av
import numpy as np
import pytest
import torch

from appo.data import video
from appo.data.video import VideoError, fit_size, read_video
from appo.data.video_worker import sample_indices

FPS = 8
READ = {"fps": 4.0, "max_frames": 16, "max_pixels": 28 * 28, "factor": 14}


def write(path, frames, *, size=(48, 64), **options):
    """A video whose n-th frame is grey of level 8 n + 4, so that a decoded frame tells its number."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"crf": "4", "preset": "veryfast", **options}
        for number in range(frames):
            array = np.full((*size, 3), 8 * number + 4, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers(clip):
    return ((clip.frames.float().mean((1, 2, 3)) - 4) / 8).round().int().tolist()


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("video") / "clip.mp4", 30)


# One group of pictures, or a keyframe every five frames (seeking); with and without frames stored out of
# order.
@pytest.mark.parametrize("options", [{}, {"g": "5"}, {"g": "5", "bf": "0"}])
# Every frame, every second, a few out of all (long gaps, so that whole groups are skipped).
@pytest.mark.parametrize(("fps", "max_frames"), [(8.0, 64), (4.0, 64), (8.0, 4)])
def test_both_decoders_take_the_same_frames(tmp_path, options, fps, max_frames):
    path = write(tmp_path / "clip.mp4", 30, **options)
    first, second = (
        read_video(path, **{**READ, "fps": fps, "max_frames": max_frames}, decoder=decoder)
        for decoder in video.DECODERS
    )
    count = min(round(30 / FPS * fps) // 2 * 2, max_frames)
    expected = [i * 30 // count for i in range(count)]
    assert numbers(first) == numbers(second) == expected
    assert torch.equal(first.frames, second.frames)
    assert torch.equal(first.timestamps, second.timestamps)
    torch.testing.assert_close(first.timestamps, torch.tensor(expected, dtype=torch.float64) / FPS)
    assert first.source_fps == pytest.approx(FPS) and second.source_fps == pytest.approx(FPS)
    assert first.duration == pytest.approx(30 / FPS) and second.duration == pytest.approx(30 / FPS)


# A clip of one frame, of fewer frames than wanted, an odd number, an hour at 30 frames a second.
@pytest.mark.parametrize("num_frames", [1, 3, 9, 30 * 3600])
@pytest.mark.parametrize(("fps", "max_frames", "min_frames"), [(1.0, 16, 2), (0.01, 16, 4), (30.0, 7, 2)])
def test_sampling_is_even_in_number_and_over_time(num_frames, fps, max_frames, min_frames):
    indices = sample_indices(num_frames, num_frames / 30, fps, max_frames, min_frames)
    assert len(indices) % 2 == 0 and 2 <= len(indices) <= max(max_frames, 2)
    assert indices[0] == 0 and indices[-1] < num_frames
    steps = np.diff(indices)
    assert (steps >= (num_frames > 1)).all() and steps.max() - steps.min() <= 1
    assert num_frames - indices[-1] <= steps.max() + 1


def test_a_single_frame_is_given_twice(tmp_path):
    clip = read_video(write(tmp_path / "one.mp4", 1), **READ)
    assert clip.frames.shape == (2, 3, 14, 28) or clip.frames.shape == (2, 3, 28, 28)
    assert numbers(clip) == [0, 0]


# Square, wide, tall, already small, larger than the limit by little, extreme; with the factors of both
# models.
@pytest.mark.parametrize("size", [(224, 224), (360, 640), (1920, 1080), (20, 30), (57, 57), (40, 2000)])
@pytest.mark.parametrize(("max_pixels", "factor"), [(64 * 28 * 28, 28), (28 * 28, 14), (28 * 28, 28)])
def test_sizes_fit(size, max_pixels, factor):
    height, width = fit_size(*size, max_pixels, factor)
    assert height % factor == 0 and width % factor == 0 and height * width <= max_pixels
    # Within half a unit of the aspect ratio, unless a side is down to one unit or the limit took one more.
    ideal = size[0] / size[1]
    if min(height, width) > factor:
        assert (
            (height - 1.5 * factor) / (width + 1.5 * factor)
            <= ideal
            <= (height + 1.5 * factor) / (width - 1.5 * factor)
        )


def test_frames_keep_their_picture_when_resized(tmp_path):
    left = np.zeros((48, 64, 3), np.uint8)
    left[:, :32] = 255
    path = tmp_path / "left.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(left, format="rgb24")))
        container.mux(stream.encode())
    frames = read_video(path, **{**READ, "max_pixels": 28 * 42}).frames.float()
    assert frames.shape[1:] == (3, 28, 42)
    assert frames[..., :18].min() > 200 and frames[..., 24:].max() < 55


def broken_files(folder, clip_path):
    whole = clip_path.read_bytes()
    sound = folder / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (folder / "text.mp4").write_text("this is not a video\n" * 50)
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").touch()
    (folder / "folder.mp4").mkdir()
    return {
        "absent.mp4": "does not exist",
        "folder.mp4": "not a regular file",
        "empty.mp4": "is empty",
        "text.mp4": "is not a video, or is broken",
        "cut.mp4": "is not a video, or is broken",
        "sound.wav": "is not a video, or is broken",
    }


def test_files_that_cannot_be_read_are_named(tmp_path, clip_path):
    for name, reason in broken_files(tmp_path, clip_path).items():
        with pytest.raises(VideoError, match=reason) as caught:
            read_video(tmp_path / name, **READ)
        assert str(tmp_path / name) in str(caught.value)
        assert str(caught.value).rstrip().endswith("."), "the remedy is missing"


def worker(monkeypatch, tmp_path, code):
    """Replaces the decoding process by one in which ``code`` ran before the first request."""
    real = video.WORKER
    script = tmp_path / "worker.py"
    script.write_text(
        "import importlib.util, os, sys, time\n"
        f"spec = importlib.util.spec_from_file_location('real_worker', {str(real)!r})\n"
        "module = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\n"
        f"{code}\nmodule.main()\n"
    )
    monkeypatch.setattr(video, "WORKER", script)
    monkeypatch.setattr(video, "_idle", [])


def test_a_decoder_that_hangs_is_stopped(monkeypatch, tmp_path, clip_path):
    worker(monkeypatch, tmp_path, "module.DECODERS = dict.fromkeys(module.DECODERS, lambda *a: time.sleep(300))")
    started = time.monotonic()
    with pytest.raises(VideoError, match=r"clip\.mp4 could not be decoded within 2 s"):
        read_video(clip_path, **READ, timeout=2.0)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("module.DECODERS['decord'] = lambda *a: time.sleep(300)", "timeout"),
        ("module.DECODERS['decord'] = lambda *a: os._exit(9)", "crashed"),
        ("module.DECODERS['decord'] = lambda *a: 1 / 0", "ZeroDivisionError"),
    ],
)
def test_pyav_reads_what_decord_cannot(monkeypatch, tmp_path, clip_path, caplog, code, reason):
    expected = read_video(clip_path, **READ, decoder="pyav")
    worker(monkeypatch, tmp_path, code)
    with caplog.at_level(logging.WARNING, "appo.data.video"):
        clip = read_video(clip_path, **READ, timeout=30.0 if reason != "timeout" else 10.0)
    assert torch.equal(clip.frames, expected.frames)
    assert reason in caplog.text and "clip.mp4" in caplog.text


def test_decord_need_not_be_installed(monkeypatch, tmp_path, clip_path):
    worker(monkeypatch, tmp_path, "sys.modules['decord'] = None")
    assert numbers(read_video(clip_path, **READ)) == numbers(read_video(clip_path, **READ, decoder="pyav"))
    with pytest.raises(VideoError, match=r"no decoder is installed \(decord: ModuleNotFoundError"):
        read_video(clip_path, **READ, decoder="decord")


def test_a_forked_process_starts_its_own_worker(monkeypatch, clip_path):
    read_video(clip_path, **READ)
    (before,) = video._idle[-1:]
    monkeypatch.setattr(video, "_owner", -1)
    monkeypatch.setattr(video, "_idle", [before])
    read_video(clip_path, **READ)
    assert before not in video._idle and before.alive()
    before.close()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fps": 0.0}, "fps"),
        ({"max_frames": 1}, "max_frames"),
        ({"min_frames": 20}, "max_frames"),
        ({"max_pixels": 100}, "max_pixels"),
        ({"timeout": 0.0}, "timeout"),
        ({"decoder": "opencv"}, "decoder"),
    ],
)
def test_arguments_that_no_video_satisfies(clip_path, changes, named):
    with pytest.raises(ValueError, match=f"`{named}`: expected"):
        read_video(clip_path, **{**READ, **changes})
