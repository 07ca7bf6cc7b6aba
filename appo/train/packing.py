"""How prompts and responses become sequences of the model: each response with its prompt, or a group behind one prompt.

A group's responses share their prompt, and most of a sequence is prompt (a video). "Shared" lays the responses of a
group one after another behind a single prompt, each seeing the prompt and itself only: the same hidden states, and the
prompt is computed once instead of G times. It needs attention that takes a mask of its own (sdpa, eager); with flash
attention every response is a sequence.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from appo.models.loaded import prompt_positions
from appo.train.groups import ResponseBatch


@dataclass
class Sequences:
    """S sequences of L tokens, and where in them the B = prompts x G responses are predicted."""

    input_ids: Tensor  # (S, L) int64
    attention_mask: Tensor  # (S, L) int64, or (S, 1, L, L) bool: who sees whom
    token_types: Tensor | None  # (S, L) int64: 0 text, 1 image, 2 video
    position_ids: Tensor | None  # (3, S, L) or (S, L) int64; None: the model finds them
    frame_ids: Tensor  # (S, L) int32, -1 for text
    rows: Tensor  # (S, R) int64: position whose logits predict each response token; S x R = B x N (docs/method.md 2)
    media_repeats: int  # how often each prompt stands in the batch
    shape: tuple[int, int]  # (B, N)

    def per_response(self, values: Tensor) -> Tensor:
        """(S, R, ...) values of ``rows`` as (B, N, ...)."""
        return values.reshape(*self.shape, *values.shape[2:])


def separate(batch: ResponseBatch) -> Sequences:
    """Each response behind a copy of its prompt: S = B, L = P + N."""
    repeat, responses = batch.group_size, batch.completion_ids
    inputs = {
        name: batch.prompts.inputs[name].repeat_interleave(repeat, 0)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        if name in batch.prompts.inputs
    }
    length, count = inputs["input_ids"].shape[1], responses.shape[1]
    rows = torch.arange(length - 1, length - 1 + count, device=responses.device).expand(len(responses), -1)
    types = inputs.get("mm_token_type_ids")
    return Sequences(
        input_ids=torch.cat([inputs["input_ids"], responses], 1),
        attention_mask=torch.cat([inputs["attention_mask"], batch.mask.long()], 1),
        token_types=None if types is None else torch.nn.functional.pad(types, (0, count)),
        position_ids=None,
        frame_ids=torch.nn.functional.pad(batch.prompts.frame_ids.repeat_interleave(repeat, 0), (0, count), value=-1),
        rows=rows,
        media_repeats=repeat,
        shape=(len(responses), count),
    )


def shared(batch: ResponseBatch, model: Any) -> Sequences:
    """A group's responses side by side behind one prompt: S = groups, L = P + G N."""
    inputs, size, device = batch.prompts.inputs, batch.group_size, batch.mask.device
    groups, length = inputs["input_ids"].shape
    count = batch.mask.shape[1]
    responses, valid = batch.completion_ids.reshape(groups, -1), batch.mask.reshape(groups, -1)  # (groups, G N)

    ids = torch.cat([inputs["input_ids"], responses], 1)
    present = torch.cat([inputs["attention_mask"].bool(), valid], 1)
    positions = prompt_positions(model, inputs)  # (3, groups, P) or (groups, P)
    after = positions[..., -1:] + 1 + torch.arange(count, device=device).repeat(size)
    types = torch.nn.functional.pad(
        inputs.get("mm_token_type_ids", torch.zeros_like(ids[:, :length])), (0, size * count)
    )
    frames = torch.nn.functional.pad(batch.prompts.frame_ids, (0, size * count), value=-1)

    # The prompt's padding goes from the left to the end, so that what a response sees is a prefix and an interval.
    padding = length - inputs["attention_mask"].sum(1, keepdim=True)  # (groups, 1)
    place = (torch.arange(ids.shape[1], device=device) + padding) % ids.shape[1]  # (groups, L): where each token was
    ids, present, types, frames = (tensor.gather(1, place) for tensor in (ids, present, types, frames))
    positions = torch.cat([positions, after], -1)
    positions = positions.gather(-1, place.expand_as(positions))

    # Every token sees the prompt up to itself; a response token also its own response up to itself.
    owner = torch.where(place < length, -1, (place - length) // count)  # -1: prompt
    mask = place[:, None, :] <= place[:, :, None]
    mask &= (owner[:, None, :] == -1) | (owner[:, None, :] == owner[:, :, None])
    mask &= present[:, None, :] & present[:, :, None]
    # Padding sees itself and nothing else, so that no row of a softmax is empty.
    mask |= torch.eye(ids.shape[1], dtype=torch.bool, device=device)

    # Token t of a response is predicted by its token t - 1; the first of each response by the prompt's last.
    number = torch.arange(size * count, device=device)
    rows = torch.where(number % count == 0, 0, number) + length - 1 - padding
    return Sequences(
        input_ids=ids,
        attention_mask=mask[:, None],
        token_types=types if "mm_token_type_ids" in inputs else None,
        position_ids=positions,
        frame_ids=frames,
        rows=rows,
        media_repeats=1,
        shape=(groups * size, count),
    )


def can_share(model: Any) -> str | None:
    """Why the responses of a group cannot stand behind one prompt in this model; None when they can."""
    config = model.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention {config._attn_implementation!r} takes no mask of its own (sdpa and eager do)"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"the model has layers of other kinds than full attention: {', '.join(sorted(kinds))}"
    return None
