# mypy: disable-error-code="no-untyped-def"
"""Triton: online softmax over the tiles of a key plan, with the mass of each frame as a by-product.

The row sum of a tile that holds keys of one frame only *is* that frame's contribution, relative to the running maximum
at that moment. The main loop stores both, and ``mass_from_tiles_kernel`` brings them to the final normaliser: no matrix
product, shuffle or exponential is added to the loop. The mass of small frames, which share tiles, is replayed from the
lse (``triton_mass``).

Shapes, pointers and tiles are named as in ``triton_device``.
"""

import triton
import triton.language as tl

from appo_kernels.attention.triton_device import (
    FULL_TILES,
    PARTIAL_TILES,
    SHORT_TILES,
    TO_BASE_2,
    TO_BASE_E,
    load_bounds,
    load_keys,
    load_rows,
    packed_rows,
    sum_heads,
    visible,
)


@triton.jit
def online_step(
    b_query, p_key, p_value, stride_ks, stride_vs, p_order, p_tiles, tile, p_tile_sum, p_tile_max,
    first, last, prefix, scale, b_out, row_sum, row_max,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    TILES: tl.constexpr, BOUNDS: tl.constexpr, VALUE: tl.constexpr, MASS: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    """Takes one tile of keys into b_out (BM, DP), row_sum and row_max (BM,), which is in base 2 and includes ``scale``.

    b_query (BM, DP); first, last, prefix (BM,); p_tile_sum, p_tile_max (T, BM) of this tile of rows.
    """
    n = tl.arange(0, BN)
    start = tl.load(p_tiles + tile * 4)
    if TILES == FULL_TILES:
        inside = n < BN
        position = tl.load(p_order + start + n)
    else:
        inside = n < tl.load(p_tiles + tile * 4 + 1)
        position = tl.load(p_order + start + n, mask=inside, other=0)
    b_key = load_keys(p_key, stride_ks, position, inside, D, DP, TILES == FULL_TILES)  # (BN, DP)
    b_score = tl.dot(b_query, tl.trans(b_key), input_precision="ieee")  # (BM, BN)
    if NEGATIVE:
        b_score = -b_score
    if TILES == SHORT_TILES:
        b_score = tl.where(inside[None, :], b_score, float("-inf"))
    if TILES == PARTIAL_TILES:
        seen = inside[None, :] & visible(position[None, :], first[:, None], last[:, None], prefix[:, None], BOUNDS)
        b_score = tl.where(seen, b_score, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(b_score, 1) * scale)  # (BM,)
    base = tl.where(new_max == float("-inf"), 0.0, new_max) if TILES == PARTIAL_TILES else new_max
    b_p = tl.exp2(b_score * scale - base[:, None])  # (BM, BN)
    tile_sum = tl.sum(b_p, 1)  # (BM,)
    decay = tl.exp2(row_max - base)
    row_sum = row_sum * decay + tile_sum
    if VALUE:
        b_value = load_keys(p_value, stride_vs, position, inside, D, DP, TILES == FULL_TILES)  # (BN, DP)
        b_out = tl.dot(b_p.to(b_value.dtype), b_value, b_out * decay[:, None], input_precision="ieee")
    if MASS:
        lane = tl.arange(0, BM)
        tl.store(p_tile_sum + tile * BM + lane, tile_sum)
        tl.store(p_tile_max + tile * BM + lane, new_max)
    return b_out, row_sum, new_max


@triton.jit(do_not_specialize=["R", "S", "T", "N", "first_row_tile"])
def online_kernel(
    p_query, p_key, p_value, p_out, p_lse, p_order, p_tiles, p_kv_indices, p_num_blocks, p_bounds, p_tile_sum,
    p_tile_max,
    stride_qb, stride_qh, stride_qr, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_or, HKV, R, S, T, N, first_row_tile, scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BOUNDS: tl.constexpr,
    VALUE: tl.constexpr, MASS: tl.constexpr, NEGATIVE: tl.constexpr, PARTIAL_STAGES: tl.constexpr,
):  # fmt: skip
    """out and lse of one row tile and key/value head; with MASS also the sum and running maximum of every tile.

    p_tile_sum, p_tile_max: (B HKV, row tiles of this launch, T, BM) fp32. The order in which a row sees tiles is the
    plan's, whatever rows share its tile. scale is positive and includes log2(e); NEGATIVE: its sign.
    """
    # The last rows see most keys under causal attention: they start first.
    local_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row_tile = first_row_tile + local_tile
    sequence, kv_head = tl.program_id(1) // HKV, tl.program_id(1) % HKV
    b64, h64 = sequence.to(tl.int64), tl.cast(kv_head, tl.int64)
    row, head_in_group, valid = packed_rows(row_tile, R, G, BM)  # (BM,) each
    head = kv_head * G + head_in_group
    b_query = load_rows(p_query + b64 * stride_qb, stride_qh, stride_qr, row, head, valid, D, DP)  # (BM, DP)
    first, last, prefix = row, row, row
    if BOUNDS:
        first, last, prefix = load_bounds(p_bounds, sequence, row, valid, R)
    p_order += b64 * S
    p_tiles += b64 * T * 4
    p_key += b64 * stride_kb + h64 * stride_kh
    p_value += b64 * stride_vb + h64 * stride_vh
    scratch = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + local_tile) * T * BM
    p_tile_sum += scratch
    p_tile_max += scratch
    block_row = b64 * N + row_tile
    p_kv_indices += block_row * T
    p_num_blocks += block_row * 3
    full, unmasked, num_blocks = tl.load(p_num_blocks), tl.load(p_num_blocks + 1), tl.load(p_num_blocks + 2)

    b_out = tl.zeros([BM, DP], tl.float32)
    row_sum = tl.zeros([BM], tl.float32)
    row_max = tl.full([BM], float("-inf"), tl.float32)
    for i in range(full):
        b_out, row_sum, row_max = online_step(
            b_query, p_key, p_value, stride_ks, stride_vs, p_order, p_tiles, tl.load(p_kv_indices + i), p_tile_sum,
            p_tile_max, first, last, prefix, scale, b_out, row_sum, row_max,
            D, DP, BM, BN, FULL_TILES, BOUNDS, VALUE, MASS, NEGATIVE,
        )  # fmt: skip
    for i in range(full, unmasked):
        b_out, row_sum, row_max = online_step(
            b_query, p_key, p_value, stride_ks, stride_vs, p_order, p_tiles, tl.load(p_kv_indices + i), p_tile_sum,
            p_tile_max, first, last, prefix, scale, b_out, row_sum, row_max,
            D, DP, BM, BN, SHORT_TILES, BOUNDS, VALUE, MASS, NEGATIVE,
        )  # fmt: skip
    for i in tl.range(unmasked, num_blocks, num_stages=PARTIAL_STAGES):
        b_out, row_sum, row_max = online_step(
            b_query, p_key, p_value, stride_ks, stride_vs, p_order, p_tiles, tl.load(p_kv_indices + i), p_tile_sum,
            p_tile_max, first, last, prefix, scale, b_out, row_sum, row_max,
            D, DP, BM, BN, PARTIAL_TILES, BOUNDS, VALUE, MASS, NEGATIVE,
        )  # fmt: skip

    lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log2(row_sum)) * TO_BASE_E  # (BM,)
    tl.store(p_lse + (b64 * HKV * G + head) * R + row, lse, mask=valid)
    if VALUE:
        b_out = b_out / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
        d = tl.arange(0, DP)
        p = p_out + b64 * stride_ob + head.to(tl.int64)[:, None] * stride_oh + row.to(tl.int64)[:, None] * stride_or
        tl.store(p + d[None, :], b_out.to(p_out.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])


@triton.jit(
    do_not_specialize=["R", "T", "N", "F", "first_row_tile", "stride_ob", "stride_oh", "stride_or"],
    do_not_specialize_on_alignment=["stride_of"],
)
def mass_from_tiles_kernel(
    p_tile_sum, p_tile_max, p_lse, p_kinds, p_frame_tiles, p_weights, p_out,
    stride_ob, stride_oh, stride_or, stride_of, HKV, R, T, N, F, first_row_tile, factor,
    G: tl.constexpr, BM: tl.constexpr, WEIGHTED: tl.constexpr, PER_HEAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds factor * weight[b, f] * mass of one large frame for one row tile to p_out, heads in order.

    p_out: (B, 1, R, F), or (B, Hq, R, F) with PER_HEAD, any strides. Tiles that the row tile skipped were not written.
    """
    local_tile, frame, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row_tile = first_row_tile + local_tile
    b64 = sequence.to(tl.int64)
    tile_start = tl.load(p_frame_tiles + b64 * (F + 2) + frame)
    tile_stop = tl.load(p_frame_tiles + b64 * (F + 2) + frame + 1)
    if tile_start == tile_stop:
        return
    if WEIGHTED:
        factor *= tl.load(p_weights + b64 * F + frame)
    row, head_in_group, valid = packed_rows(row_tile, R, G, BM)  # (BM,) each
    lane = tl.arange(0, BM)
    p_kinds += (b64 * N + row_tile) * T
    p_out += b64 * stride_ob + tl.cast(frame, tl.int64) * stride_of
    total = tl.zeros([BM], tl.float32)
    for kv_head in range(HKV):
        head = kv_head * G + head_in_group
        lse = tl.load(p_lse + (b64 * HKV * G + head) * R + row, mask=valid, other=float("-inf")) * TO_BASE_2
        base = ((b64 * HKV + kv_head) * tl.num_programs(0) + local_tile) * T * BM
        mass = tl.zeros([BM], tl.float32)
        for tile in range(tile_start, tile_stop):
            known = (tl.load(p_kinds + tile) > 0) & (lse > float("-inf"))
            tile_sum = tl.load(p_tile_sum + base + tile * BM + lane, mask=known, other=0.0)
            tile_max = tl.load(p_tile_max + base + tile * BM + lane, mask=known, other=0.0)
            mass += tl.where(known, tile_sum * tl.exp2(tile_max - lse), 0.0)
        if PER_HEAD:
            p = p_out + head.to(tl.int64) * stride_oh + row.to(tl.int64) * stride_or
            tl.store(p, tl.fma(mass, factor, tl.load(p, mask=valid, other=0.0)), mask=valid)
        else:
            total += mass
    if not PER_HEAD:
        r = tl.arange(0, ROWS)[:, None]
        inside = (r < BM // G) & (row_tile * (BM // G) + r < R)
        p = p_out + (row_tile * (BM // G) + r).to(tl.int64) * stride_or
        summed = sum_heads(total[:, None], G, BM, ROWS, 1)  # (ROWS, 1)
        tl.store(p, tl.fma(summed, factor, tl.load(p, mask=inside, other=0.0)), mask=inside)
