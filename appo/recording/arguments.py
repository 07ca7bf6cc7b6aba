"""The arguments of a recorder: response rows, frames of the whole sequences, and rows to record, checked."""

import torch
from torch import Tensor

from appo.recording.frame_ids import FrameIds
from appo.recording.hooks import OP
from appo_kernels import checks


def response_rows(prompt_length: int, response_length: int) -> slice:
    """Rows of the response's tokens: token t is predicted at position prompt_length - 1 + t (docs/method.md 2)."""
    if prompt_length < 1 or response_length < 1:
        checks.fail(
            "response_rows",
            "prompt_length, response_length",
            "at least one token each",
            (prompt_length, response_length),
            "Count padding in: both are lengths of the padded tensors.",
        )
    return slice(prompt_length - 1, prompt_length - 1 + response_length)


class Rows:
    """The query positions to record: ``positions`` (B, R) int64, and on the host."""

    def __init__(self, positions: Tensor) -> None:
        self.positions, self.on_host = positions, positions.cpu()
        self.lowest, self.highest = (int(bound) for bound in self.on_host.aminmax())
        first, count = int(self.on_host[0, 0]), positions.shape[1]
        neighbours = bool((self.on_host == torch.arange(first, first + count)).all())
        self.run = slice(first, first + count) if neighbours else None  # of every sequence

    def of(self, values: Tensor, first_row: int) -> Tensor:
        """(B, H, L, d) of the positions from ``first_row`` on -> (B, H, R, d); a view where all rows are one run."""
        if self.run is not None:
            return values[:, :, self.run.start - first_row : self.run.stop - first_row]
        rows = self.positions - first_row if first_row else self.positions
        if len(rows) == 1:
            return values.index_select(2, rows[0])
        return torch.take_along_dim(values, rows[:, None, :, None], 2)


def check_frame_ids(frame_ids: FrameIds | Tensor) -> tuple[Tensor, int]:
    """(B, S) int32 and the largest number of frames."""
    if isinstance(frame_ids, FrameIds):
        ids, num_frames = frame_ids.ids, int(frame_ids.num_frames.max())
    else:
        ids, num_frames = frame_ids, -1
    checks.rank(OP, "frame_ids", ids, 2, "(B, S)")
    checks.dtype(OP, "frame_ids", ids, checks.INTS)
    if not ids.numel():
        checks.fail(
            OP, "frame_ids", "at least one token", f"shape {tuple(ids.shape)}", "Pass a batch that is not empty."
        )
    most = int(ids.max()) + 1
    if num_frames >= 0 and most > num_frames:
        checks.fail(
            OP, "frame_ids", f"ids below num_frames = {num_frames}", most - 1, "Pass what frame_ids() returned."
        )
    return checks.narrowed(ids), max(most, num_frames)


def check_rows(rows: slice | Tensor, batch: int, length: int) -> Rows:
    """The rows of ``batch`` sequences of ``length`` tokens."""
    if isinstance(rows, slice):
        for bound in (rows.start, rows.stop):
            if bound is not None and not -length <= bound <= length:
                checks.fail(
                    OP, "rows", f"a slice within the {length} tokens of `frame_ids`", rows, "Slices are not clipped."
                )
        positions = torch.arange(length)[rows].expand(batch, -1)
    else:
        checks.rank(OP, "rows", rows, 2, "(B, R)")
        checks.dtype(OP, "rows", rows, checks.INTS)
        checks.shape(OP, "rows", rows, (batch, rows.shape[1]), "(B, R)", "Pass one row of positions per sequence.")
        positions = rows.long()
    if not positions.numel():
        checks.fail(OP, "rows", "at least one position", rows, "Use response_rows(prompt_length, response_length).")
    found = Rows(positions)
    if found.lowest < 0 or found.highest >= length:
        checks.fail(
            OP,
            "rows",
            f"positions 0 to {length - 1} (the tokens of `frame_ids`)",
            f"{found.lowest} to {found.highest}",
            "Use response_rows(prompt_length, response_length), with padding counted.",
        )
    return found
