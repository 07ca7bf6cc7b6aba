"""Attention of a model to one clip under one question: sample a group, score it, draw it."""

import tempfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from appo.config import APPOConfig, ConfigError
from appo.data.load import check_media, load_records
from appo.data.records import DataError, Media, Record
from appo.reports.attention_map import write_inspection
from appo.reports.heads import write_heads
from appo.reports.inspect_index import Drawn, write_index
from appo.shown_settings import shown_settings
from appo.train.groups import Group, whole_groups
from appo.train.looking import head_shares
from appo.train.metrics import token_texts
from appo.train.setup import load_model
from appo.train.trainer import Trainer


def examine(
    model: str,
    video: Path,
    question: str,
    options: Sequence[str],
    answer: str | None,
    output: Path,
    overrides: Sequence[str] = (),
    *,
    heads: bool = False,
) -> list[Path]:
    """Sample ``group_size`` responses to a question about a clip and write picture and page to ``output``.

    heads: write which layers and heads look at the clip as well.
    Without an answer no response is right or wrong: frames are then those of all responses (strategy "all").
    Raises ConfigError, DataError, VideoError.
    """
    config = APPOConfig.from_dict(
        {"model": model, **shown_settings(model)}, [*overrides, *(["strategy=all"] if answer is None else [])]
    )
    record = Record(
        id=video.name,
        question=question,
        answer=answer or "",
        kind="multiple choice" if options else "free-form",
        options=tuple(options),
        media=(Media("video", video),),
    )
    if options and answer and answer not in {option.split(".")[0] for option in options}:
        raise ConfigError(f"`answer`: expected the letter of one of the options {list(options)}, got {answer!r}.")
    check_media([record])
    loaded, processor = load_model(config)
    with tempfile.TemporaryDirectory() as folder:
        config.output = folder
        trainer = Trainer(loaded, processor, [record], config=config)
        group = sample_group(trainer, record)
        return draw_group(trainer, group, output) + (draw_heads(trainer, group, output) if heads else [])


def examine_records(
    model: str,
    data: Path,
    output: Path,
    overrides: Sequence[str] = (),
    *,
    data_root: str | None = None,
    limit: int = 8,
    heads: bool = False,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Pictures and pages of the first ``limit`` records of a file that have a video, each in a folder of its own in
    ``output``, and ``output``/index.html with all of them (the paper's Figure 4).

    show: called with how many are drawn, and of how many. Raises ConfigError, DataError, VideoError.
    """
    config = APPOConfig.from_dict({"model": model, **shown_settings(model)}, list(overrides))
    records = load_records(data, data_root=data_root, allow_outside=config.allow_outside)
    seen = list(islice((record for record in records if any(m.kind == "video" for m in record.media)), limit))
    if not seen:
        raise DataError(f"{data}: expected records with a video, got none.")
    check_media(seen)
    loaded, processor = load_model(config)
    drawn = []
    with tempfile.TemporaryDirectory() as folder:
        config.output = folder
        trainer = Trainer(loaded, processor, seen, config=config)
        for place, record in enumerate(seen):
            group, own = sample_group(trainer, record), output / f"{place:04d}"
            draw_group(trainer, group, own)
            if heads:
                draw_heads(trainer, group, own)
            drawn.append(Drawn(record, own, group.accuracy.tolist(), _numbers(group.target_frames)))
            show(place + 1, len(seen))
    return [write_index(output / "index.html", model, drawn), *(each.folder / "inspection.html" for each in drawn)]


def _numbers(frames: Tensor | None) -> list[int]:
    return [] if frames is None else frames.tolist()


def sample_group(trainer: Trainer, record: Record) -> Group:
    """A group of responses to ``record``, with rewards; the seed of the run decides it."""
    trainer.policy.eval()
    trainer.sync_engine()
    return trainer.reward(trainer.sample([trainer.build_prompt(record)], [trainer.config.seed]))[0]


def draw_group(trainer: Trainer, group: Group, output: Path) -> list[Path]:
    """Score a sampled group as a training step does, and write picture and page to ``output``."""
    record = group.prompt.record
    trainer.score(whole_groups([group]))
    trainer.select([group])
    trainer.weigh([group])
    clips = group.prompt.clips
    if not clips or group.mass is None or group.target_frames is None:
        raise DataError(
            f"{record.place}: expected a record with a video, got {[media.kind for media in record.media]}."
        )
    return write_inspection(
        output,
        frames=pictures([clip.frames for clip in clips], trainer.build_prompt.sizes.merged),
        times=group.prompt.frame_times,
        tokens=token_texts(group, trainer.processor),
        mass=group.mass,
        selected=group.target_frames,
        weights=group.weights,
        rewards=group.rewards,
        accuracy=group.accuracy,
        question=record.question,
        options=record.options,
        answer=record.answer,
        labelled=group.prompt.labelled_frames(),
    )


def draw_heads(trainer: Trainer, group: Group, output: Path) -> list[Path]:
    """Write which layers and heads look at the video of a sampled group, as a picture and a table, to ``output``."""
    with trainer.autocast():
        shares = head_shares(group, trainer.policy, trainer.unwrapped, trainer.pad_id, trainer.accelerator.device)
    assert shares is not None  # draw_group refuses a record without a video
    return write_heads(shares, output)


def pictures(videos: Sequence[Tensor], merged: int) -> Tensor:
    """(T, 3, H, W) uint8: the sampled frames of all videos in order, of which the model sees ``merged`` as one frame.

    videos: (T_v, 3, H_v, W_v) uint8 each. The last one of a video is repeated where that frame has fewer; smaller ones
    stand on white, in the middle.
    """
    height, width = (max(frames.shape[axis] for frames in videos) for axis in (2, 3))
    shown = []
    for video in videos:
        frames = torch.cat([video, video[-1:].expand(-len(video) % merged, -1, -1, -1)])
        down, across = height - frames.shape[2], width - frames.shape[3]
        around = (across // 2, across - across // 2, down // 2, down - down // 2)
        shown.append(torch.nn.functional.pad(frames, around, value=255))
    return torch.cat(shown)
