# mypy: disable-error-code="no-untyped-def"
"""Triton: the mass of frames from a known lse, and what rows and tiles look like to all attention kernels.

A tile of ``BM`` rows packs (row, query head) pairs that share a key/value head, so that a tile of keys is loaded once
for all of them: lane m is row m // G of the tile and query head m % G of the group, G any number.

Shapes: B sequences, R rows, S keys, F frames, T key tiles, N row tiles. Pointers ``p_``, tiles in registers ``b_``.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from appo_kernels.tile_plan import KeyPlan
from appo_kernels.triton_launch import Tiling, multiprocessors, on_its_device, padded_head_dim

FRAMES_PER_PROGRAM = 16


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
def load_keys(p, stride, position, inside, D: tl.constexpr, DP: tl.constexpr, WHOLE: tl.constexpr):
    """(BN, DP) rows of a (S, D) array at ``position``; WHOLE: all of them are ``inside``."""
    d = tl.arange(0, DP)
    pointers = p + position.to(tl.int64)[:, None] * stride + d[None, :]
    if WHOLE and D == DP:
        return tl.load(pointers)
    elif D == DP:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    elif WHOLE:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(pointers, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_lse(p_lse, head, row, valid, R):
    """Base-2 lse of each lane, +inf for rows that see no key (their lse is -inf or +inf) or do not exist."""
    lse = tl.load(p_lse + head.to(tl.int64) * R + row, mask=valid, other=float("inf")) * 1.4426950408889634
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def probabilities(
    b_query, p_key, stride_key, p_order, start, length, lse, first, last, prefix, scale,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, BOUNDS: tl.constexpr,
):  # fmt: skip
    """(BM, BN) probabilities of the ``length`` keys from ``start`` in the plan's order; 0 where a key is not seen."""
    n = tl.arange(0, BN)
    inside = n < length
    position = tl.load(p_order + start + n, mask=inside, other=0)
    b_key = load_keys(p_key, stride_key, position, inside, D, DP, False)
    b_score = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")
    seen = visible(position[None, :], first[:, None], last[:, None], prefix[:, None], BOUNDS) & inside[None, :]
    return tl.where(seen, tl.exp2(b_score * scale - lse[:, None]), 0.0)


@triton.jit
def sum_heads(b_lanes, G: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr, FG: tl.constexpr):
    """(BM, FG) values of lanes -> (ROWS, FG) sums over the G heads of each row, in the order of the heads."""
    total = tl.zeros([ROWS, FG], tl.float32)
    for g in range(G):
        lane = tl.minimum(tl.arange(0, ROWS) * G + g, BM - 1)  # rows beyond the tile's repeat a lane and are not stored
        total += tl.gather(b_lanes, tl.broadcast_to(lane[:, None], [ROWS, FG]), axis=0)
    return total


@triton.jit(do_not_specialize=["R", "S", "T", "F"])
def replay_kernel(
    p_query, p_key, p_lse, p_order, p_frames, p_tiles, p_frame_tiles, p_small, p_bounds, p_weights, p_out,
    stride_qb, stride_qh, stride_qr, stride_kb, stride_kh, stride_ks, stride_ob, stride_oh, stride_or, stride_of,
    HKV, R, S, T, F, scale, factor,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FG: tl.constexpr,
    BOUNDS: tl.constexpr, WEIGHTED: tl.constexpr, LARGE: tl.constexpr, PER_HEAD: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Adds factor * weight[b, f] * (sum over the keys of f) of FG frames for a tile of rows to p_out, any strides.

    p_out: (B, 1, R, F), the sum over all heads in order; with PER_HEAD (B, Hq, R, F). With SPLIT (B, HKV, R, F) buffers
    for ``accumulate_kernel``, one program per key/value head, so that few rows still fill a GPU: the order of the sums
    is the same. LARGE: take the frames that have tiles of their own, besides the small ones. scale includes log2(e).
    """
    row_tile, group = tl.program_id(0), tl.program_id(1)
    if SPLIT:
        sequence, head_start = tl.program_id(2) // HKV, tl.program_id(2) % HKV
        head_stop = head_start + 1
    else:
        sequence, head_start, head_stop = tl.program_id(2), 0, HKV
    b64 = sequence.to(tl.int64)
    row, head_in_group, valid = packed_rows(row_tile, R, G, BM)
    first, last, prefix = row, row, row
    if BOUNDS:
        first, last, prefix = load_bounds(p_bounds, sequence, row, valid, R)
    p_order += b64 * S
    p_frames += b64 * S
    p_tiles += b64 * T * 4
    first_frame = group * FG
    last_frame = tl.minimum(first_frame + FG, F)
    tile_start = tl.load(p_frame_tiles + b64 * (F + 2) + first_frame)
    tile_stop = tl.load(p_frame_tiles + b64 * (F + 2) + last_frame)
    small_start = tl.load(p_small + b64 * (F + 1) + first_frame)
    small_stop = tl.load(p_small + b64 * (F + 1) + last_frame)
    if not LARGE:
        tile_stop = tile_start
        if small_start == small_stop:
            return

    column = tl.arange(0, FG)
    frame_exists = first_frame + column < F
    weight = tl.full([FG], 1.0, tl.float32)
    if WEIGHTED and not SPLIT:
        weight = tl.load(p_weights + b64 * F + first_frame + column, mask=frame_exists, other=0.0)
    p_out += b64 * stride_ob + (first_frame + column).to(tl.int64)[None, :] * stride_of
    total = tl.zeros([ROWS, FG], tl.float32)
    for kv_head in range(head_start, head_stop):
        head = kv_head * G + head_in_group
        b_query = load_rows(p_query + b64 * stride_qb, stride_qh, stride_qr, row, head, valid, D, DP)
        lse = load_lse(p_lse + b64 * HKV * G * R, head, row, valid, R)
        p_head_key = p_key + b64 * stride_kb + tl.cast(kv_head, tl.int64) * stride_kh
        sums = tl.zeros([BM, FG], tl.float32)
        for tile in range(tile_start, tile_stop):
            start = tl.load(p_tiles + tile * 4)
            length = tl.load(p_tiles + tile * 4 + 1)
            frame = tl.load(p_tiles + tile * 4 + 2)
            b_p = probabilities(
                b_query, p_head_key, stride_ks, p_order, start, length, lse, first, last, prefix, scale,
                D, DP, BN, BOUNDS,
            )  # fmt: skip
            sums += tl.where(column[None, :] == frame - first_frame, tl.sum(b_p, 1)[:, None], 0.0)
        for start in range(small_start, small_stop, BN):
            length = tl.minimum(small_stop - start, BN)
            b_p = probabilities(
                b_query, p_head_key, stride_ks, p_order, start, length, lse, first, last, prefix, scale,
                D, DP, BN, BOUNDS,
            )  # fmt: skip
            n = tl.arange(0, BN)
            b_frame = tl.load(p_frames + start + n, mask=n < length, other=-1)
            lowest = tl.load(p_frames + start)
            highest = tl.load(p_frames + start + length - 1)
            for frame in range(lowest, highest + 1):
                part = tl.sum(tl.where(b_frame[None, :] == frame, b_p, 0.0), 1)
                sums += tl.where(column[None, :] == frame - first_frame, part[:, None], 0.0)
        if PER_HEAD:
            p = p_out + head.to(tl.int64)[:, None] * stride_oh + row.to(tl.int64)[:, None] * stride_or
            inside = valid[:, None] & frame_exists[None, :]
            tl.store(p, tl.load(p, mask=inside, other=0.0) + sums * factor * weight[None, :], mask=inside)
        else:
            total += sum_heads(sums, G, BM, ROWS, FG)
    if not PER_HEAD:
        r = row_tile * (BM // G) + tl.arange(0, ROWS)
        inside = ((tl.arange(0, ROWS) < BM // G) & (r < R))[:, None] & frame_exists[None, :]
        p = p_out + r.to(tl.int64)[:, None] * stride_or
        if SPLIT:
            tl.store(p + head_start * stride_oh, total, mask=inside)
        else:
            tl.store(p, tl.load(p, mask=inside, other=0.0) + total * factor * weight[None, :], mask=inside)


@triton.jit(do_not_specialize=["R", "F"])
def accumulate_kernel(
    p_sums, p_weights, p_mass, stride_b, stride_r, stride_f, factor, R, F, planes,
    WEIGHTED: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """mass[b, r, f] += factor * weight[b, f] * sum over planes of sums[b, plane, r, f], planes in order.

    One program per (rows, frames, b). p_weights (B, F); p_sums contiguous; p_mass any strides.
    """
    sequence = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    inside = (r < R)[:, None] & (f < F)[None, :]
    offset = r.to(tl.int64)[:, None] * F + f[None, :]
    total = tl.zeros([BR, BF], tl.float32)
    for plane in range(planes):
        total += tl.load(p_sums + (sequence * planes + plane) * R * F + offset, mask=inside, other=0.0)
    total *= factor
    if WEIGHTED:
        total *= tl.load(p_weights + sequence * F + f, mask=f < F, other=0.0)[None, :]
    p = p_mass + sequence * stride_b + r.to(tl.int64)[:, None] * stride_r + f.to(tl.int64)[None, :] * stride_f
    tl.store(p, tl.load(p, mask=inside, other=0.0) + total, mask=inside)


@on_its_device
def replay(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    plan: KeyPlan,
    bounds: Tensor | None,
    frame_weights: Tensor | None,
    scale: float,
    mass: Tensor,
    choice: Tiling,
    *,
    large: bool = True,
    split: bool | None = None,
) -> None:
    """Adds the mass of frames to ``mass`` (B, 1 or Hq, R, F), any strides.

    plan: of tiles of ``choice.keys`` keys. large: False leaves out the frames that have tiles of their own. split: one
    program per key/value head; None: where there are too few programs for the GPU otherwise.
    """
    (B, Hq, R, D), (HKV, S) = query.shape, key.shape[1:3]
    F, T, G, per_head = mass.shape[3], plan.tiles.shape[1], Hq // HKV, mass.shape[1] != 1 or Hq == 1
    row_tiles, groups = triton.cdiv(R, choice.rows // G), triton.cdiv(F, FRAMES_PER_PROGRAM)
    if split is None:
        split = row_tiles * groups * B < 2 * multiprocessors(query.device)
    split = split and not per_head and HKV > 1
    out = torch.zeros(B, HKV, R, F, dtype=torch.float32, device=query.device) if split else mass
    weighted, factor = frame_weights is not None, 1.0 if per_head else 1.0 / Hq
    weights = lse if frame_weights is None else frame_weights
    replay_kernel[(row_tiles, groups, B * HKV if split else B)](
        query, key, lse.contiguous(), plan.order, plan.frames, plan.tiles, plan.frame_tiles, plan.small,
        plan.order if bounds is None else bounds, weights, out,
        *query.stride()[:3], *key.stride()[:3], *out.stride(), HKV, R, S, T, F, scale * math.log2(math.e), factor,
        G=G, D=D, DP=padded_head_dim(D), BM=choice.rows, BN=choice.keys, FG=FRAMES_PER_PROGRAM,
        BOUNDS=bounds is not None, WEIGHTED=weighted, LARGE=large, PER_HEAD=per_head, SPLIT=split,
        ROWS=triton.next_power_of_2(choice.rows // G), num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip
    if split:
        accumulate_kernel[(triton.cdiv(R, 32), triton.cdiv(F, 32), B)](
            out, weights, mass, mass.stride(0), mass.stride(2), mass.stride(3), factor, R, F, HKV,
            WEIGHTED=weighted, BR=32, BF=32, num_warps=4,
        )  # fmt: skip
