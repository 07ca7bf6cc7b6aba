"""group_divergence, backend "torch": one pass over vocabulary tiles of the unique rows, on any device.

Shapes: U unique (response, position) rows, v vocabulary columns of a tile, S = K J slots of G members each.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from appo_kernels.dispatch import Problem
from appo_kernels.logits import logits_tile, operand, tiles

# Bytes of a tile (unique rows x columns), of which there are two, and of a temporary of a chunk of slots, of which
# there are up to three. All must fit in 128 MiB beside a copy of the selected rows; on a CPU they should also stay in
# the last level of cache.
CPU_TILE_BYTES, GPU_TILE_BYTES = 8 << 20, 32 << 20
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 1 << 20, 16 << 20
# A tile is never narrower than this, so that its matrix product stays one.
LEAST_COLUMNS = 64

# The log-probability of a word with a logit of -inf. exp of it is exactly 0 in fp32 and fp64, and the mean over up to
# 1,677 members that all have it is exactly the same number.
LOG_ZERO = -1e4
CLAMP = 11.0


class Selection(NamedTuple):
    """What the slots refer to."""

    response: Tensor  # (U,) response of each unique row
    position: Tensor  # (U,) its token position
    members: Tensor  # (S, G) unique row of each member; U, one past the last, for a missing one
    present: Tensor  # (S,) members that are there


def unsupported(problem: Problem) -> str | None:
    return None


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
    rows = operand(hidden[selection.response, selection.position])  # (U, D)

    def tile(columns: slice, scratch: Tensor) -> Tensor:
        bias_tile = None if bias is None else bias[columns]
        return logits_tile(rows, operand(weight[columns]), bias_tile, temperature, softcap, scratch)

    accumulate(tile, weight.shape[0], selection, lse, kind, divergence)


def forward_from_logits(
    logits: Tensor, lse: Tensor, slots: Tensor, kind: str, temperature: float, divergence: Tensor
) -> None:
    selection = select(slots, logits.shape[1])

    def tile(columns: slice, scratch: Tensor) -> Tensor:
        U, v = len(selection.response), columns.stop - columns.start
        rows = logits[..., columns][selection.response, selection.position]
        return torch.div(rows, temperature, out=scratch[: U * v].view(U, v))

    accumulate(tile, logits.shape[2], selection, lse, kind, divergence)


def select(slots: Tensor, positions: int) -> Selection:
    """The unique rows among slots (K, G, J) and, per slot, which of them its members are."""
    _, G, _ = slots.shape
    response = torch.arange(G, device=slots.device)[None, :, None]
    missing = G * positions
    flat = torch.where(slots >= 0, response * positions + slots, missing).transpose(1, 2).reshape(-1, G)  # (S, G)
    rows, members = torch.unique(flat, return_inverse=True)
    rows = rows[rows < missing]  # sorted, so that only the last can go and `members` stay valid
    return Selection(rows // positions, rows % positions, members, (flat < missing).sum(1))


def accumulate(
    tile: Callable[[slice, Tensor], Tensor],
    V: int,
    selection: Selection,
    lse: Tensor,
    kind: str,
    divergence: Tensor,
) -> None:
    """Sum the terms of all vocabulary tiles; ``tile(columns, scratch)`` gives the (U, v) logits of one of them."""
    U, (S, G) = len(selection.response), selection.members.shape
    if U == 0:
        divergence.zero_()  # no slot has a member: nothing to disagree (kl), all uniform (k3)
        return
    item, on_gpu = divergence.itemsize, divergence.is_cuda
    tile_bytes, chunk_bytes = (GPU_TILE_BYTES, GPU_CHUNK_BYTES) if on_gpu else (CPU_TILE_BYTES, CPU_CHUNK_BYTES)
    wide = min(V, max(LEAST_COLUMNS, tile_bytes // ((U + 1) * item)))
    rows_per_slot = 1 if kind == "kl" else G  # kl sums its members without a copy of them
    chunk = min(S, max(1, chunk_bytes // (rows_per_slot * wide * item)))
    scratch, spare = divergence.new_empty(2, (U + 1) * wide)
    row_lse = lse[selection.response, selection.position].to(divergence.dtype)
    total = divergence.new_zeros(S)
    for columns in tiles(V, wide):
        logits = tile(columns, scratch)
        if kind == "kl":
            fold_kl(logits, row_lse, selection, total, chunk, scratch, spare)
        else:
            fold_k3(logits, row_lse, selection, total, chunk, scratch, -math.log(V))
    if kind == "kl":  # not negative; rounding may leave a trace of it where all members agree
        total = total.clamp_(min=0.0).masked_fill_(selection.present < 2, 0.0)
    divergence.copy_(total.view_as(divergence))


def fold_kl(
    logits: Tensor, lse: Tensor, selection: Selection, total: Tensor, chunk: int, scratch: Tensor, spare: Tensor
) -> None:
    """total (S,) += sum over this tile's words of mean_i p_i (log p_i - log pbar).

    As (mean_i p_i log p_i) - pbar log pbar, word by word: both means are sums of unique rows, and a slot takes one
    logarithm a word instead of one a member. ``logits`` (U, v) is the front of ``scratch`` and overwritten.
    """
    U, v = logits.shape
    missing = slice(U * v, (U + 1) * v)  # the row of a missing member: zero probability
    p = spare[: (U + 1) * v].view(U + 1, v)
    log_p = logits.sub_(lse[:, None]).clamp_(min=LOG_ZERO)
    torch.exp(log_p, out=p[:U])
    log_p.mul_(p[:U])
    spare[missing] = 0.0
    scratch[missing] = 0.0
    p_log_p = scratch[: (U + 1) * v].view(U + 1, v)
    tiny = torch.finfo(p.dtype).tiny
    for part in tiles(len(total), chunk):
        members = selection.members[part]
        share = 1.0 / selection.present[part, None].clamp(min=1).to(p.dtype)
        mixture = embedding_bag(members, p, mode="sum").mul_(share)
        terms = embedding_bag(members, p_log_p, mode="sum").mul_(share)
        log_mixture = mixture.clamp(min=tiny).log_()
        total[part] += terms.sub_(log_mixture.mul_(mixture)).sum(1)


def fold_k3(
    logits: Tensor, lse: Tensor, selection: Selection, total: Tensor, chunk: int, scratch: Tensor, log_uniform: float
) -> None:
    """total (S,) += sum over this tile's words of mean_i (exp(d_i) - d_i - 1), each term formed by itself.

    expm1(d) - d rather than exp(d) - d - 1, which cancels where the members agree. ``logits`` (U, v) is the front of
    ``scratch`` and overwritten.
    """
    U, v = logits.shape
    logits.sub_(lse[:, None]).clamp_(min=LOG_ZERO)
    scratch[U * v : (U + 1) * v] = log_uniform  # the row of a missing member
    log_p = scratch[: (U + 1) * v].view(U + 1, v)
    G = selection.members.shape[1]
    for part in tiles(len(total), chunk):
        d = log_p.index_select(0, selection.members[part].reshape(-1)).view(-1, G, v)
        mean = d.mean(1, keepdim=True)
        d.sub_(mean).neg_().clamp_(-CLAMP, CLAMP)
        total[part] += torch.expm1(d).sub_(d).view(len(d), -1).sum(1) / G
