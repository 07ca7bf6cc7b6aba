# mypy: disable-error-code="no-untyped-def"
"""Triton: gradients of attention and of the frame mass, from the lse. No atomics: dq by rows, dk and dv by keys.

    dP = dO V^T + g,  dS = P (dP - delta),  dq = scale dS K,  dk = scale dS^T Q,  dv = P^T dO

g[row, key] is the gradient of the mass of the key's frame (times weight and 1 / heads), 0 on keys of no frame. In a
tile of one frame it is one number per row, which is taken off delta once per tile; tiles of small frames gather it.

Shapes, pointers and tiles are named as in ``triton_device``.
"""

import triton
import triton.language as tl

from appo_kernels.attention.triton_delta import UPSTREAM_STRIDES, frame_gradient, frame_gradients
from appo_kernels.attention.triton_device import (
    TO_BASE_E,
    load_bounds,
    load_keys,
    load_lse,
    load_rows,
    packed_rows,
    visible,
)


@triton.jit
def score_gradient(
    b_rows, b_keys, b_grads, b_values, lse, delta, g, seen, scale,
    VALUE: tl.constexpr, PARTIAL: tl.constexpr, GATHERED: tl.constexpr,
):  # fmt: skip
    """P and dS of a tile, (BM, BN) from rows and keys as they are called, or (BN, BM) with keys in the place of rows.

    b_rows, b_grads (BM, DP); b_keys, b_values (BN, DP); lse, delta (BM, 1). With keys in the place of rows (BN, DP),
    (BM, DP), (1, BM). g: of every element where GATHERED, else already taken off delta.
    """
    b_p = tl.exp2(tl.dot(b_rows, tl.trans(b_keys), input_precision="ieee") * scale - lse)
    if PARTIAL:
        b_p = tl.where(seen, b_p, 0.0)
    b_dp = tl.zeros_like(b_p) - delta
    if VALUE:
        b_dp += tl.dot(b_grads, tl.trans(b_values), input_precision="ieee")
    if GATHERED:
        b_dp += g
    return b_p, b_p * b_dp


@triton.jit
def query_step(
    b_query, b_grad, p_key, p_value, stride_ks, stride_vs, p_order, p_frames, p_tiles, tile, p_grad_mass, p_weights,
    row_offset, stride_mf, F, factor, lse, delta, first, last, prefix, valid, scale, b_dq,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PARTIAL: tl.constexpr, BOUNDS: tl.constexpr,
    VALUE: tl.constexpr, MASS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Adds one tile of keys to b_dq (BM, DP). Of a tile that is not PARTIAL every row sees every key, all of one frame.

    b_query, b_grad (BM, DP); lse, delta, bounds and ``row_offset`` (BM,).
    """
    n = tl.arange(0, BN)
    start = tl.load(p_tiles + tile * 4)
    length = tl.load(p_tiles + tile * 4 + 1)
    inside = n < length
    position = tl.load(p_order + start + n, mask=inside, other=0)
    g, seen = 0.0, inside[None, :]
    if PARTIAL:
        seen &= visible(position[None, :], first[:, None], last[:, None], prefix[:, None], BOUNDS)
    if MASS:
        if PARTIAL:
            g = frame_gradients(
                p_grad_mass, p_weights, p_frames, start, length, row_offset, valid, F, stride_mf, factor,
                WEIGHTED, BM, BN,
            )  # fmt: skip
        else:
            frame = tl.load(p_tiles + tile * 4 + 2)
            delta = delta - frame_gradient(
                p_grad_mass, p_weights, row_offset, frame, valid, F, stride_mf, factor, WEIGHTED
            )
    b_key = load_keys(p_key, stride_ks, position, inside, D, DP, False)  # (BN, DP)
    b_value = b_key
    if VALUE:
        b_value = load_keys(p_value, stride_vs, position, inside, D, DP, False)
    _, b_ds = score_gradient(
        b_query, b_key, b_grad, b_value, lse[:, None], delta[:, None], g, seen, scale, VALUE, True, MASS and PARTIAL
    )  # fmt: skip
    return tl.dot(b_ds.to(b_key.dtype), b_key, b_dq, input_precision="ieee")


@triton.jit(
    do_not_specialize=["R", "S", "T", "N", "F", *UPSTREAM_STRIDES], do_not_specialize_on_alignment=["stride_mf"]
)
def query_kernel(
    p_query, p_key, p_value, p_grad_out, p_grad_mass, p_weights, p_lse, p_delta, p_grad_query,
    p_order, p_frames, p_tiles, p_kv_indices, p_num_blocks, p_bounds,
    stride_qb, stride_qh, stride_qr, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gr, stride_mb, stride_mh, stride_mr, stride_mf,
    HKV, R, S, T, N, F, scale, factor,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BOUNDS: tl.constexpr,
    VALUE: tl.constexpr, MASS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """dq / scale of one row tile and key/value head; dq is contiguous. scale includes log2(e)."""
    row_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, kv_head = tl.program_id(1) // HKV, tl.program_id(1) % HKV
    b64, h64 = sequence.to(tl.int64), tl.cast(kv_head, tl.int64)
    row, head_in_group, valid = packed_rows(row_tile, R, G, BM)  # (BM,) each
    head = kv_head * G + head_in_group
    flat = (b64 * HKV * G + head) * R + row
    b_query = load_rows(p_query + b64 * stride_qb, stride_qh, stride_qr, row, head, valid, D, DP)  # (BM, DP)
    b_grad = b_query
    if VALUE:
        b_grad = load_rows(p_grad_out + b64 * stride_gb, stride_gh, stride_gr, row, head, valid, D, DP)
    lse = load_lse(p_lse + b64 * HKV * G * R, head, row, valid, R)  # (BM,)
    delta = tl.load(p_delta + flat, mask=valid, other=0.0)  # (BM,)
    first, last, prefix = row, row, row
    if BOUNDS:
        first, last, prefix = load_bounds(p_bounds, sequence, row, valid, R)
    p_order += b64 * S
    p_frames += b64 * S
    p_tiles += b64 * T * 4
    p_key += b64 * stride_kb + h64 * stride_kh
    p_value += b64 * stride_vb + h64 * stride_vh
    p_grad_mass += b64 * stride_mb
    p_weights += b64 * F
    row_offset = head.to(tl.int64) * stride_mh + row.to(tl.int64) * stride_mr
    block_row = b64 * N + row_tile
    p_kv_indices += block_row * T
    unmasked, num_blocks = tl.load(p_num_blocks + block_row * 3 + 1), tl.load(p_num_blocks + block_row * 3 + 2)

    b_dq = tl.zeros([BM, DP], tl.float32)
    for i in range(unmasked):
        b_dq = query_step(
            b_query, b_grad, p_key, p_value, stride_ks, stride_vs, p_order, p_frames, p_tiles,
            tl.load(p_kv_indices + i), p_grad_mass, p_weights, row_offset, stride_mf, F, factor, lse, delta,
            first, last, prefix, valid, scale, b_dq, D, DP, BM, BN, False, BOUNDS, VALUE, MASS, WEIGHTED,
        )  # fmt: skip
    for i in range(unmasked, num_blocks):
        b_dq = query_step(
            b_query, b_grad, p_key, p_value, stride_ks, stride_vs, p_order, p_frames, p_tiles,
            tl.load(p_kv_indices + i), p_grad_mass, p_weights, row_offset, stride_mf, F, factor, lse, delta,
            first, last, prefix, valid, scale, b_dq, D, DP, BM, BN, True, BOUNDS, VALUE, MASS, WEIGHTED,
        )  # fmt: skip
    d = tl.arange(0, DP)
    b_dq = b_dq * (scale * TO_BASE_E)
    tl.store(
        p_grad_query + flat[:, None] * D + d[None, :],
        b_dq.to(p_grad_query.dtype.element_ty),
        mask=valid[:, None] & (d < D)[None, :],
    )


@triton.jit
def key_step(
    b_key, b_value, p_query, p_grad_out, p_grad_mass, p_weights, p_lse, p_delta, p_bounds, row_tile, sequence, kv_head,
    stride_qh, stride_qr, stride_gh, stride_gr, stride_mh, stride_mr, stride_mf, HKV, R, F, factor,
    position, inside, frame, p_frames, start, length, scale, b_dk, b_dv,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PARTIAL: tl.constexpr,
    BOUNDS: tl.constexpr, VALUE: tl.constexpr, MASS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Adds one tile of rows, all heads of the group in it, to b_dk, which is dk / scale, and b_dv, (BN, DP) each.

    b_key, b_value (BN, DP); position, inside (BN,).
    """
    row, head_in_group, valid = packed_rows(row_tile, R, G, BM)  # (BM,) each
    head = kv_head * G + head_in_group
    b_query = load_rows(p_query, stride_qh, stride_qr, row, head, valid, D, DP)  # (BM, DP)
    b_grad = b_query
    if VALUE:
        b_grad = load_rows(p_grad_out, stride_gh, stride_gr, row, head, valid, D, DP)
    lse = load_lse(p_lse, head, row, valid, R)  # (BM,)
    delta = tl.load(p_delta + head.to(tl.int64) * R + row, mask=valid, other=0.0)
    row_offset = head.to(tl.int64) * stride_mh + row.to(tl.int64) * stride_mr
    g, seen = 0.0, True
    if PARTIAL:
        first, last, prefix = row, row, row
        if BOUNDS:
            first, last, prefix = load_bounds(p_bounds, sequence, row, valid, R)
        seen = inside[:, None] & visible(position[:, None], first[None, :], last[None, :], prefix[None, :], BOUNDS)
    if MASS:
        if PARTIAL:
            g = tl.trans(
                frame_gradients(
                    p_grad_mass, p_weights, p_frames, start, length, row_offset, valid, F, stride_mf, factor,
                    WEIGHTED, BM, BN,
                )
            )  # fmt: skip
        else:
            delta = delta - frame_gradient(
                p_grad_mass, p_weights, row_offset, frame, valid, F, stride_mf, factor, WEIGHTED
            )
    b_p, b_ds = score_gradient(
        b_key, b_query, b_value, b_grad, lse[None, :], delta[None, :], g, seen, scale, VALUE, PARTIAL, MASS and PARTIAL
    )  # fmt: skip
    if VALUE:
        b_dv = tl.dot(b_p.to(b_grad.dtype), b_grad, b_dv, input_precision="ieee")
    b_dk = tl.dot(b_ds.to(b_query.dtype), b_query, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit(
    do_not_specialize=["R", "S", "T", "N", "F", *UPSTREAM_STRIDES], do_not_specialize_on_alignment=["stride_mf"]
)
def key_kernel(
    p_query, p_key, p_value, p_grad_out, p_grad_mass, p_weights, p_lse, p_delta, p_grad_key, p_grad_value,
    p_order, p_frames, p_tiles, p_q_indices, p_num_blocks, p_bounds,
    stride_qb, stride_qh, stride_qr, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh, stride_gr, stride_mb, stride_mh, stride_mr, stride_mf,
    HKV, R, S, T, N, F, scale, factor,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BOUNDS: tl.constexpr,
    VALUE: tl.constexpr, MASS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys and key/value head: the heads of its group are rows of the same tiles.

    Both are contiguous; p_grad_value counts with VALUE only. Keys without a tile are not written.
    """
    tile = tl.program_id(0)
    sequence, kv_head = tl.program_id(1) // HKV, tl.program_id(1) % HKV
    b64, h64 = sequence.to(tl.int64), tl.cast(kv_head, tl.int64)
    p_tiles += (b64 * T + tile) * 4
    start = tl.load(p_tiles)
    length = tl.load(p_tiles + 1)
    frame = tl.load(p_tiles + 2)
    if length == 0:
        return
    n = tl.arange(0, BN)
    inside = n < length
    position = tl.load(p_order + b64 * S + start + n, mask=inside, other=0)
    p_frames += b64 * S
    b_key = load_keys(p_key + b64 * stride_kb + h64 * stride_kh, stride_ks, position, inside, D, DP, False)  # (BN, DP)
    b_value = b_key
    if VALUE:
        b_value = load_keys(p_value + b64 * stride_vb + h64 * stride_vh, stride_vs, position, inside, D, DP, False)
    p_query += b64 * stride_qb
    p_grad_out += b64 * stride_gb
    p_grad_mass += b64 * stride_mb
    p_weights += b64 * F
    p_lse += b64 * HKV * G * R
    p_delta += b64 * HKV * G * R
    block_row = b64 * T + tile
    p_q_indices += block_row * N
    unmasked, num_blocks = tl.load(p_num_blocks + block_row * 2), tl.load(p_num_blocks + block_row * 2 + 1)

    b_dk = tl.zeros([BN, DP], tl.float32)
    b_dv = tl.zeros([BN, DP], tl.float32)
    for i in range(unmasked):
        b_dk, b_dv = key_step(
            b_key, b_value, p_query, p_grad_out, p_grad_mass, p_weights, p_lse, p_delta, p_bounds,
            tl.load(p_q_indices + i), sequence, kv_head, stride_qh, stride_qr, stride_gh, stride_gr, stride_mh,
            stride_mr, stride_mf, HKV, R, F, factor, position, inside, frame, p_frames, start, length, scale,
            b_dk, b_dv, G, D, DP, BM, BN, False, BOUNDS, VALUE, MASS, WEIGHTED,
        )  # fmt: skip
    for i in range(unmasked, num_blocks):
        b_dk, b_dv = key_step(
            b_key, b_value, p_query, p_grad_out, p_grad_mass, p_weights, p_lse, p_delta, p_bounds,
            tl.load(p_q_indices + i), sequence, kv_head, stride_qh, stride_qr, stride_gh, stride_gr, stride_mh,
            stride_mr, stride_mf, HKV, R, F, factor, position, inside, frame, p_frames, start, length, scale,
            b_dk, b_dv, G, D, DP, BM, BN, True, BOUNDS, VALUE, MASS, WEIGHTED,
        )  # fmt: skip
    d = tl.arange(0, DP)
    target = ((b64 * HKV + h64) * S + position)[:, None] * D + d[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    b_dk = b_dk * (scale * TO_BASE_E)
    tl.store(p_grad_key + target, b_dk.to(p_grad_key.dtype.element_ty), mask=mask)
    if VALUE:
        tl.store(p_grad_value + target, b_dv.to(p_grad_value.dtype.element_ty), mask=mask)
