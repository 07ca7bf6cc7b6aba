"""group_divergence, backend "triton": one matrix product per vocabulary tile, one Triton pass over it for all slots."""

import math

import torch
import triton
from torch import Tensor

from appo_kernels.ops.group_divergence.selection import Selection, member_rows, write_divergence
from appo_kernels.ops.group_divergence.triton_fold import slots_kernel
from appo_kernels.triton_launch import on_its_device
from appo_kernels.triton_launch import unsupported as unsupported
from appo_kernels.vocabulary.torch_tiles import convertible_columns, operand, product, tiles, whole_lines
from appo_kernels.vocabulary.triton_rows import row_layout

TILE_BYTES = 64 << 20  # fp32 logits of the unique rows: few launches, and products that fill a GPU
COLUMNS = 512  # of a slot's members that a program holds at a time
CHUNK = 2048  # columns of a program: few slots still fill a GPU


def forward(
    hidden: Tensor,
    weight: Tensor,
    lse: Tensor,
    selection: Selection,
    kind: str,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    divergence: Tensor,
) -> None:
    """Arguments as of ``streaming.forward``."""
    U, V = len(selection.response), weight.shape[0]
    rows = operand(hidden[selection.response, selection.position])  # (U, D)
    wide = whole_lines(V, min(convertible_columns(weight), max(256, TILE_BYTES // (U * 4))))
    tile = torch.empty(U, wide, dtype=torch.float32, device=hidden.device)
    row_lse = lse[selection.response, selection.position].float()
    terms = _Terms(selection.members, V, wide, kind, temperature, softcap)
    for columns in tiles(V, wide):
        logits = product(rows, operand(weight[columns]).t(), out=tile[:, : columns.stop - columns.start])
        terms.fold(logits, None if bias is None else bias[columns], row_lse, U)
    terms.write(divergence, selection.present)


def forward_from_logits(
    logits: Tensor, lse: Tensor, slots: Tensor, kind: str, temperature: float, divergence: Tensor
) -> None:
    """The logits are read where they lie, in any float dtype up to fp32; fp64 ones in a copy."""
    G, N, V = logits.shape
    if logits.stride(2) != 1 or logits.dtype == torch.float64:
        logits = logits.float().contiguous()
    members = member_rows(slots, N).contiguous()
    terms = _Terms(members, V, V, kind, temperature, None)
    terms.fold(logits, None, lse.float().contiguous(), G * N)
    terms.write(divergence, (members < G * N).sum(1))


class _Terms:
    """The sums of all slots (S, chunks of the vocabulary), filled tile by tile and added up in their order."""

    def __init__(
        self, members: Tensor, V: int, wide: int, kind: str, temperature: float, softcap: float | None
    ) -> None:
        """members: (S, G) rows of the logits; wide: columns of a tile."""
        self.members, self.kind, self.V, self.temperature, self.softcap = (
            members.contiguous(), kind, V, temperature, softcap,
        )  # fmt: skip
        chunks = sum(triton.cdiv(part.stop - part.start, CHUNK) for part in tiles(V, wide))
        self.sums = torch.empty(len(members), chunks, dtype=torch.float32, device=members.device)
        self.done = 0  # chunks

    def fold(self, logits: Tensor, bias: Tensor | None, lse: Tensor, missing: int) -> None:
        """The next tile: logits (B, T, v) or (m, v), any strides with a unit last one; lse of all rows; ``missing``
        stands for no row."""
        if len(self.members):
            _launch(logits, self, bias, lse, missing)

    def write(self, divergence: Tensor, present: Tensor) -> None:
        """present: (S,) members that are there."""
        write_divergence(self.sums.sum(1), self.kind, divergence, present)


@on_its_device
def _launch(logits: Tensor, terms: _Terms, bias: Tensor | None, lse: Tensor, missing: int) -> None:
    """One tile of logits (B, T, v) or (m, v) into the sums of ``terms``; lse of all rows."""
    S, G = terms.members.shape
    stride_b, stride_t, T, v = row_layout(logits)
    chunks = triton.cdiv(v, CHUNK)
    never_read = terms.members  # in the place of a bias that is not there: a kernel takes a pointer
    slots_kernel[(S, chunks)](
        logits, never_read if bias is None else bias, lse, terms.members, terms.sums, stride_b, stride_t,
        T, missing, S, G, v, terms.done, terms.sums.shape[1], terms.softcap or 1.0, terms.temperature,
        -math.log(terms.V), KL=terms.kind == "kl", CAP=terms.softcap is not None, BIAS=bias is not None,
        GP=triton.next_power_of_2(G), BLOCK=COLUMNS, CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip
    terms.done += chunks
