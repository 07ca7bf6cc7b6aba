# mypy: disable-error-code="no-untyped-def"
"""Triton: delta of each row, which the gradients of scores subtract, and the gradient of the mass on keys.

Before the kernels of ``triton_backward``, where the equations stand. Shapes, pointers and tiles are named as in
``triton_device``.
"""

import triton
import triton.language as tl

from appo_kernels.attention.triton_device import load_bounds, load_lse, load_rows, packed_rows, probabilities

# Strides of the gradient of the mass follow from the numbers of rows and frames, which compile no other kernel.
UPSTREAM_STRIDES = ("stride_mb", "stride_mh", "stride_mr")


@triton.jit
def frame_gradient(p_grad, p_weights, row_offset, frame, valid, F, stride_f, factor, WEIGHTED: tl.constexpr):
    """g of rows at ``row_offset`` on ``frame``, (BM,); 0 for frame F, the keys of no frame."""
    g = tl.load(p_grad + row_offset + tl.cast(frame, tl.int64) * stride_f, mask=valid & (frame < F), other=0.0) * factor
    if WEIGHTED:
        g *= tl.load(p_weights + frame, mask=frame < F, other=0.0)
    return g


@triton.jit
def frame_gradients(
    p_grad, p_weights, p_frames, start, length, row_offset, valid, F, stride_f, factor,
    WEIGHTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """g of rows on the ``length`` keys from ``start`` in the plan's order, whatever their frames, (BM, BN)."""
    n = tl.arange(0, BN)
    b_frame = tl.load(p_frames + start + n, mask=n < length, other=-1)  # (BN,)
    g = tl.zeros([BM, BN], tl.float32)  # of tiles of small frames
    for frame in range(tl.load(p_frames + start), tl.load(p_frames + start + length - 1) + 1):
        g_row = frame_gradient(p_grad, p_weights, row_offset, frame, valid, F, stride_f, factor, WEIGHTED)
        g = tl.where(b_frame[None, :] == frame, g_row[:, None], g)
    return g


@triton.jit(
    do_not_specialize=["R", "S", "T", "F", *UPSTREAM_STRIDES, "stride_lb", "stride_lh"],
    do_not_specialize_on_alignment=["stride_mf", "stride_lr"],
)
def delta_kernel(
    p_query, p_key, p_lse, p_out, p_grad_out, p_grad_lse, p_grad_mass, p_weights,
    p_order, p_frames, p_tiles, p_frame_tiles, p_small, p_bounds, p_delta,
    stride_qb, stride_qh, stride_qr, stride_kb, stride_kh, stride_ks,
    stride_gb, stride_gh, stride_gr, stride_lb, stride_lh, stride_lr, stride_mb, stride_mh, stride_mr, stride_mf,
    HKV, R, S, T, F, scale, factor,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BOUNDS: tl.constexpr,
    OUT: tl.constexpr, LSE: tl.constexpr, MASS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """delta (B, Hq, R) = dO . O - dlse + sum over frames of g M_h, each term where its flag is set.

    The last is the mass of head h alone, replayed here; out is contiguous, the gradients have any strides.
    """
    row_tile = tl.program_id(0)
    sequence, kv_head = tl.program_id(1) // HKV, tl.program_id(1) % HKV
    b64 = sequence.to(tl.int64)
    row, head_in_group, valid = packed_rows(row_tile, R, G, BM)  # (BM,) each
    head = kv_head * G + head_in_group
    flat = (b64 * HKV * G + head) * R + row
    delta = tl.zeros([BM], tl.float32)
    if OUT:
        b_out = load_rows(p_out + b64 * HKV * G * R * D, tl.cast(R, tl.int64) * D, D, row, head, valid, D, DP)
        b_grad = load_rows(p_grad_out + b64 * stride_gb, stride_gh, stride_gr, row, head, valid, D, DP)
        delta += tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)
    if LSE:
        offset = b64 * stride_lb + head.to(tl.int64) * stride_lh + row.to(tl.int64) * stride_lr
        delta -= tl.load(p_grad_lse + offset, mask=valid, other=0.0)
    if MASS:
        first, last, prefix = row, row, row
        if BOUNDS:
            first, last, prefix = load_bounds(p_bounds, sequence, row, valid, R)
        p_order += b64 * S
        p_frames += b64 * S
        p_tiles += b64 * T * 4
        p_grad_mass += b64 * stride_mb
        p_weights += b64 * F
        b_query = load_rows(p_query + b64 * stride_qb, stride_qh, stride_qr, row, head, valid, D, DP)  # (BM, DP)
        lse = load_lse(p_lse + b64 * HKV * G * R, head, row, valid, R)  # (BM,)
        p_key += b64 * stride_kb + tl.cast(kv_head, tl.int64) * stride_kh
        row_offset = head.to(tl.int64) * stride_mh + row.to(tl.int64) * stride_mr
        for tile in range(tl.load(p_frame_tiles + b64 * (F + 2) + F)):
            start = tl.load(p_tiles + tile * 4)
            length = tl.load(p_tiles + tile * 4 + 1)
            frame = tl.load(p_tiles + tile * 4 + 2)
            b_p = probabilities(
                b_query, p_key, stride_ks, p_order, start, length, lse, first, last, prefix, scale, D, DP, BN, BOUNDS
            )  # fmt: skip
            g = frame_gradient(p_grad_mass, p_weights, row_offset, frame, valid, F, stride_mf, factor, WEIGHTED)
            delta += tl.sum(b_p, 1) * g  # g (BM,)
        small_stop = tl.load(p_small + b64 * (F + 1) + F)
        for start in range(tl.load(p_small + b64 * (F + 1)), small_stop, BN):
            length = tl.minimum(small_stop - start, BN)
            b_p = probabilities(
                b_query, p_key, stride_ks, p_order, start, length, lse, first, last, prefix, scale, D, DP, BN, BOUNDS
            )  # fmt: skip
            g = frame_gradients(
                p_grad_mass, p_weights, p_frames, start, length, row_offset, valid, F, stride_mf, factor,
                WEIGHTED, BM, BN,
            )  # fmt: skip
            delta += tl.sum(b_p * g, 1)  # g (BM, BN)
    tl.store(p_delta + flat, delta, mask=valid)
