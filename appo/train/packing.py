"""Layouts of responses and their prompts as sequences.

Packed: the responses of a group behind one prompt, group after group, in one row without padding. Positions go on at
the same number in every response of a group, and `GroupLayout` says who sees whom, so hidden states are those of
separate sequences (docs/method.md section 3), but prompt and video are computed once instead of G times. Models whose
layers cannot attend that way have every response behind a copy of its prompt, padded.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from appo.models.loaded import prompt_positions
from appo.models.packed_attention import packed_mask
from appo.train.groups import ResponseBatch
from appo_kernels import GroupLayout


@dataclass
class Sequences:
    """S sequences of L tokens, and where in them the B responses of up to N tokens are predicted."""

    input_ids: Tensor  # (S, L) int64
    attention_mask: Tensor  # (S, L) int64, or in a packed row `packed_mask`
    token_types: Tensor | None  # (S, L) int64: 0 text, 1 image, 2 video
    position_ids: Tensor | None  # (3, S, L) or (S, L) int64; None: the model finds them
    frame_ids: Tensor  # (S, L) int32, -1 for text
    # (S, R) int64: position whose logits predict each response token (docs/method.md section 2)
    rows: Tensor
    media_repeats: list[int]  # how often each prompt stands in the batch
    shape: tuple[int, int]  # (B, N)
    layout: GroupLayout | None = None  # of a packed row, S = 1, whose R rows are the M tokens of all responses
    places: Tensor | None = None  # (M,) int64: of each of these in (B, N), flattened

    def per_response(self, values: Tensor) -> Tensor:
        """(S, R, ...) values of ``rows`` as (B, N, ...); 0 at padding where the row is packed."""
        if self.places is None:
            return values.reshape(*self.shape, *values.shape[2:])
        batch, longest = self.shape
        padded = values.new_zeros(batch * longest, *values.shape[2:])
        return padded.index_copy(0, self.places, values[0]).unflatten(0, self.shape)


def separate(batch: ResponseBatch, *, counted: bool = False) -> Sequences:
    """Each response behind a copy of its prompt: S = B, L = P + N.

    counted: give the positions of tokens, counted from each prompt's first, instead of leaving them to the model.
    """
    sizes, responses = batch.sizes, batch.completion_ids
    repeats = torch.tensor(sizes, device=responses.device)
    inputs = {
        name: batch.prompts.inputs[name].repeat_interleave(repeats, 0)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        if name in batch.prompts.inputs
    }
    length, count = inputs["input_ids"].shape[1], responses.shape[1]
    rows = torch.arange(length - 1, length - 1 + count, device=responses.device).expand(len(responses), -1)
    types = inputs.get("mm_token_type_ids")
    frame_ids = batch.prompts.frame_ids.repeat_interleave(repeats, 0)
    attention_mask = torch.cat([inputs["attention_mask"], batch.mask.long()], 1)
    return Sequences(
        input_ids=torch.cat([inputs["input_ids"], responses], 1),
        attention_mask=attention_mask,
        token_types=None if types is None else torch.nn.functional.pad(types, (0, count)),
        position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0) if counted else None,
        frame_ids=torch.nn.functional.pad(frame_ids, (0, count), value=-1),
        rows=rows,
        media_repeats=sizes,
        shape=(len(responses), count),
    )


def packed(batch: ResponseBatch, model: Any) -> Sequences:
    """A row of groups: S = 1, L = all tokens of all prompts and responses."""
    inputs, device = batch.prompts.inputs, batch.mask.device
    positions = prompt_positions(model, inputs)  # (3, prompts, P) or (prompts, P)
    types = inputs.get("mm_token_type_ids")
    ids, kinds, places, frames, rows = [], [], [], [], []
    layout = GroupLayout(batch.prompt_lengths, batch.lengths)
    answers = batch.completion_ids[batch.mask].split([sum(lengths) for lengths in batch.lengths])
    for index, (group, lengths) in enumerate(zip(layout.groups, batch.lengths, strict=True)):
        prompt = slice(inputs["input_ids"].shape[1] - batch.prompt_lengths[index], None)  # padding is on the left
        count = sum(lengths)
        ids += [inputs["input_ids"][index, prompt], answers[index]]
        if types is not None:
            kinds += [types[index, prompt], types.new_zeros(count)]
        frames += [batch.prompts.frame_ids[index, prompt], batch.prompts.frame_ids.new_full((count,), -1)]
        own = positions[..., index, prompt]
        # Token t of a response is at position P + t; it is predicted by token t - 1, the first by the prompt's last.
        token = torch.cat([torch.arange(length) for length in lengths] or [torch.arange(0)])
        places += [own, own[..., -1:] + 1 + token.to(device)]
        behind = torch.arange(group.prompt.stop, group.prompt.stop + count) - 1
        rows.append(torch.where(token == 0, group.prompt.stop - 1, behind))
    return Sequences(
        input_ids=torch.cat(ids)[None],
        attention_mask=packed_mask(device),
        token_types=torch.cat(kinds)[None] if kinds else None,
        position_ids=torch.cat(places, -1).unsqueeze(-2),
        frame_ids=torch.cat(frames)[None],
        rows=torch.cat(rows).to(device)[None],
        media_repeats=[1] * len(batch.lengths),
        shape=(batch.mask.shape[0], batch.mask.shape[1]),
        layout=layout,
        places=batch.mask.flatten().nonzero().flatten(),
    )
