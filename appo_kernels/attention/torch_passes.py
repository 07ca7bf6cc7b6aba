"""Attention passes in plain PyTorch: an online softmax over tiles of rows x keys sorted by frame, any device.

Keys sorted by frame make the row sum, which the softmax takes anyway, a sum of frame sums: the mass costs nothing
beside it. Exponentials are to base 2, which the vectorised libraries compute in about half the time of base e.
Without a value they give the mass and the lse alone.
"""

import math

import torch
from torch import Tensor

from appo_kernels.attention.arguments import AttentionLayout, Gradients, Upstream
from appo_kernels.attention.torch_tiles import KeyTile, Rows, mask_, row_tiles, tiles_of
from appo_kernels.dtypes import LOG2_E, compute_dtype

MAX_KEYS = 256
# Scores of a tile, over the query heads of one key head: they stay in a cache while they are exponentiated and summed.
TILE_SCORES = 1 << 19
# What is kept of all query heads while a tile of rows walks the keys: 4 Mi numbers are 16 MiB in fp32.
STATE_NUMBERS = 4 << 20
# Of at most this many keys all are read for the mass and its gradient, whose probabilities then add up to 1. Of more,
# the errors of a given lse average out: below twice those of eager attention, and frames are most keys.
FEW_KEYS = 2048


def base_two(scale: float, dtype: torch.dtype) -> tuple[float, float]:
    """The factor of query . key, and that of natural logarithms, for exponentials to base 2 in ``dtype``.

    The first is scale log2(e) rounded to ``dtype``, the second fits what was rounded, so that exp2(factor query . key -
    log2_e lse) is a probability to the power of 1 + 6e-8. Rounded apart they would err by 6e-8 times the scores.
    """
    factor = float(torch.tensor(scale * LOG2_E, dtype=dtype))
    return factor, factor / scale if factor else LOG2_E


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    layout: AttentionLayout,
    out: Tensor | None,
    lse: Tensor,
    mass: Tensor,
    per_head: bool,
    *,
    max_keys: int | None = None,
    tile_scores: int | None = None,
) -> None:
    """Writes ``lse`` (B, Hq, R), and ``out`` (B, Hq, R, d) if there is a value; adds to ``mass``.

    mass: (B, Hq, R, F) when ``per_head``, else (B, 1, R, F), the mean over heads. max_keys, tile_scores: other sizes of
    tiles than those of this module.
    """
    max_keys, tile_scores, layout = max_keys or MAX_KEYS, tile_scores or TILE_SCORES, layout.narrowed()
    batch, heads, rows, head_dim = query.shape
    num_frames, heads_per_kv = mass.shape[-1], heads // key.shape[1]
    factor, log2_e = base_two(layout.scale, lse.dtype)
    most_rows = STATE_NUMBERS // (heads * (num_frames + head_dim + 3))
    for b in range(batch):
        tiles = tiles_of(layout.frame_ids, b, num_frames, max_keys, frames_only=False)
        size = min(most_rows, tile_scores // (heads_per_kv * max([len(tile) for tile in tiles], default=1)))
        for part in row_tiles(b, rows, max(16, size), layout.bounds):
            here = slice(part.start, part.stop)
            one_value = None if value is None else value[b]
            sums, row_max, weighted = _online_softmax(
                query[b, :, here], key[b], one_value, tiles, part, factor, num_frames
            )
            row_sum = sums.sum(-1)  # (Hq, rows)
            lse[b, :, here] = row_max / log2_e + row_sum.log()
            inverse = torch.where(row_sum == 0, 0, 1 / row_sum)[..., None]
            if out is not None and weighted is not None:
                out[b, :, here] = weighted.mul_(inverse).to(out.dtype)
            by_head = sums[..., :num_frames].mul_(inverse)
            if layout.frame_weights is not None:
                by_head *= layout.frame_weights[b]
            if per_head:
                mass[b, :, here] += by_head
            else:
                mass[b, 0, here] += by_head.sum(0).mul_(1 / heads)


def _online_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    tiles: list[KeyTile],
    part: Rows,
    factor: float,
    num_frames: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Some rows of one sequence: query (Hq, rows, d), key and value (Hkv, S, d).

    Returns, of exp2(factor query . key - row_max), the frame sums (Hq, rows, F + 1) and the product with value (Hq,
    rows, d), and row_max (Hq, rows).
    """
    heads, rows, head_dim = query.shape
    dtype, heads_per_kv = compute_dtype(query.dtype), heads // len(key)
    queries = query.to(dtype).reshape(len(key), heads_per_kv * rows, head_dim)
    sums = queries.new_zeros(len(key), heads_per_kv, rows, num_frames + 1)
    row_maxima = queries.new_full((len(key), heads_per_kv, rows, 1), -math.inf)
    weighted = None if value is None else torch.zeros_like(queries)
    for tile in tiles:
        masked = part.masked(tile)
        if masked is True:
            continue
        scores = queries.new_empty(heads_per_kv, rows, len(tile))
        flat = scores.view(heads_per_kv * rows, -1)
        for kv, row_max in enumerate(row_maxima):
            # The same rounding as in the gradient, whose probabilities then add up to 1 with this lse.
            torch.addmm(flat, queries[kv], tile.take(key[kv], dtype).t(), beta=0, alpha=factor, out=flat)
            if isinstance(masked, Tensor):
                mask_(scores, masked)
            new_max = torch.maximum(row_max, scores.amax(-1, keepdim=True))
            finite = new_max.masked_fill(torch.isneginf(new_max), 0)  # a row that has seen no key yet
            rescale = (row_max - finite).exp2_()
            scores.sub_(finite).exp2_()
            tile.add_frame_sums(scores, sums[kv].mul_(rescale))
            if weighted is not None and value is not None:
                weighted[kv].mul_(rescale.view(-1, 1)).addmm_(flat, tile.take(value[kv], dtype))
            row_max.copy_(new_max)
    shape = (heads, rows, -1)
    return sums.view(shape), row_maxima.view(heads, rows), None if weighted is None else weighted.view(shape)


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    layout: AttentionLayout,
    out: Tensor | None,
    lse: Tensor,
    upstream: Upstream,
    gradients: Gradients,
    per_head: bool,
) -> None:
    """Writes ``gradients`` from those of the results that were used (formulas: ``frame_attention/op.py``)."""
    grad_out, grad_lse, grad_mass = upstream
    grad_query, grad_key, grad_value = gradients
    layout = layout.narrowed()
    dtype = compute_dtype(query.dtype)
    batch, heads, rows, _ = query.shape
    heads_per_kv = heads // key.shape[1]
    num_frames = 0 if grad_mass is None else grad_mass.shape[-1]
    factor, log2_e = base_two(layout.scale, dtype)
    for b in range(batch):
        # Without a gradient of the mass all frames are as no frame.
        tiles = tiles_of(layout.frame_ids, b, num_frames, MAX_KEYS, frames_only=False)
        size = max(16, TILE_SCORES // (heads_per_kv * max([len(tile) for tile in tiles], default=1)))
        shift = torch.where(
            torch.isneginf(lse[b]), -math.inf, (lse[b].double() * -log2_e).to(dtype)
        )  # exp2(score - inf) = 0 in a row without keys
        for kv in range(key.shape[1]):
            dkey = torch.zeros_like(key[b, kv], dtype=dtype)
            dvalue = torch.zeros_like(dkey)
            for part in row_tiles(b, rows, size, layout.bounds):
                here = slice(part.start, part.stop)
                of_kv = slice(kv * heads_per_kv, (kv + 1) * heads_per_kv)
                frame_grad = None
                if grad_mass is not None:
                    chosen = grad_mass[b, of_kv, here] if per_head else grad_mass[b, :, here] / heads
                    chosen = chosen if layout.frame_weights is None else chosen * layout.frame_weights[b]
                    frame_grad = torch.nn.functional.pad(chosen.to(dtype), (0, 1)).expand(
                        heads_per_kv, -1, -1
                    )  # none: F
                delta = query.new_zeros(heads_per_kv, part.stop - part.start, dtype=dtype)
                if grad_out is not None and out is not None:
                    delta += (grad_out[b, of_kv, here].to(dtype) * out[b, of_kv, here]).sum(-1)
                if grad_lse is not None:
                    delta -= grad_lse[b, of_kv, here]
                dquery = _rows_backward(
                    query[b, of_kv, here].to(dtype),
                    key[b, kv],
                    None if value is None else value[b, kv],
                    shift[of_kv, here],
                    None if grad_out is None else grad_out[b, of_kv, here].to(dtype),
                    frame_grad, delta, tiles, part, layout.scale, factor, dkey, dvalue,
                )  # fmt: skip
                if grad_query is not None:
                    grad_query[b, of_kv, here] = dquery.to(query.dtype)
            if grad_key is not None:
                grad_key[b, kv] = dkey.to(key.dtype)
            if grad_value is not None:
                grad_value[b, kv] = dvalue.to(key.dtype)


def _rows_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    shift: Tensor,
    grad_out: Tensor | None,
    frame_grad: Tensor | None,
    delta: Tensor,
    tiles: list[KeyTile],
    part: Rows,
    scale: float,
    factor: float,
    dkey: Tensor,
    dvalue: Tensor,
) -> Tensor:
    """Some rows of the heads that share one key head: adds to dkey and dvalue (S, d), returns dquery (g, rows, d).

    query and grad_out (g, rows, d), shift and delta (g, rows), frame_grad (g, rows, F + 1), key and value (S, d).
    delta comes without the term of the mass, which takes a pass of its own over the keys of frames, or over all where
    they are few: their sum then takes the rounding of the lse out of the probabilities.
    """
    heads_per_kv = query.shape[0]
    masked = [part.masked(tile) for tile in tiles]
    inverse: Tensor | None = None
    if frame_grad is not None:
        of_mass, sums = torch.zeros_like(delta), torch.zeros_like(delta) if len(key) <= FEW_KEYS else None
        for tile, tile_mask in zip(tiles, masked, strict=True):
            no_frames = tile.runs[0][0] == frame_grad.shape[-1] - 1
            if tile_mask is True or (no_frames and sums is None):
                continue
            column = tile.take(key, query.dtype).t()
            for head in range(heads_per_kv):
                probabilities = _probabilities(query[head], column, shift[head], tile_mask, factor)
                if sums is not None:
                    sums[head] += probabilities.sum(-1)
                of_mass[head] += probabilities.mul_(frame_grad[head].index_select(1, tile.frames)).sum(-1)
        if sums is not None:
            inverse = torch.where(sums == 0, 1, 1 / sums)[..., None]
            of_mass *= inverse[..., 0]
        delta = delta + of_mass
    dquery = torch.zeros_like(query)
    # Not the probabilities, of which there are more, but what they are multiplied with is times `inverse`
    key_query = query if inverse is None else query * inverse
    value_grad = grad_out if grad_out is None or inverse is None else grad_out * inverse
    for tile, tile_mask in zip(tiles, masked, strict=True):
        if tile_mask is True:
            continue
        keys = tile.take(key, query.dtype)  # (n, d)
        values = None if value is None or grad_out is None else tile.take(value, query.dtype)
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(keys)
        for head in range(heads_per_kv):
            probabilities = _probabilities(query[head], keys.t(), shift[head], tile_mask, factor)
            minus_delta = -delta[head, :, None]
            if values is not None and grad_out is not None and value_grad is not None:
                dvalues.addmm_(probabilities.t(), value_grad[head])
                dscores = torch.addmm(minus_delta, grad_out[head], values.t())
            else:
                dscores = minus_delta.expand_as(probabilities).clone()
            if frame_grad is not None:
                dscores += frame_grad[head].index_select(1, tile.frames)
            dscores *= probabilities
            dquery[head].addmm_(dscores, keys, alpha=scale)
            dkeys.addmm_(dscores.t(), key_query[head], alpha=scale)
        tile.add_to(dkey, dkeys)
        if values is not None:
            tile.add_to(dvalue, dvalues)
    return dquery if inverse is None else dquery.mul_(inverse)


def _probabilities(query: Tensor, column: Tensor, shift: Tensor, masked: bool | Tensor, factor: float) -> Tensor:
    """(rows, n): exp2(factor query . key + shift), 0 where masked."""
    scores = query.new_empty(len(query), column.shape[1])
    torch.addmm(scores, query, column, beta=0, alpha=factor, out=scores)
    scores += shift[:, None]
    if isinstance(masked, Tensor):
        mask_(scores, masked)
    return scores.exp2_()
