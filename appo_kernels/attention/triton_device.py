# mypy: disable-error-code="no-untyped-def"
"""Triton: what rows, keys and their visibility look like to all attention kernels.

A tile of ``BM`` rows packs (row, query head) pairs that share a key/value head, so that a tile of keys is loaded once
for all of them: lane m is row m // G of the tile and query head m % G of the group, G any number.

Shapes: B sequences, HKV key heads of G query heads each, R rows, S keys, F frames, N tiles of rows, T tiles of BN keys,
D head size, DP the padded one. Pointers ``p_``, tiles in registers ``b_``; a comment gives the shape of a tile.
"""

import triton
import triton.language as tl

from appo_kernels.dtypes import LN_2, LOG2_E

# What a tile of rows sees of a tile of keys: nothing; something, or a tile of several frames; every row every key, of a
# tile with fewer keys than it has room for, of one without.
SKIP, PARTIAL, SHORT, FULL = 0, 1, 2, 3
# The same for kernels, whose loops take the tiles that are seen one kind after the other.
PARTIAL_TILES, SHORT_TILES, FULL_TILES = tl.constexpr(PARTIAL), tl.constexpr(SHORT), tl.constexpr(FULL)
TO_BASE_2, TO_BASE_E = tl.constexpr(LOG2_E), tl.constexpr(LN_2)


@triton.jit
def packed_rows(row_tile, R, G: tl.constexpr, BM: tl.constexpr):
    """Row, head within the group, and whether there is such a row, of each lane; each (BM,)."""
    lane = tl.arange(0, BM)
    rows_per_tile: tl.constexpr = BM // G
    row = row_tile * rows_per_tile + lane // G
    valid = (lane < rows_per_tile * G) & (row < R)
    return row, lane % G, valid


@triton.jit
def load_bounds(p_bounds, sequence, row, valid, R):
    """First, last and prefix of each row, (BM,) int32; rows that do not exist see nothing."""
    base = p_bounds + sequence.to(tl.int64) * 3 * R
    first = tl.load(base + row, mask=valid, other=1)
    last = tl.load(base + R + row, mask=valid, other=0)
    prefix = tl.load(base + 2 * R + row, mask=valid, other=0)
    return first, last, prefix


@triton.jit
def visible(position, first, last, prefix, BOUNDS: tl.constexpr):
    """(BM, BN) from position (1, BN) and bounds (BM, 1), or the other way round."""
    if BOUNDS:
        return ((position >= first) & (position <= last)) | (position < prefix)
    else:
        return position >= 0


@triton.jit
def load_rows(p, stride_head, stride_row, row, head, valid, D: tl.constexpr, DP: tl.constexpr):
    """(BM, DP) rows of a (heads, R, D) array; columns from D on, and rows that do not exist, are 0."""
    d = tl.arange(0, DP)
    pointers = p + head.to(tl.int64)[:, None] * stride_head + row.to(tl.int64)[:, None] * stride_row + d[None, :]
    if D == DP:
        return tl.load(pointers, mask=valid[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=valid[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_keys(p, stride, position, inside, D: tl.constexpr, DP: tl.constexpr, FULL_TILE: tl.constexpr):
    """(BN, DP) rows of a (S, D) array at ``position``, 0 where not ``inside``; FULL_TILE: all of them are."""
    d = tl.arange(0, DP)
    pointers = p + position.to(tl.int64)[:, None] * stride + d[None, :]
    if FULL_TILE and D == DP:
        return tl.load(pointers)
    elif D == DP:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    elif FULL_TILE:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(pointers, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_lse(p_lse, head, row, valid, R):
    """Base-2 lse (BM,) of each lane, +inf for rows that see no key (their lse is -inf or +inf) or do not exist."""
    lse = tl.load(p_lse + head.to(tl.int64) * R + row, mask=valid, other=float("inf")) * TO_BASE_2
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def probabilities(
    b_query, p_key, stride_key, p_order, start, length, lse, first, last, prefix, scale,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, BOUNDS: tl.constexpr,
):  # fmt: skip
    """(BM, BN) probabilities of the ``length`` keys from ``start`` in the plan's order; 0 where a key is not seen.

    Without BOUNDS every row sees all of them.
    """
    n = tl.arange(0, BN)
    inside = n < length
    position = tl.load(p_order + start + n, mask=inside, other=0)
    b_key = load_keys(p_key, stride_key, position, inside, D, DP, False)  # (BN, DP)
    b_score = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")  # (BM, BN)
    seen = inside[None, :]
    if BOUNDS:
        seen &= visible(position[None, :], first[:, None], last[:, None], prefix[:, None], BOUNDS)
    return tl.where(seen, tl.exp2(b_score * scale - lse[:, None]), 0.0)


@triton.jit
def sum_heads(b_lanes, G: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr, FG: tl.constexpr):
    """(BM, FG) values of lanes -> (ROWS, FG) sums over the G heads of each row, in the order of the heads."""
    total = tl.zeros([ROWS, FG], tl.float32)
    for g in range(G):
        lane = tl.minimum(tl.arange(0, ROWS) * G + g, BM - 1)  # rows beyond the tile's repeat a lane and are not stored
        total += tl.gather(b_lanes, tl.broadcast_to(lane[:, None], [ROWS, FG]), axis=0)
    return total
