"""The heads that look at a video: the frame mass of every layer and query head, averaged over the tokens of responses.

    with record_head_mass(model, frames, rows=response_rows(P, N)) as recorder:
        model(**inputs)
    recorder.heads  # (L, B, Hq, F)

The frame mass of docs/method.md section 3 is a mean over heads; a few of them usually do the looking.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from appo.recording.frame_ids import FrameIds
from appo.recording.hooks import OP, attention_layers, attention_modules
from appo.recording.recorder import FrameMassRecorder
from appo_kernels import checks, frame_mass


def record_head_mass(
    model: nn.Module,
    frame_ids: FrameIds | Tensor,
    *,
    rows: slice | Tensor,
    valid: Tensor | None = None,
    layers: int | Sequence[int] | None = None,
) -> "HeadMassRecorder":
    """Context manager that records the frame mass of each layer and head in every forward of ``model``.

    Args:
        model, frame_ids, rows: as `record_frame_mass` takes them.
        valid: (B, R) bool, the rows that count (those of padding do not); None: all.
        layers: as `record_frame_mass` takes them; None: all that have attention.

    Returns:
        The recorder; ``recorder.heads`` is (L, B, Hq, F) fp32, detached: the share of attention that falls on each
        frame, the sum over its keys, as the mean over the valid rows; 0 for a sequence without any. L is the number of
        tapped layers, in the order of ``recorder.layers``.

    Raises:
        ValueError: as `record_frame_mass`; ``valid`` of another shape; layers with different numbers of heads.
        RuntimeError: at ``.heads``, before a forward has passed the tapped layers.
    """
    if layers is None:
        decoder, _ = attention_layers(model, 1)
        layers = sorted(attention_modules(decoder))
    return HeadMassRecorder(model, frame_ids, rows, valid, layers)


class HeadMassRecorder(FrameMassRecorder):
    """See ``record_head_mass``."""

    def __init__(
        self,
        model: nn.Module,
        frame_ids: FrameIds | Tensor,
        rows: slice | Tensor,
        valid: Tensor | None,
        layers: int | Sequence[int],
    ) -> None:
        super().__init__(model, frame_ids, rows, layers, "sum")
        if valid is None:
            valid = torch.ones(self._rows.positions.shape, dtype=torch.bool)
        shape = tuple(self._rows.positions.shape)
        checks.shape(OP, "valid", valid, shape, "(B, R)", "Pass the mask of the rows to record.")
        self._valid = valid
        self._heads: dict[int, Tensor] = {}  # by layer: (B, Hq, F), sum over valid rows and passes

    @property
    def heads(self) -> Tensor:
        """(L, B, Hq, F) fp32: the share of attention on each frame, mean over the valid rows of the last forward."""
        missing = [layer for layer in self.layers if layer not in self._heads]
        if missing:
            raise RuntimeError(
                f"{OP}: `heads`: expected a forward through the tapped layers {self.layers}, got none through "
                f"{missing}. Call the model itself, not a copy, inside the context, and read `heads` after it."
            )
        counts = {layer: mass.shape[1] for layer, mass in self._heads.items()}
        if len(set(counts.values())) > 1:
            remedy = "Record layers with equal numbers one at a time."
            checks.fail(OP, "layers", "layers with the same number of query heads", counts, remedy)
        tokens = self._valid.sum(1).clamp(min=1)[:, None, None].cpu()
        means = [self._heads[layer].cpu() / tokens / self._recorded.count(layer) for layer in self.layers]
        return torch.stack(means).float()

    def _reset(self) -> None:
        super()._reset()
        self._heads = {}

    def _add(self, layer: int, query: Tensor, key: Tensor, **operands: Any) -> None:
        """Add the mass of each head on the valid rows of one layer."""
        mass = frame_mass(query, key, **operands, reduction="sum", per_head=True)  # (B, Hq, R, F)
        # A row that does not count is left out, not multiplied by 0: it may hold anything.
        total = torch.where(self._valid.to(mass.device)[:, None, :, None], mass, 0).sum(2)
        self._heads[layer] = self._heads[layer] + total if layer in self._heads else total
