"""The times of frames as the model reads them: written out by Qwen3-VL, in rotary positions by Qwen2.5-VL."""

import re

import pytest
import video_clips

from appo.config import APPOConfig
from appo.data.prompts import PromptBuilder
from appo.data.records import Media, Record
from appo.tasks.tiny import build_tiny


def prompt_of(path, family, **settings):
    model, processor = build_tiny(0, family=family)
    config = APPOConfig(model="tiny", data="-", fps=1.0, max_frames=12, max_pixels=56 * 56, **settings)
    record = Record("0", "When?", "1", "numerical", media=(Media("video", path),))
    return PromptBuilder(processor, model.config, config)(record), processor


# A constant rate that divides nothing evenly, one frame every 7 seconds, and a rate that varies by a factor of 20: an
# index of frames at the average rate would be off by seconds.
TIMES = {
    "constant": [i / 23.976 for i in range(200)],
    "slides": [7.0 * i for i in range(10)],
    "varying": [0.1 * i for i in range(16)] + [1.6 + 2.0 * i for i in range(20)],
}


@pytest.mark.parametrize("kind", TIMES)
def test_times_written_in_a_prompt_are_those_of_the_frames(tmp_path, kind):
    path = video_clips.make(tmp_path / "clip.mp4", range(len(TIMES[kind])), times=TIMES[kind])
    prompt, processor = prompt_of(path, "qwen3_vl")
    written = [float(s) for s in re.findall(r"<([\d.]+) seconds>", processor.decode(prompt.input_ids))]
    pairs = prompt.clips[0].timestamps.view(-1, 2).mean(1)
    assert written == pytest.approx(pairs.tolist(), abs=0.051)  # one digit after the point
    assert prompt.frame_times == [tuple(pair) for pair in prompt.clips[0].timestamps.view(-1, 2).tolist()]
    for frame, time in zip(prompt.clips[0].frames, prompt.clips[0].timestamps.tolist(), strict=True):
        number = video_clips.number_of(frame)
        shown = TIMES[kind][number], (*TIMES[kind], prompt.clips[0].duration)[number + 1]
        assert shown[0] - 2e-3 <= time <= shown[1] + 2e-3


@pytest.mark.parametrize("kind", TIMES)
def test_seconds_of_a_grid_step(tmp_path, kind):
    path = video_clips.make(tmp_path / "clip.mp4", range(len(TIMES[kind])), times=TIMES[kind])
    prompt, _ = prompt_of(path, "qwen2_5_vl")
    step = 2 * prompt.clips[0].duration / len(prompt.clips[0].frames)
    assert prompt.vision["second_per_grid_ts"].tolist() == pytest.approx([step], rel=1e-3)
