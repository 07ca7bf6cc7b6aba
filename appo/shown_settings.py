"""Settings with which a model was trained, kept beside it: it is asked afterwards about the same pictures."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appo.config import APPOConfig
from appo.yaml_files import dump_yaml, read_yaml

FILE = "appo.yaml"
# What it was shown, how it was asked, and how its answers were read.
SHOWN = (
    "fps", "max_frames", "max_pixels", "instructions", "video_positions", "max_new_tokens", "rewards_lenient", "dtype",
)  # fmt: skip


def save_shown(config: APPOConfig, folder: Path) -> None:
    values = config.to_dict()
    (folder / FILE).write_text(dump_yaml({name: values[name] for name in SHOWN}), encoding="utf-8")


def copy_shown(model: Path, folder: Path) -> None:
    """Keep the settings beside a model that is made of the one in ``model``, if it has any."""
    if (model / FILE).is_file():
        shutil.copyfile(model / FILE, folder / FILE)


def shown_settings(model: str) -> dict[str, Any]:
    """The settings beside a model that a run saved; {} for any other. Raises ConfigError for a file that is none."""
    file = Path(model or ".") / FILE
    if not model or not file.is_file():
        return {}
    return {name: value for name, value in read_yaml(file).items() if name in SHOWN}


def told(model: str, kept: dict[str, Any], overrides: Sequence[str] | None) -> str:
    """What is said to people of settings that were taken from beside ``model``; empty where there are none."""
    given = {item.partition("=")[0] for item in overrides or ()}
    taken = " ".join(f"{name}={value}" for name, value in kept.items() if name not in given)
    return f"As the run that saved it ({Path(model) / FILE}): {taken}" if taken else ""
