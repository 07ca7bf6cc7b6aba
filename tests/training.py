"""A small task, a tiny model and short settings that the tests of training share."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from appo.config import APPOConfig
from appo.data.load import load_records
from appo.data.records import Media, Record
from appo.rollout import rewards
from appo.tasks import make_task
from appo.tasks.tiny import build_tiny

SETTINGS: dict[str, Any] = {
    "instructions": False, "fps": 4.0, "max_frames": 16, "max_pixels": 28 * 28, "dtype": "float32",
    "freeze_vision": False,
    "group_size": 4, "prompts_per_step": 4, "max_new_tokens": 10, "micro_groups": 2, "learning_rate": 1e-3,
    "top_tokens": 3, "top_frames": 2, "slot_tokens": 4, "strategy": "all", "save_every": 0, "tensorboard": False,
    "rewards": {"length_parity": 1.0},
}  # fmt: skip


def config(output: Path | str, **changes: Any) -> APPOConfig:
    return APPOConfig.from_dict(SETTINGS | {"output": str(output)} | changes)


@functools.cache
def records() -> tuple[Record, ...]:
    folder = tempfile.mkdtemp()
    paths = make_task(folder, seed=5, sizes={"train": 8}, workers=1)
    return tuple(load_records(paths["train"]))


def tiny(seed: int = 0, **options: Any) -> tuple[Any, Any]:
    return build_tiny(seed, **options)


def without_media(record: Record) -> Record:
    return dataclasses.replace(record, media=(), time_spans=())


def with_image(record: Record, path: Path) -> Record:
    """The question about a picture made at ``path``."""
    colours = torch.arange(56 * 56 * 3).remainder(251).to(torch.uint8)
    Image.fromarray(colours.reshape(56, 56, 3).numpy()).save(path)
    return dataclasses.replace(record, media=(Media("image", path),), time_spans=())


@rewards.register("length_parity")
def length_parity(completions: list[str], records: list[Record]) -> list[float | None]:
    """Differs within almost every group, whatever an untrained model says."""
    return [float(len(text) % 2) for text in completions]


@rewards.register("constant")
def constant(completions: list[str], records: list[Record]) -> list[float | None]:
    return [1.0 for _ in completions]
