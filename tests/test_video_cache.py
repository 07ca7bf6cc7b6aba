"""Clips kept on disk: found again, or decoded again; bounded; whole or not there."""

import logging
import os

import numpy as np
import pytest
import torch
import video_clips

from appo.config import APPOConfig
from appo.data import video
from appo.data.prompts import PromptBuilder
from appo.data.records import Media, Record
from appo.data.video import VideoError, read_video
from appo.data.video_cache import ClipCache
from appo.tasks.tiny import build_tiny

READ = {"fps": 2.0, "max_frames": 8, "max_pixels": 48 * 64, "factor": 16}


@pytest.fixture
def path(tmp_path):
    return video_clips.make(tmp_path / "clip.mp4", range(20))


@pytest.fixture
def decoded(monkeypatch):
    """The paths that were decoded."""
    found, decode = [], video._decode
    monkeypatch.setattr(video, "_decode", lambda name, file, *rest: found.append(file) or decode(name, file, *rest))
    return found


def same(first, second):
    for name, value in vars(first).items():
        other = vars(second)[name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def test_a_clip_is_decoded_once(tmp_path, path, decoded):
    first = read_video(path, **READ)
    for _ in range(3):  # as later epochs, runs and other processes do
        same(read_video(path, **READ, cache=ClipCache(tmp_path / "cache")), first)
    assert len(decoded) == 2


# Whatever changes the frames: the settings, the segment, the file.
@pytest.mark.parametrize(
    "changes", [{"fps": 4.0}, {"max_frames": 4}, {"max_pixels": 32 * 32}, {"factor": 8}, {"start": 0.5}, {"end": 1.0}]
)
def test_other_settings_are_another_clip(tmp_path, path, decoded, changes):
    cache = ClipCache(tmp_path / "cache")
    read_video(path, **READ, cache=cache)
    same(read_video(path, **{**READ, **changes}, cache=cache), read_video(path, **{**READ, **changes}))
    assert len(decoded) == 3


def test_another_file_of_that_name_is_another_clip(tmp_path, path, decoded):
    cache = ClipCache(tmp_path / "cache")
    read_video(path, **READ, cache=cache)
    video_clips.make(path, range(100, 120))
    assert [video_clips.number_of(f) for f in read_video(path, **READ, cache=cache).frames] == [100, 105, 110, 115]
    os.utime(path, ns=(0, 0))  # of the same size, put back from an archive
    read_video(path, **READ, cache=cache)
    assert len(decoded) == 3


# Cut short, of another program, empty, and a pickle, which is never loaded.
@pytest.mark.parametrize("damage", ["cut", "text", "empty", "pickle"])
def test_what_is_damaged_is_decoded_again(tmp_path, path, decoded, damage, caplog):
    cache = ClipCache(tmp_path / "cache")
    first = read_video(path, **READ, cache=cache)
    (kept,) = (tmp_path / "cache").glob("*/*.npz")
    if damage == "pickle":
        with kept.open("wb") as file:
            np.savez(file, frames=np.array([print], object))
    else:
        kept.write_bytes({"cut": kept.read_bytes()[:999], "text": b"x" * 999, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        same(read_video(path, **READ, cache=cache), first)
    assert str(kept) in caplog.text
    same(read_video(path, **READ, cache=cache), first)
    assert len(decoded) == 2


def test_the_folder_stays_within_its_limit(tmp_path, path):
    size = 8 * 1024 + 4 * 3 * 48 * 64  # of a clip, at most
    cache = ClipCache(tmp_path / "cache", limit=5 * size)
    segments = [0.01 * i for i in range(1, 20)]
    for place, start in enumerate(segments):
        read_video(path, **READ, start=start, cache=cache)
        files = list((tmp_path / "cache").rglob("*.npz"))
        for file in files:  # clocks of file systems are coarse: what was written or read now is newer than all before
            os.utime(file, (file.stat().st_atime, min(file.stat().st_mtime, 1e9 + place)))
        assert sum(file.stat().st_size for file in files) <= 5 * size
    assert len(files) >= 3 and not list((tmp_path / "cache").glob("part-*"))


def test_what_was_read_last_stays(tmp_path):
    paths = [video_clips.make(tmp_path / f"{i}.mp4", range(4)) for i in range(4)]
    cache = ClipCache(tmp_path / "cache")
    kept = {}
    for place, path in enumerate(paths[:3]):
        before = set((tmp_path / "cache").glob("*/*.npz"))
        read_video(path, **READ, cache=cache)
        (kept[place],) = set((tmp_path / "cache").glob("*/*.npz")) - before
        os.utime(kept[place], (place, place))
    read_video(paths[0], **READ, cache=cache)  # the oldest, read again
    cache.limit = 3.5 * kept[0].stat().st_size
    read_video(paths[3], **READ, cache=cache)
    assert kept[0].exists() and not kept[1].exists()


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(tmp_path, path, monkeypatch, caplog):
    cache = ClipCache(tmp_path / "cache")

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with caplog.at_level(logging.WARNING):
        for start in (None, 0.5):
            assert len(read_video(path, **READ, start=start, cache=cache).frames)
    assert caplog.text.count("No space left") == 1
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


def test_errors_are_not_kept(tmp_path, path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    cache = ClipCache(tmp_path / "cache")
    with pytest.raises(VideoError, match="ends early"):
        read_video(path, **READ, cache=cache)
    path.write_bytes(whole)
    read_video(path, **READ, cache=cache)


def test_prompts_are_built_from_it(tmp_path, path, decoded):
    model, processor = build_tiny(0)
    settings = {"model": "tiny", "data": "-", "max_pixels": 56 * 56, "frame_cache": str(tmp_path / "cache")}
    record = Record("0", "When?", "1", "numerical", media=(Media("video", path),))
    first, second = (PromptBuilder(processor, model.config, APPOConfig(**settings))(record) for _ in range(2))
    assert torch.equal(first.vision["pixel_values_videos"], second.vision["pixel_values_videos"])
    assert len(decoded) == 1
