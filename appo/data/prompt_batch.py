"""Prompts side by side, padded on the left."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from appo.data.prompts import Prompt


@dataclass
class PromptBatch:
    """Prompts padded on the left to P tokens."""

    inputs: dict[str, Tensor]  # input_ids, attention_mask (B, P), mm_token_type_ids, and the vision tensors of all
    rows: dict[str, list[int]]  # of each vision tensor, how many rows are each prompt's
    frame_ids: Tensor  # (B, P) int32, -1 on padding
    num_frames: int  # F, the largest


def collate(prompts: Sequence[Prompt], pad_id: int, device: torch.device | str = "cpu") -> PromptBatch:
    """Pad prompts on the left and join their vision tensors in order."""
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    types = torch.zeros_like(ids)
    frames = torch.full((len(prompts), length), -1, dtype=torch.int32)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt.input_ids
        mask[row, length - len(prompt) :] = 1
        frames[row, length - len(prompt) :] = prompt.frame_ids
        if prompt.token_types is not None:
            types[row, length - len(prompt) :] = prompt.token_types
    inputs = {"input_ids": ids, "attention_mask": mask}
    if prompts[0].token_types is not None:
        inputs["mm_token_type_ids"] = types
    names = dict.fromkeys(name for prompt in prompts for name in prompt.vision)
    inputs |= {name: torch.cat([p.vision[name] for p in prompts if name in p.vision]) for name in names}
    return PromptBatch(
        inputs={name: value.to(device) for name, value in inputs.items()},
        rows={name: [len(p.vision[name]) if name in p.vision else 0 for p in prompts] for name in names},
        frame_ids=frames.to(device),
        num_frames=max(prompt.num_frames for prompt in prompts),
    )
