"""Positions of text behind a video in Qwen2-VL and Qwen2.5-VL: as they were trained, or as transformers now finds them.

A video takes positions in time, height and width. The models' original code, and vLLM, let the text behind it go on one
after the largest of the three. transformers goes on after the larger side of the picture since 5.3, however long the
video is: text then stands at positions that frames have too, and its numbers are not those of the published model.
"""

import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor

from appo.models.loaded import unwrapped

# Others set every frame off by text, so that both rules give the same.
CONCERNED = frozenset({"qwen2_vl", "qwen2_5_vl"})


def use_positions(model: Any, rule: str) -> Any:
    """Give ``model`` (also one wrapped by peft) the rule "original" or "transformers"; returns it.

    Its forward and ``generate`` find positions by the rule from now on. Other models are left as they are.
    """
    plain = unwrapped(model)
    if plain.config.model_type in CONCERNED:
        base = plain.base_model
        vars(base).pop("get_rope_index", None)
        if rule == "original":
            base.get_rope_index = types.MethodType(_original_rule(type(base).get_rope_index), base)
    return model


def rule_of(model: Any) -> str:
    """The rule that `use_positions` gave a model last; "transformers" where none."""
    return "original" if "get_rope_index" in vars(unwrapped(model).base_model) else "transformers"


def _original_rule(found: Any) -> Any:
    signature = inspect.signature(found)

    @functools.wraps(found)  # its arguments are asked for
    def get_rope_index(*args: Any, **options: Any) -> Any:
        given = signature.bind(*args, **options).arguments
        mask = given.get("attention_mask")
        mask = torch.ones_like(given["input_ids"]) if mask is None else mask
        positions = go_on_after_largest(found(*args, **options)[0], given["mm_token_type_ids"], mask.bool())
        lengths = mask.sum(-1, keepdim=True)
        return positions, positions.amax((0, 2))[:, None] + 1 - lengths

    return get_rope_index


def go_on_after_largest(positions: Tensor, types: Tensor, mask: Tensor) -> Tensor:
    """``positions`` (3, B, L) with all that follows a video moved to one after the video's largest position.

    types: (B, L), 0 text, above 0 pixels. mask: (B, L) bool, False at padding, which stays as it is. No value is read
    on the host.
    """
    kinds = types.masked_fill(~mask, -1).long()
    begins = kinds.diff(dim=-1, prepend=kinds[:, :1]) != 0  # (B, L): the first token of a run, the first run excepted
    runs = begins.long().cumsum(-1)
    largest = torch.full_like(runs, -1).scatter_reduce(1, runs, positions.amax(0), "amax")  # by run
    before = largest.gather(1, (runs - 1).clamp(min=0))
    behind_pixels = begins & (kinds >= 0) & (kinds.roll(1, -1) > 0)
    # Height and width start where the run does; time may have been scaled.
    moved = (before + 1 - positions[1]).masked_fill(~behind_pixels, 0).cumsum(-1)
    return positions + moved * mask
