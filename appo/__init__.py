"""APPO: reinforcement learning of video models that gives tokens which look at a group's key frames a larger weight.

The names below are loaded when they are first used: ``import appo`` alone imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from appo.config import APPOConfig as APPOConfig
    from appo.method.advantages import group_advantages as group_advantages
    from appo.method.selection import perception_slots as perception_slots
    from appo.method.selection import select_frames as select_frames
    from appo.method.token_weights import token_weights as token_weights
    from appo.recording.frame_ids import FrameIds as FrameIds
    from appo.recording.frame_ids import frame_ids as frame_ids
    from appo.recording.recorder import record_frame_mass as record_frame_mass
    from appo.train.trainer import Trainer as Trainer

# Public name -> the module that defines it.
_EXPORTS = {
    "APPOConfig": "config",
    "FrameIds": "recording.frame_ids",
    "Trainer": "train.trainer",
    "frame_ids": "recording.frame_ids",
    "group_advantages": "method.advantages",
    "perception_slots": "method.selection",
    "record_frame_mass": "recording.recorder",
    "select_frames": "method.selection",
    "token_weights": "method.token_weights",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
