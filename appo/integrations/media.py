"""Videos and images of prompts, kept apart per prompt, so that rows can be shuffled and split as a trainer likes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# What processors return per video or image, and the grid (t, h, w in patches) that says how many rows each has.
PATCHES = {"pixel_values_videos": "video_grid_thw", "pixel_values": "image_grid_thw"}
KINDS = {
    "video_grid_thw": "video",
    "image_grid_thw": "image",
    "second_per_grid_ts": "video",
    "video_second_per_grid": "video",
}

# Of one prompt: processor outputs by name, and "mm_token_type_ids" (P,): 0 text, 1 image, 2 video.
Media = dict[str, Tensor]


def split_media(prompts: Sequence[Any], fields: Mapping[str, Any], device: torch.device) -> list[Media]:
    """``fields`` of a batch, as a processor returned them, for each of the ``prompts`` (lists of chat messages)."""
    split: list[Media] = [{} for _ in prompts]
    for name, kind in KINDS.items():
        if name in fields:
            counts = [_count(prompt, kind) for prompt in prompts]
            values = torch.as_tensor(fields[name])
            if len(values) != sum(counts):
                raise ValueError(
                    f"prompts: `{name}`: expected one row per {kind} of the messages, {sum(counts)}, got {len(values)}."
                )
            for media, part in zip(split, values.split(counts), strict=True):
                media[name] = part.to(device)
    for name, grid in PATCHES.items():
        if name in fields:
            rows = [int(media[grid].prod(-1).sum()) for media in split]
            for media, part in zip(split, fields[name].split(rows), strict=True):
                media[name] = part.to(device)
    types = fields.get("mm_token_type_ids")
    for media, row in zip(split, types if types is not None else [], strict=types is not None):
        media["mm_token_type_ids"] = torch.as_tensor(row, device=device)
    return split


def _count(prompt: Any, kind: str) -> int:
    parts = [part for message in prompt if isinstance(message["content"], list) for part in message["content"]]
    return sum(part["type"] == kind for part in parts)


def forward_inputs(media: Sequence[Media], input_ids: Tensor, response_length: int) -> dict[str, Tensor]:
    """Arguments of a forward over ``input_ids`` (B, P + N), prompts padded on the left: media of its rows, in order.

    Token types are 0 over the response, whatever ids it has.
    """
    inputs = {}
    for name in (*PATCHES, *KINDS):
        parts = [one[name] for one in media if name in one and len(one[name])]
        if parts:
            inputs[name] = torch.cat(parts)
    if "mm_token_type_ids" in media[0]:
        types, end = torch.zeros_like(input_ids), input_ids.shape[1] - response_length
        for row, one in zip(types, media, strict=True):
            row[end - len(one["mm_token_type_ids"]) : end] = one["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = types
    return inputs


class WithMedia:
    """A model that is given the media of the rows it is called with; calls go through the rows in order."""

    def __init__(self, model: Any, media: Sequence[Media], response_length: int) -> None:
        self.model, self.media, self.response_length, self.next = model, media, response_length, 0

    def __call__(self, *, input_ids: Tensor, **inputs: Any) -> Any:
        own = self.media[self.next : self.next + len(input_ids)]
        self.next += len(input_ids)
        return self.model(input_ids=input_ids, **inputs, **forward_inputs(own, input_ids, self.response_length))
