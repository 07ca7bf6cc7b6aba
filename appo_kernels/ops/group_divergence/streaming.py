"""group_divergence, backend "torch": one pass over vocabulary tiles of the unique rows, on any device.

Shapes: U unique (response, position) rows, v vocabulary columns of a tile, S = K J slots of G members each.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from appo_kernels.dispatch import Problem
from appo_kernels.dtypes import K3_CLAMP, LOG_ZERO
from appo_kernels.ops.group_divergence.selection import Selection, mark, select, write_divergence
from appo_kernels.vocabulary.torch_tiles import convertible_columns, logits_tile, operand, tiles

# Bytes of a tile (unique rows x columns), of which there are two, and of a copy of the members of a chunk of slots
# (slots x members x columns), of which there are up to three. All must fit in 128 MiB beside a copy of the selected
# rows; on a CPU the tiles should also stay in the last level of cache, the chunks in the one before.
CPU_SLOT_TILE_BYTES, GPU_SLOT_TILE_BYTES = 8 << 20, 32 << 20
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 1 << 19, 16 << 20
# A tile is never narrower than this, so that its matrix product stays one.
LEAST_COLUMNS = 64


def unsupported(problem: Problem) -> str | None:
    return None


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
    """Writes ``divergence`` (K, J): hidden (G, N, D), weight (V, D), lse (G, N), bias (V,)."""
    rows = operand(hidden[selection.response, selection.position])  # (U, D)

    def tile(columns: slice, scratch: Tensor) -> Tensor:
        bias_tile = None if bias is None else bias[columns]
        return logits_tile(rows, operand(weight[columns]), bias_tile, temperature, softcap, scratch)

    accumulate(tile, weight.shape[0], convertible_columns(weight), selection, lse, kind, divergence)


def forward_from_logits(
    logits: Tensor, lse: Tensor, slots: Tensor, kind: str, temperature: float, divergence: Tensor
) -> None:
    """Writes ``divergence`` (K, J): logits (G, N, V), any strides, lse (G, N), slots (K, G, J)."""
    marked = mark(slots, logits.shape[1])
    selection = select(marked, logits.shape[1], int(marked.unique))

    def tile(columns: slice, scratch: Tensor) -> Tensor:
        U, v = len(selection.response), columns.stop - columns.start
        rows = logits[..., columns][selection.response, selection.position]
        return scratch[: U * v].view(U, v).copy_(rows).div_(temperature)

    accumulate(tile, logits.shape[2], logits.shape[2], selection, lse, kind, divergence)


def accumulate(
    tile: Callable[[slice, Tensor], Tensor],
    V: int,
    widest: int,
    selection: Selection,
    lse: Tensor,
    kind: str,
    divergence: Tensor,
) -> None:
    """Sum the terms of all vocabulary tiles of at most ``widest`` columns.

    ``tile(columns, scratch)`` gives the (U, v) logits of one of them, in the front of ``scratch``.
    """
    U, (S, G) = len(selection.response), selection.members.shape
    if U == 0:
        divergence.zero_()  # no slot has a member: nothing to disagree (kl), all uniform (k3)
        return
    item, on_gpu = divergence.itemsize, divergence.is_cuda
    tile_bytes, chunk_bytes = (
        (GPU_SLOT_TILE_BYTES, GPU_CHUNK_BYTES) if on_gpu else (CPU_SLOT_TILE_BYTES, CPU_CHUNK_BYTES)
    )
    wide = min(V, widest, max(LEAST_COLUMNS, tile_bytes // ((U + 1) * item)))
    chunk = min(S, max(1, chunk_bytes // (G * wide * item)))
    scratch, spare = divergence.new_empty(2, (U + 1) * wide)
    row_lse = lse[selection.response, selection.position].to(divergence.dtype)
    total = divergence.new_zeros(S)
    for columns in tiles(V, wide):
        logits = tile(columns, scratch)
        if kind == "kl":
            fold_kl(logits, row_lse, selection, total, chunk, scratch, spare)
        else:
            fold_k3(logits, row_lse, selection, total, chunk, scratch, -math.log(V))
    write_divergence(total, kind, divergence, selection.present)


def fold_kl(
    logits: Tensor, lse: Tensor, selection: Selection, total: Tensor, chunk: int, scratch: Tensor, spare: Tensor
) -> None:
    """total (S,) += sum over this tile's words of mean_i p_i (log p_i - log pbar), each term formed by itself.

    exp is taken once per unique row and log once per slot, not once per member. ``logits`` (U, v) is the front of
    ``scratch`` and overwritten; ``spare`` is another such buffer.
    """
    log_p = _log_p_with_missing(logits, lse, scratch, 0.0)
    p = torch.exp(log_p, out=spare[: log_p.numel()].view_as(log_p))
    p[-1] = 0.0  # a missing member takes no part
    tiny = torch.finfo(p.dtype).tiny
    for part in tiles(len(total), chunk):
        present = selection.present[part, None].clamp(min=1)  # (s, 1)
        p_member = gather(p, selection.members[part])  # (s, G, v)
        log_mixture = p_member.sum(1).div_(present).clamp_(min=tiny).log_()  # (s, v)
        terms = gather(log_p, selection.members[part]).sub_(log_mixture[:, None]).mul_(p_member)
        total[part] += terms.flatten(1).sum(1) / present[:, 0]


def fold_k3(
    logits: Tensor, lse: Tensor, selection: Selection, total: Tensor, chunk: int, scratch: Tensor, log_uniform: float
) -> None:
    """total (S,) += sum over this tile's words of mean_i (exp(d_i) - d_i - 1), each term formed by itself.

    expm1(d) - d rather than exp(d) - d - 1, which cancels where the members agree. ``logits`` (U, v) is the front of
    ``scratch`` and overwritten.
    """
    log_p = _log_p_with_missing(logits, lse, scratch, log_uniform)
    for part in tiles(len(total), chunk):
        d = gather(log_p, selection.members[part])  # (s, G, v)
        d.sub_(d.mean(1, keepdim=True)).neg_().clamp_(-K3_CLAMP, K3_CLAMP)
        total[part] += torch.expm1(d).sub_(d).flatten(1).sum(1) / d.shape[1]


def _log_p_with_missing(logits: Tensor, lse: Tensor, scratch: Tensor, missing: float) -> Tensor:
    """(U + 1, v): log-probabilities in place of ``logits``, the front of ``scratch``, and ``missing`` in a last row."""
    U, v = logits.shape
    logits.sub_(lse[:, None]).clamp_(min=LOG_ZERO)
    scratch[U * v : (U + 1) * v] = missing
    return scratch[: (U + 1) * v].view(U + 1, v)


def gather(rows: Tensor, members: Tensor) -> Tensor:
    """rows (U + 1, v), members (s, G) -> (s, G, v), a copy."""
    return rows.index_select(0, members.flatten()).view(*members.shape, rows.shape[1])
