"""Sequences that lie one after another in a row without padding: where responses are predicted, and their mass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from appo.recording.frame_ids import FrameIds
from appo.recording.recorder import FrameMassRecorder, record_frame_mass
from appo_kernels import checks

OP = "PackedRows"


class PackedRows:
    """B sequences in one row of T tokens, each a prompt and a response; further tokens of the row are padding.

    Args:
        lengths: (B,) tokens of each sequence, prompt and response.
        response_lengths: (B,) tokens of each response, which ends its sequence; N is the longest.

    Attributes:
        rows: (R,) int64, the positions whose logits predict the R tokens of all responses, in order.
        mask: (B, N) bool, True at tokens of the response.

    Raises:
        ValueError: a response that leaves no prompt before it.
    """

    def __init__(self, lengths: Sequence[int], response_lengths: Sequence[int], device: torch.device | str) -> None:
        if len(lengths) != len(response_lengths):
            checks.fail(
                OP, "response_lengths", f"{len(lengths)} lengths", len(response_lengths), "Pass one per sequence."
            )
        for index, (length, response) in enumerate(zip(lengths, response_lengths, strict=True)):
            if not 0 <= response < length:
                remedy = "A token is predicted by the one before it: pass sequences with a prompt."
                checks.fail(OP, "response_lengths", f"0 to {length - 1} at sequence {index}", response, remedy)
        self.lengths, self.response_lengths = list(lengths), list(response_lengths)
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        runs = [torch.arange(end - n - 1, end - 1) for end, n in zip(ends, self.response_lengths, strict=True)]
        self.rows = torch.cat(runs or [torch.arange(0)]).to(device)
        longest = torch.arange(max(self.response_lengths, default=0), device=device)
        self.mask = longest < torch.tensor(self.response_lengths, device=device)[:, None]

    def per_response(self, values: Tensor) -> Tensor:
        """(R, ...) values of ``rows`` as (B, N, ...), 0 behind the end of a response."""
        padded = values.new_zeros(*self.mask.shape, *values.shape[1:])
        padded[self.mask] = values
        return padded

    def targets(self, input_ids: Tensor) -> Tensor:
        """(B, N) int64 response tokens of the row's ``input_ids`` (T,)."""
        return self.per_response(input_ids[self.rows + 1].long())


class PackedMass:
    """Frame mass of the responses of a packed row: a recorder whose frames are counted in each sequence anew.

    Args:
        model, layers, reduction: as of ``record_frame_mass``.
        frames: of the row, (1, T), as ``frame_ids`` counts them: on through all videos of the row.

    A context manager around the forward of the row, whose attention keeps the sequences apart (by ``position_ids``,
    ``cu_seq_lens`` or a mask, as transformers tells its attention); then ``mass`` is (B, N, F) fp32, F the most frames
    of a sequence.
    """

    def __init__(
        self, model: nn.Module, frames: FrameIds, packed: PackedRows, *, layers: Any = 3, reduction: str = "mean"
    ) -> None:
        row = frames.ids[0, : sum(packed.lengths)]
        owner = torch.repeat_interleave(torch.tensor(packed.lengths, device=row.device))
        own = torch.where(row[None] >= 0, owner, -1) == torch.arange(len(packed.lengths), device=row.device)[:, None]
        before = torch.stack([row[mine].amin() if bool(mine.any()) else row.new_zeros(()) for mine in own])
        numbered = torch.where(row >= 0, row - before[owner], -1)
        self.num_frames = int(numbered.max()) + 1
        counts = row.new_zeros(len(packed.lengths) * max(self.num_frames, 1))
        in_frame = numbered >= 0
        places = (owner * max(self.num_frames, 1) + numbered)[in_frame]
        counts.index_add_(0, places, torch.ones_like(places, dtype=counts.dtype))
        self._sizes = counts.view(len(packed.lengths), 1, -1)  # (B, 1, F): keys of each frame
        self._packed, self._mean = packed, reduction == "mean"
        ids = torch.full_like(frames.ids, -1)
        ids[0, : len(row)] = numbered
        self._recorder: FrameMassRecorder | None = None
        if self.num_frames and packed.rows.numel():
            # The recorder would take the mean over keys of all sequences that number a frame alike.
            rows, reduction = packed.rows[None], "sum" if self._mean else reduction
            self._recorder = record_frame_mass(model, ids, rows=rows, layers=layers, reduction=reduction)

    @property
    def mass(self) -> Tensor:
        """(B, N, F) fp32; F = 0 where no sequence has a video."""
        if self._recorder is None:
            return torch.zeros(*self._packed.mask.shape, self.num_frames, device=self._packed.mask.device)
        mass = self._packed.per_response(self._recorder.mass[0])
        return mass / self._sizes.clamp(min=1) if self._mean else mass

    def __enter__(self) -> "PackedMass":
        if self._recorder is not None:
            self._recorder.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._recorder is not None:
            self._recorder.__exit__(*error)
