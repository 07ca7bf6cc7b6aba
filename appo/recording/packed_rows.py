"""The rows to record, by their group in a packed row, so that each group is replayed by itself.

A group's rows see frames in the group's own prompt only, and count the keys of their own frames only: groups in one row
number their frames alike. With the lse of all keys, the keys of frames are all that a replay reads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from appo_kernels import GroupLayout, checks

OP = "record_frame_mass"


class RowsOfGroup(NamedTuple):
    """The rows of one group: where they stand among the rows to record, and among the tokens of the packed row."""

    prompt: slice  # places of the group's prompt
    place: Tensor  # (R_g,) int64, among the rows to record
    rows: Tensor  # (R_g,) int64, places
    last_key: Tensor | None  # (1, R_g) int32, last key of the prompt that a row sees; None: all of it


def rows_by_group(rows: Tensor, frame_ids: Tensor, layout: GroupLayout) -> list[RowsOfGroup]:
    """rows (1, R) and frame_ids (1, T) of a packed row; groups without a row to record are left out.

    Raises ValueError for a frame in a response, which no replay on prompts would count, and for another T.
    """
    if frame_ids.shape != (1, layout.tokens):
        remedy = "Record the packed row itself, with the frames of its tokens."
        checks.fail(OP, "frame_ids", f"shape (1, T) = {(1, layout.tokens)}", f"shape {tuple(frame_ids.shape)}", remedy)
    device, places = frame_ids.device, rows[0].cpu()
    found, of_prompts = [], torch.zeros(layout.tokens, dtype=torch.bool)
    for group in layout.groups:
        of_prompts[group.prompt] = True
        whole = group.whole
        chosen = ((places >= whole.start) & (places < whole.stop)).nonzero().flatten()
        if chosen.numel():
            own = places[chosen]
            last = (own - whole.start).clamp(max=group.prompt.stop - group.prompt.start - 1)
            seen_whole = bool((own >= group.prompt.stop - 1).all())
            last_key = None if seen_whole else last.int()[None].to(device)
            found.append(RowsOfGroup(group.prompt, chosen.to(device), own.to(device), last_key))
    if bool((frame_ids[0].cpu()[~of_prompts] >= 0).any()):
        checks.fail(OP, "frame_ids", "frames in prompts only", "a frame in a response", "Mark its tokens with -1.")
    return found
