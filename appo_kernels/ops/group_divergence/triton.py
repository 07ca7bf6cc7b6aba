"""group_divergence, backend "triton": one matrix product per vocabulary tile, one Triton pass over it for all slots."""

import math

import torch
import triton
from torch import Tensor

from appo_kernels.dispatch import Problem
from appo_kernels.ops.group_divergence.streaming import Selection, select
from appo_kernels.ops.group_divergence.triton_fold import slots_kernel
from appo_kernels.triton_launch import on_its_device
from appo_kernels.triton_launch import unsupported as _unsupported
from appo_kernels.vocabulary.torch_tiles import convertible_columns, operand, product, tiles, whole_lines
from appo_kernels.vocabulary.triton_rows import row_layout

TILE_BYTES = 64 << 20  # fp32 logits of the unique rows: few launches, and products that fill a GPU
COLUMNS = 512  # of a slot's members that a program holds at a time


def unsupported(problem: Problem) -> str | None:
    return _unsupported(problem)


def forward(
    hidden: Tensor,
    weight: Tensor,
    lse: Tensor,
    slots: Tensor,
    kind: str,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    divergence: Tensor,
) -> None:
    selection = select(slots, hidden.shape[1])
    U, V = len(selection.response), weight.shape[0]
    if not U:
        divergence.zero_()
        return
    rows = operand(hidden[selection.response, selection.position])  # (U, D)
    wide = whole_lines(V, min(convertible_columns(weight), max(256, TILE_BYTES // (U * 4))))
    tile = torch.empty(U, wide, dtype=torch.float32, device=hidden.device)
    row_lse = lse[selection.response, selection.position].float()
    total = torch.zeros(len(selection.members), dtype=torch.float32, device=hidden.device)
    for columns in tiles(V, wide):
        logits = product(rows, operand(weight[columns]).t(), out=tile[:, : columns.stop - columns.start])
        _fold(
            logits, None if bias is None else bias[columns], row_lse, selection.members, U, kind, V, total,
            temperature, softcap,
        )  # fmt: skip
    _finish(total, selection, kind, divergence)


def forward_from_logits(
    logits: Tensor, lse: Tensor, slots: Tensor, kind: str, temperature: float, divergence: Tensor
) -> None:
    """The logits are read where they lie, in any float dtype up to fp32; fp64 ones in a copy."""
    G, N, V = logits.shape
    if logits.stride(2) != 1 or logits.dtype == torch.float64:
        logits = logits.float().contiguous()
    selection = select(slots, N)
    members = torch.where(slots >= 0, torch.arange(G, device=slots.device)[None, :, None] * N + slots, G * N)
    members = members.transpose(1, 2).reshape(-1, G).contiguous()  # (S, G)
    total = torch.zeros(len(members), dtype=torch.float32, device=logits.device)
    if not len(selection.response):
        divergence.zero_()
        return
    _fold(logits, None, lse.float().contiguous(), members, G * N, kind, V, total, temperature, None)
    _finish(total, selection, kind, divergence)


@on_its_device
def _fold(
    logits: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    members: Tensor,
    missing: int,
    kind: str,
    V: int,
    total: Tensor,
    temperature: float,
    softcap: float | None,
) -> None:
    """logits (B, T, v) or (m, v), any strides with a unit last one; lse of all rows; members (S, G) flat rows."""
    S, G = members.shape
    stride_b, stride_t, T, v = row_layout(logits)
    if not S:
        return
    slots_kernel[(S,)](
        logits, members if bias is None else bias, lse, members.contiguous(), total, stride_b, stride_t,
        T, missing, S, G, v, softcap or 1.0, temperature, -math.log(V),
        KL=kind == "kl", CAP=softcap is not None, BIAS=bias is not None, GP=triton.next_power_of_2(G),
        BLOCK=COLUMNS, num_warps=4,
    )  # fmt: skip


def _finish(total: Tensor, selection: Selection, kind: str, divergence: Tensor) -> None:
    if kind == "kl":  # not negative; rounding may leave a trace of it where all members agree
        total = total.clamp_(min=0.0).masked_fill_(selection.present < 2, 0.0)
    divergence.copy_(total.view_as(divergence))
