"""Decoding: which frames come back, at what size, and what is said about files that cannot be read."""

import logging
import tracemalloc

import av
import numpy as np
import pytest
import torch
from PIL import Image

from appo.data import video
from appo.data import worker as helper
from appo.data.video import VideoError, read_video
from appo.data.video_decoders import Source, decode_pyav
from appo.data.video_pixels import fit_size
from appo.data.video_timeline import Sampling, choose

FPS = 8
READ = {"fps": 4.0, "max_frames": 16, "max_pixels": 28 * 28, "factor": 14}


def write(path, frames, *, size=(48, 64), **options):
    """A video whose n-th frame is grey of level 8 n + 4 (n modulo 31), so that a decoded frame tells its number."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"crf": "4", "preset": "veryfast", **options}
        for number in range(frames):
            array = np.full((*size, 3), 8 * (number % 31) + 4, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    return path


def numbers(clip):
    return ((clip.frames.float().mean((1, 2, 3)) - 4) / 8).round().int().tolist()


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("video") / "clip.mp4", 30)


# A clip of one frame, of fewer frames than wanted, an odd number, an hour at 30 frames a second.
@pytest.mark.parametrize("num_frames", [1, 3, 9, 30 * 3600])
@pytest.mark.parametrize(("fps", "max_frames", "min_frames"), [(1.0, 16, 2), (0.01, 16, 4), (30.0, 7, 2)])
def test_sampling_is_even_in_number_and_over_time(num_frames, fps, max_frames, min_frames):
    times, duration = np.arange(num_frames) / 30, num_frames / 30
    indices, seconds = choose(times, duration, Sampling(fps, max_frames, min_frames, 28 * 28, 14))
    assert len(indices) % 2 == 0 and 2 <= len(indices) <= max(max_frames, 2)
    assert indices[0] == 0 and indices[-1] < num_frames
    steps = np.diff(indices)
    assert (steps >= (num_frames > 1)).all() and steps.max() - steps.min() <= 1
    assert num_frames - indices[-1] <= steps.max() + 1
    assert (np.diff(seconds) > 0).all() and seconds[0] == 0 and seconds[-1] < duration


def brute_choice(times, duration, count, begin, end):
    """The frame on the screen when each of ``count`` equal parts begins, found by looking at all frames."""
    ends = [*times[1:], duration]
    starts = [begin + (end - begin) * i / count for i in range(count)]
    return [next(f for f in range(len(times)) if times[f] <= s + 1e-6 and s + 1e-6 < ends[f]) for s in starts]


# Clips whose rate varies by a factor of 1,000, whole and in segments.
@pytest.mark.parametrize("seed", range(20))
def test_sampling_takes_what_is_on_the_screen(seed):
    generator = np.random.default_rng(seed)
    times = np.concatenate([[0.0], np.cumsum(10 ** generator.uniform(-2, 1, 60))])
    duration = times[-1] + 0.5
    begin, end = sorted(generator.uniform(0, duration, 2)) if seed % 2 else (None, None)
    indices, seconds = choose(times, duration, Sampling(1.0, 32, 2, 28 * 28, 14, begin, end))
    first, last = begin or 0.0, duration if end is None else end
    assert indices.tolist() == brute_choice(times, duration, len(indices), first, last)
    assert (np.diff(seconds) > 0).all() and seconds[0] >= first and seconds[-1] < last
    shown = np.append(times, duration)
    assert ((shown[indices] <= seconds + 1e-9) & (seconds < shown[indices + 1])).all()


# 600 frames in 30 groups of pictures, of which 6 are asked for.
@pytest.mark.parametrize("name", ["long.mp4", "long.mkv", "long.ts", "long.flv", "long.mov"])
def test_few_frames_of_a_long_clip_need_few_decoded(tmp_path, name, monkeypatch):
    source = Source(str(write(tmp_path / name, 600, g="20", keyint_min="20", sc_threshold="0")))
    decoded = []
    output = Source._output
    monkeypatch.setattr(Source, "_output", lambda *a: (decoded.append(frame) or frame for frame in output(*a)))
    wanted = np.array([0, 19, 120, 121, 340, 590])
    assert [index for index, _ in source.frames(wanted)] == wanted.tolist()
    # The wanted ones and what their groups hold before them; MPEG-TS is read to its end, which could be cut.
    assert len(decoded) <= 20 + 2 + 1 + 11 + 20 * name.endswith("ts")
    source.close()


def test_frames_are_scaled_as_they_are_decoded(tmp_path):
    """The memory for a clip of large frames is that of a few of them, however many are taken."""
    path = write(tmp_path / "large.mp4", 32, size=(720, 1280))
    tracemalloc.start()
    frames, *_ = decode_pyav(str(path), Sampling(8.0, 32, 2, 28 * 28, 14))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(frames) == 32 and peak < 4 * 720 * 1280 * 3 + 10 * frames.nbytes


def test_a_single_frame_is_given_twice(tmp_path):
    clip = read_video(write(tmp_path / "one.mp4", 1), **READ)
    assert clip.frames.shape == (2, 3, 14, 28) or clip.frames.shape == (2, 3, 28, 28)
    assert numbers(clip) == [0, 0] and clip.timestamps.tolist() == [0, 1 / FPS / 2]


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
    Image.new("RGB", (64, 48)).save(folder / "picture.mp4", format="png")
    (folder / "empty.mp4").touch()
    (folder / "folder.mp4").mkdir()
    return {
        "absent.mp4": "does not exist",
        "folder.mp4": "not a regular file",
        "empty.mp4": "is empty",
        "text.mp4": "is not a video, or is broken",
        "cut.mp4": "ends early",
        "sound.wav": "is not a video, but an image, sound",
        "picture.mp4": "is not a video, but an image, sound",
    }


def test_files_that_cannot_be_read_are_named(tmp_path, clip_path):
    for name, reason in broken_files(tmp_path, clip_path).items():
        with pytest.raises(VideoError, match=reason) as caught:
            read_video(tmp_path / name, **READ)
        assert str(tmp_path / name) in str(caught.value)
        assert str(caught.value).rstrip().endswith("."), "the remedy is missing"


@pytest.fixture
def worker(monkeypatch):
    """Replaces the decoding process by one in which ``code`` ran before the first request; all workers it started."""
    started = []
    real = video.Worker

    def start(module):
        started.append(real(module))
        return started[-1]

    monkeypatch.setattr(video, "Worker", start)
    monkeypatch.setattr(video, "_idle", [])

    def prepare(code):
        head, _, main = helper.START.rpartition("; ")
        prelude = "import os, time, appo.data.video_worker as module"
        monkeypatch.setattr(helper, "START", f"{head}\n{prelude}\n{code}\n{main}")
        return started

    yield prepare
    for process in started:
        process.stop()


def test_a_decoder_that_hangs_is_stopped(worker, clip_path):
    started = worker("module.DECODERS.update(dict.fromkeys(module.DECODERS, lambda *a: time.sleep(10**6)))")
    with pytest.raises(VideoError, match=r"clip\.mp4 could not be decoded within 3 s"):
        read_video(clip_path, **READ, timeout=3.0)
    assert [process.alive() for process in started] == [False]


# Decoding that dies, fails, or is not installed.
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("module.DECODERS['pyav'] = lambda *a: os._exit(9)", "crashed"),
        ("module.DECODERS['pyav'] = lambda *a: 1 / 0", "ZeroDivisionError"),
    ],
)
def test_decord_is_the_second(worker, clip_path, caplog, code, reason):
    expected = read_video(clip_path, **READ, decoder="pyav")
    worker(code)
    video._idle.clear()
    with caplog.at_level(logging.WARNING, "appo.data.video"):
        clip = read_video(clip_path, **READ, timeout=300.0)
    assert numbers(clip) == numbers(expected) and torch.equal(clip.timestamps, expected.timestamps)
    assert reason in caplog.text and "clip.mp4" in caplog.text
    with pytest.raises(VideoError, match=f"clip.mp4 .*{reason}"):
        read_video(clip_path, **READ, timeout=300.0, decoder="pyav")


def test_decord_need_not_be_installed(worker, clip_path):
    worker("sys.modules['decord'] = None")
    assert len(read_video(clip_path, **READ, timeout=300.0).frames) == 14
    with pytest.raises(VideoError, match=r"a decoder is not installed \(decord: ModuleNotFoundError"):
        read_video(clip_path, **READ, timeout=300.0, decoder="decord")


def test_nothing_is_read_without_pyav(worker, clip_path):
    worker("sys.modules['av'] = None")
    with pytest.raises(VideoError, match=r"a decoder is not installed \(pyav: Mod.*decord: Mod.*Install av"):
        read_video(clip_path, **READ, timeout=300.0)


def test_playlists_open_no_other_file(tmp_path, clip_path):
    """Text that FFmpeg would follow to other files or addresses is not a video."""
    for name, text in {
        "concat.mp4": f"ffconcat version 1.0\nfile '{clip_path}'\n",
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{clip_path}\n#EXT-X-ENDLIST\n",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(VideoError, match="is not a video"):
            read_video(tmp_path / name, **READ)


def test_a_forked_process_starts_its_own_worker(monkeypatch, clip_path):
    read_video(clip_path, **READ)
    (before,) = video._idle[-1:]
    process = before._process
    with monkeypatch.context() as forked:
        forked.setattr("os.getpid", lambda: -1)
        assert not before.alive()
        before.stop()  # at the fork's end
        assert process.poll() is None
        read_video(clip_path, **READ)
        others = [worker for worker in video._idle if worker.alive()]
        assert others and process not in [worker._process for worker in others]
        for worker in others:
            worker.stop()
    assert process.poll() is None
    process.kill()
    process.wait()


def test_a_worker_that_died_unread_is_an_error_and_not_a_broken_pipe(clip_path):
    """A pipe that nobody reads any more holds what is left of the request; its end is none of the caller's."""
    worker = video.Worker("appo.data.video_worker")
    read = ("pyav", str(clip_path), video.Sampling(2.0, 8, 2, 28 * 28, 28, None, None))
    assert worker.ask(read, 60.0)[0] == "ok"
    running = worker._process
    worker.alive = lambda: running.poll() is None or True  # it dies behind this look
    running.kill()
    running.wait()
    with pytest.raises(helper.WorkerError, match="crashed") as caught:
        worker.ask(read, 60.0)
    assert not caught.value.expired
    del worker.alive
    assert worker.ask(read, 60.0)[0] == "ok"
    worker.stop()


# One at a time: not positive, below a pair of frames, bounds that cross, another decoder.
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fps": 0.0}, "fps"),
        ({"max_frames": 1}, "max_frames"),
        ({"min_frames": 20}, "max_frames"),
        ({"max_pixels": 100}, "max_pixels"),
        ({"timeout": 0.0}, "timeout"),
        ({"decoder": "opencv"}, "decoder"),
        ({"fps": float("inf")}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"timeout": float("inf")}, "timeout"),
        ({"start": -1.0}, "start"),
        ({"start": float("nan")}, "start"),
        ({"end": float("inf")}, "end"),
        ({"start": 2.0, "end": 2.0}, "end"),
    ],
)
def test_arguments_that_no_video_satisfies(clip_path, changes, named):
    with pytest.raises(ValueError, match=f"`{named}`: expected"):
        read_video(clip_path, **{**READ, **changes})
