"""APPO: reinforcement learning of video models in which tokens that look at a group's crucial frames learn harder.

The names below are loaded when they are first used: ``import appo`` alone imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import record_frame_mass as record_frame_mass
    from .config import APPOConfig as APPOConfig
    from .frames import FrameIds as FrameIds
    from .frames import frame_ids as frame_ids
    from .selection import perception_slots as perception_slots
    from .selection import select_frames as select_frames
    from .trainer import Trainer as Trainer
    from .weights import group_advantages as group_advantages
    from .weights import token_weights as token_weights

# Public name -> the module that defines it.
_EXPORTS = {
    "APPOConfig": "config",
    "FrameIds": "frames",
    "Trainer": "trainer",
    "frame_ids": "frames",
    "group_advantages": "weights",
    "perception_slots": "selection",
    "record_frame_mass": "attention",
    "select_frames": "selection",
    "token_weights": "weights",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
