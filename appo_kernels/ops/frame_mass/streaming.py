"""frame_mass in plain PyTorch: tiles of rows x keys of frames, all query heads of a key head at a time, any device.

Probabilities of a tile are added up over the heads first and over the keys of each frame once at the end, so that
beside the matrix product a head costs an exponential and an addition per score. Exponentials are to base 2, which the
vectorised libraries compute in about half the time of base e; log2(e) goes into scale and lse.
"""

import math

import torch
from torch import Tensor

from appo_kernels import dispatch
from appo_kernels.attention import torch_passes as passes
from appo_kernels.attention.arguments import AttentionLayout
from appo_kernels.attention.torch_tiles import KeyTile, Rows, mask_, row_tiles, tiles_of
from appo_kernels.dtypes import compute_dtype

# Keys converted at a time, over all key/value heads: 4 Mi numbers are 16 MiB in fp32 whatever the heads are.
KEY_NUMBERS = 4 << 20
# Scores of a tile, over the query heads of one key head. With one head a second such block is alive, their sum.
TILE_SCORES = 1 << 20
MIN_KEYS, MAX_KEYS = 256, 1024


def unsupported(problem: dispatch.Problem) -> str | None:
    return None


def forward(
    query: Tensor,
    key: Tensor,
    layout: AttentionLayout,
    lse: Tensor | None,
    mass: Tensor,
    new_lse: Tensor | None,
    per_head: bool,
) -> None:
    """Adds to ``mass`` (B, H, R, F), from ``lse`` (B, Hq, R) or, where that is None, a pass that writes ``new_lse``."""
    if lse is None:
        assert new_lse is not None
        passes.attend(
            query, key, None, layout, None, new_lse, mass, per_head, max_keys=MAX_KEYS, tile_scores=TILE_SCORES
        )
        return
    layout = layout.narrowed()
    dtype = compute_dtype(query.dtype)
    batch, _, rows, head_dim = query.shape
    num_frames, heads_per_kv = mass.shape[-1], query.shape[1] // key.shape[1]
    if not mass.numel():
        return
    factor, log2_e = passes.base_two(layout.scale, dtype)
    keys = max(MIN_KEYS, min(MAX_KEYS, KEY_NUMBERS // (key.shape[1] * head_dim)))
    for b in range(batch):
        # An empty row's lse of -inf or +inf becomes +inf, and exp(score - inf) the 0 it must be.
        shift = torch.where(torch.isneginf(lse[b]), -math.inf, (lse[b].double() * -log2_e).to(dtype))  # (Hq, R)
        for tile in tiles_of(layout.frame_ids, b, num_frames, keys, frames_only=True):
            columns = [tile.take(key_Sd, dtype).t() for key_Sd in key[b]]  # Hkv of (d, n)
            for part in row_tiles(b, rows, max(16, TILE_SCORES // (heads_per_kv * len(tile))), layout.bounds):
                masked = part.masked(tile)
                if masked is True:
                    continue
                weights = None if layout.frame_weights is None else layout.frame_weights[b]
                _add_tile(query[b], columns, shift, tile, part, masked, weights, factor, per_head, mass[b])


def _add_tile(
    query: Tensor,
    columns: list[Tensor],
    shift: Tensor,
    tile: KeyTile,
    part: Rows,
    masked: bool | Tensor,
    weights: Tensor | None,
    factor: float,
    per_head: bool,
    mass: Tensor,
) -> None:
    """Adds the mass of some rows on a tile: query (Hq, R, d), columns Hkv of (d, n), shift (Hq, R), mass (H, R, F)."""
    here = slice(part.start, part.stop)
    heads, rows = query.shape[0], part.stop - part.start
    heads_per_kv = heads // len(columns)
    scores = columns[0].new_empty(heads_per_kv, rows, len(tile))
    total: Tensor | None = None
    for kv, column in enumerate(columns):
        of_kv = slice(kv * heads_per_kv, (kv + 1) * heads_per_kv)
        # The factor and the lse stay out of the product, whose partial sums they would round once more.
        torch.mm(query[of_kv, here].to(column.dtype).flatten(0, 1), column, out=scores.view(heads_per_kv * rows, -1))
        torch.add(shift[of_kv, here, None], scores, alpha=factor, out=scores)
        if isinstance(masked, Tensor):
            mask_(scores, masked)
        scores.exp2_()
        if per_head:
            _add_sums(scores, tile, weights, mass[of_kv, here])
        else:
            total = scores.sum(0) if total is None else total.add_(scores.sum(0))
    if total is not None:
        _add_sums(total.mul_(1 / heads), tile, weights, mass[0, here])


def _add_sums(probabilities: Tensor, tile: KeyTile, weights: Tensor | None, mass: Tensor) -> None:
    """Adds the frame sums of probabilities (..., n) on a tile, times the weights (F,), to mass (..., F)."""
    sums = torch.zeros_like(mass)
    tile.add_frame_sums(probabilities, sums)
    mass += sums if weights is None else sums * weights


backward = passes.attend_backward
