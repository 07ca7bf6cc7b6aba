# mypy: disable-error-code="no-untyped-def"
"""Triton: the mass of frames from a known lse: no value product, and no key that is in no frame.

Shapes, pointers and tiles are named as in ``triton_device``; FG: frames of a program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from appo_kernels.attention.triton_block_mask import KeyPlan
from appo_kernels.attention.triton_device import load_bounds, load_lse, load_rows, packed_rows, probabilities, sum_heads
from appo_kernels.dtypes import LOG2_E
from appo_kernels.triton_launch import Tiling, multiprocessors, on_its_device, padded_head_dim

# Frames of a program, and of one where a program per key/value head is not enough to fill the GPU.
FRAMES, FRAMES_SPLIT = 16, 4


@triton.jit
def all_seen(p_tiles, p_order, tile_start, tile_stop, first, last, prefix, valid):
    """Whether every row sees every key of these tiles, none of them mixed: positions ascend in a tile."""
    least, most = 0x7FFFFFFF, -1
    for block in range(tile_start, tile_stop, 128):
        tile = block + tl.arange(0, 128)
        inside = tile < tile_stop
        start = tl.load(p_tiles + tile * 4, mask=inside, other=0)
        length = tl.load(p_tiles + tile * 4 + 1, mask=inside, other=1)
        least = tl.minimum(least, tl.min(tl.load(p_order + start, mask=inside, other=0x7FFFFFFF), 0))
        most = tl.maximum(most, tl.max(tl.load(p_order + start + length - 1, mask=inside, other=-1), 0))
    most_first = tl.max(tl.where(valid, first, -0x7FFFFFFF), 0)
    least_last = tl.min(tl.where(valid, last, 0x7FFFFFFF), 0)
    least_prefix = tl.min(tl.where(valid, prefix, 0x7FFFFFFF), 0)
    return ((most_first <= least) & (least_last >= most)) | (least_prefix > most)


@triton.jit(
    do_not_specialize=["R", "S", "T", "F", "stride_ob", "stride_oh", "stride_or"],
    do_not_specialize_on_alignment=["stride_of"],
)
def mass_from_lse_kernel(
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
    is the same, as for any FG, and ``fma`` is written out because compilers may fuse or not. LARGE: take the frames
    that have tiles of their own, besides the small ones. scale includes log2(e).
    """
    row_tile, frame_group = tl.program_id(0), tl.program_id(1)
    if SPLIT:
        sequence, head_start = tl.program_id(2) // HKV, tl.program_id(2) % HKV
        head_stop = head_start + 1
    else:
        sequence, head_start, head_stop = tl.program_id(2), 0, HKV
    b64 = sequence.to(tl.int64)
    row, head_in_group, valid = packed_rows(row_tile, R, G, BM)  # (BM,) each
    first, last, prefix = row, row, row
    if BOUNDS:
        first, last, prefix = load_bounds(p_bounds, sequence, row, valid, R)
    p_order += b64 * S
    p_frames += b64 * S
    p_tiles += b64 * T * 4
    first_frame = frame_group * FG
    last_frame = tl.minimum(first_frame + FG, F)
    tile_start = tl.load(p_frame_tiles + b64 * (F + 2) + first_frame)
    tile_stop = tl.load(p_frame_tiles + b64 * (F + 2) + last_frame)
    small_start = tl.load(p_small + b64 * (F + 1) + first_frame)
    small_stop = tl.load(p_small + b64 * (F + 1) + last_frame)
    # Tiles of small frames are cut from the first of all, so that a frame's bits do not depend on FG.
    small_begin = tl.load(p_small + b64 * (F + 1))
    small_end = tl.load(p_small + b64 * (F + 1) + F)
    small_begin += (small_start - small_begin) // BN * BN
    if small_start == small_stop:
        small_begin = small_stop
    if not LARGE:
        tile_stop = tile_start
        if small_start == small_stop:
            return
    masked_start = tile_stop
    if BOUNDS and LARGE:
        unmasked = all_seen(p_tiles, p_order, tile_start, tile_stop, first, last, prefix, valid)
        masked_start = tl.where(unmasked, tile_stop, tile_start)
    column = tl.arange(0, FG)
    frame_exists = first_frame + column < F
    weight = tl.full([FG], 1.0, tl.float32)
    if WEIGHTED and not SPLIT:
        weight = tl.load(p_weights + b64 * F + first_frame + column, mask=frame_exists, other=0.0)
    p_out += b64 * stride_ob + (first_frame + column).to(tl.int64)[None, :] * stride_of
    total = tl.zeros([ROWS, FG], tl.float32)
    for kv_head in range(head_start, head_stop):
        head = kv_head * G + head_in_group
        b_query = load_rows(p_query + b64 * stride_qb, stride_qh, stride_qr, row, head, valid, D, DP)  # (BM, DP)
        lse = load_lse(p_lse + b64 * HKV * G * R, head, row, valid, R)  # (BM,)
        p_head_key = p_key + b64 * stride_kb + tl.cast(kv_head, tl.int64) * stride_kh
        sums = tl.zeros([BM, FG], tl.float32)
        for tile in range(tile_start, masked_start):
            start = tl.load(p_tiles + tile * 4)
            length = tl.load(p_tiles + tile * 4 + 1)
            frame = tl.load(p_tiles + tile * 4 + 2)
            b_p = probabilities(
                b_query, p_head_key, stride_ks, p_order, start, length, lse, first, last, prefix, scale,
                D, DP, BN, False,
            )  # fmt: skip
            sums += tl.where(column[None, :] == frame - first_frame, tl.sum(b_p, 1)[:, None], 0.0)
        if BOUNDS:
            for tile in range(masked_start, tile_stop):
                start = tl.load(p_tiles + tile * 4)
                length = tl.load(p_tiles + tile * 4 + 1)
                frame = tl.load(p_tiles + tile * 4 + 2)
                b_p = probabilities(
                    b_query, p_head_key, stride_ks, p_order, start, length, lse, first, last, prefix, scale,
                    D, DP, BN, BOUNDS,
                )  # fmt: skip
                sums += tl.where(column[None, :] == frame - first_frame, tl.sum(b_p, 1)[:, None], 0.0)
        for start in range(small_begin, small_stop, BN):
            length = tl.minimum(small_end - start, BN)
            b_p = probabilities(
                b_query, p_head_key, stride_ks, p_order, start, length, lse, first, last, prefix, scale,
                D, DP, BN, BOUNDS,
            )  # fmt: skip
            n = tl.arange(0, BN)
            b_frame = tl.load(p_frames + start + n, mask=n < length, other=-1)  # (BN,)
            lowest = tl.maximum(tl.load(p_frames + start), first_frame)
            highest = tl.minimum(tl.load(p_frames + start + length - 1), last_frame - 1)
            for frame in range(lowest, highest + 1):
                part = tl.sum(tl.where(b_frame[None, :] == frame, b_p, 0.0), 1)  # (BM,)
                sums += tl.where(column[None, :] == frame - first_frame, part[:, None], 0.0)
        if PER_HEAD:
            p = p_out + head.to(tl.int64)[:, None] * stride_oh + row.to(tl.int64)[:, None] * stride_or
            inside = valid[:, None] & frame_exists[None, :]
            tl.store(p, tl.fma(sums, factor * weight[None, :], tl.load(p, mask=inside, other=0.0)), mask=inside)
        else:
            total += sum_heads(sums, G, BM, ROWS, FG)  # (ROWS, FG)
    if not PER_HEAD:
        r = row_tile * (BM // G) + tl.arange(0, ROWS)
        inside = ((tl.arange(0, ROWS) < BM // G) & (r < R))[:, None] & frame_exists[None, :]
        p = p_out + r.to(tl.int64)[:, None] * stride_or
        if SPLIT:
            tl.store(p + head_start * stride_oh, total, mask=inside)
        else:
            tl.store(p, tl.fma(total, factor * weight[None, :], tl.load(p, mask=inside, other=0.0)), mask=inside)


@triton.jit(do_not_specialize=["R", "F", "stride_b", "stride_r"], do_not_specialize_on_alignment=["stride_f"])
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
    offset = r.to(tl.int64)[:, None] * F + f[None, :]  # (BR, BF)
    total = tl.zeros([BR, BF], tl.float32)
    for plane in range(planes):
        total += tl.load(p_sums + (sequence * planes + plane) * R * F + offset, mask=inside, other=0.0)
    weight = tl.full([BF], 1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(p_weights + sequence * F + f, mask=f < F, other=0.0)
    p = p_mass + sequence * stride_b + r.to(tl.int64)[:, None] * stride_r + f.to(tl.int64)[None, :] * stride_f
    tl.store(p, tl.fma(total, factor * weight[None, :], tl.load(p, mask=inside, other=0.0)), mask=inside)


@on_its_device
def mass_from_lse(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    plan: KeyPlan,
    frame_weights: Tensor | None,
    scale: float,
    mass: Tensor,
    per_head: bool,
    choice: Tiling,
    *,
    large: bool = True,
    split: bool | None = None,
) -> None:
    """Adds the mass of frames to ``mass`` (B, H, R, F), any strides; H = Hq when ``per_head``, else 1.

    plan: of tiles of ``choice.keys`` keys. large: False leaves out the frames that have tiles of their own. split: one
    program per key/value head and fewer frames; None: where there are too few programs for the GPU otherwise.
    """
    (B, Hq, R, D), (HKV, S) = query.shape, key.shape[1:3]
    F, T, G = mass.shape[3], plan.tiles.shape[1], Hq // HKV
    row_tiles = triton.cdiv(R, choice.rows // G)
    if split is None:
        split = row_tiles * triton.cdiv(F, FRAMES) * B < 2 * multiprocessors(query.device)
    split = split and not per_head
    frames = FRAMES_SPLIT if split else FRAMES
    frame_groups = triton.cdiv(F, frames)
    out = torch.zeros(B, HKV, R, F, dtype=torch.float32, device=query.device) if split else mass
    weighted, factor = frame_weights is not None, 1.0 if per_head else 1.0 / Hq
    weights = lse if frame_weights is None else frame_weights
    mass_from_lse_kernel[(row_tiles, frame_groups, B * HKV if split else B)](
        query, key, lse.contiguous(), plan.order, plan.frames, plan.tiles, plan.frame_tiles, plan.small,
        plan.order if plan.bounds is None else plan.bounds, weights, out,
        *query.stride()[:3], *key.stride()[:3], *out.stride(), HKV, R, S, T, F, scale * LOG2_E, factor,
        G=G, D=D, DP=padded_head_dim(D), BM=choice.rows, BN=choice.keys, FG=frames,
        BOUNDS=plan.bounds is not None, WEIGHTED=weighted, LARGE=large, PER_HEAD=per_head, SPLIT=split,
        ROWS=triton.next_power_of_2(choice.rows // G), **choice.options,
    )  # fmt: skip
    if split:
        accumulate_kernel[(triton.cdiv(R, 32), triton.cdiv(F, 32), B)](
            out, weights, mass, mass.stride(0), mass.stride(2), mass.stride(3), factor, R, F, HKV,
            WEIGHTED=weighted, BR=32, BF=32, num_warps=4,
        )  # fmt: skip
