"""Settings of tiny models of every layout, and the inputs of their own plain forward."""

from typing import Any

import numpy as np
import torch
import training
from torch import Tensor, nn

from appo.data.clip_times import video_of
from appo.data.messages import prompt_messages
from appo.models.layout import Layout, text_arguments
from appo.train.policy import Policy


def settings(processor: Any, folder: Any, layout: Layout, **changes: Any) -> Any:
    """Settings whose frames are as small as the model takes them, and two where one has 64 tokens at least (Gemma 4).
    Two layers: as many as have attention in the hybrid models."""
    sizes = layout.sizes(processor)
    smallest = {"max_pixels": max(sizes.factor, 14) ** 2, "layers": 2, "max_frames": 16}
    if sizes.pixels:
        smallest["max_frames"] = 2 if layout.model_type == "gemma4" else 6
    return training.config(folder, **smallest | changes)


def logits_of(policy: Policy) -> Any:
    """A head of ``policy``: logits as its model's own head makes them."""

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits, cap = nn.functional.linear(hidden, weight, bias), policy.softcap
        return logits if cap is None else cap * (logits / cap).tanh()

    return head


def plain_logits(model: Any, group: Any, row: int, processor: Any, layout: Layout) -> Tensor:
    """(N, V) of one response, by a plain forward of the model."""
    with torch.no_grad():
        logits: Tensor = model(**plain_inputs(group, row, processor, layout)).logits
    return logits[0, len(group.prompt) - 1 : -1]


def plain_inputs(group: Any, row: int, processor: Any, layout: Layout) -> dict[str, Tensor]:
    """A plain forward's inputs, as transformers' processor makes them: one response behind its prompt, nothing else in
    the batch."""
    videos = [video_of(clip) for clip in group.prompt.clips]
    messages = prompt_messages(group.prompt.record, instructions=False)
    images = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in group.prompt.images]
    options = layout.media_arguments(messages, images, videos) | text_arguments(processor, group.prompt.text)
    inputs = processor(text=[group.prompt.text], return_tensors="pt", **options)
    inputs = {name: torch.as_tensor(value) for name, value in inputs.items() if name != "video_metadata"}
    if "video_second_per_grid" in inputs:  # which the processor does not know
        inputs["video_second_per_grid"] = group.prompt.vision["video_second_per_grid"]
    count = int(group.mask[row].sum())
    response = group.completion_ids[row : row + 1, :count]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], response], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in {"mm_token_type_ids", "token_type_ids"} & set(inputs):
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, count))
    return inputs
