# mypy: disable-error-code="no-untyped-def"
"""Triton: tiles of keys sorted by frame and the block mask, three launches without a wait; see triton_block_mask.py.

A program of ``plan_kernel`` counts and places the keys of one sequence, block after block: a key's place is that of its
kind (its frame, none, unseen) plus the keys of that kind before it. What one block leaves in memory the next reads
behind a barrier.
"""

import triton
import triton.language as tl

INT32_LEAST, INT32_MOST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)


@triton.jit
def narrowed(values):
    """Integers as int32; what does not fit is brought to the nearest that does."""
    if values.dtype == tl.int64:
        values = tl.minimum(tl.maximum(values, INT32_LEAST), INT32_MOST)
    return values.to(tl.int32)


@triton.jit
def exclusive(values):
    return tl.cumsum(values, 0) - values


@triton.jit
def store_tiles(p_tiles, first_tile, start, count, frame, size):
    """The tiles (start, keys, frame, 0) of groups of ``count`` keys, one group to a lane."""
    tiles = (count + size - 1) // size
    for k in range(tl.max(tiles, 0)):
        own = k < tiles
        p = p_tiles + (first_tile + k) * 4
        tl.store(p, start + k * size, mask=own)
        tl.store(p + 1, tl.minimum(count - k * size, size), mask=own)
        tl.store(p + 2, frame, mask=own)
        tl.store(p + 3, tl.zeros_like(start), mask=own)


@triton.jit
def store_bounds(p_given, stride_b, stride_r, p_bound, b, r, inside, default, GIVEN: tl.constexpr):
    """One bound of rows, int32, written where the attention kernels read it."""
    value = tl.zeros_like(r) + default
    if GIVEN:
        value = narrowed(tl.load(p_given + b * stride_b + r.to(tl.int64) * stride_r, mask=inside, other=0))
    tl.store(p_bound + r, value, mask=inside)
    return value


@triton.jit(
    do_not_specialize=[
        "R", "S", "F", "T", "size", "stride_ib", "stride_is", "stride_fb", "stride_fr", "stride_lb", "stride_lr",
        "stride_pb", "stride_pr",
    ]
)  # fmt: skip
def plan_kernel(
    p_ids, p_first, p_last, p_prefix, p_bounds, p_counts, p_rank, p_order, p_frames, p_tiles, p_frame_tiles, p_small,
    stride_ib, stride_is, stride_fb, stride_fr, stride_lb, stride_lr, stride_pb, stride_pr, R, S, F, T, size,
    BOUNDS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, PREFIX: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The ``KeyPlan`` and bounds of one sequence. p_counts (B, 4 (F + 1)) and p_rank (B, S) are scratch.

    Kinds of keys: frames, F for none, and F + 1 further on those that no row sees.
    """
    b = tl.program_id(0).to(tl.int64)
    p_counts += b * 4 * (F + 1)
    p_starts = p_counts + 2 * (F + 1)
    p_rank += b * S
    p_order += b * S
    p_frames += b * S
    p_tiles += b * T * 4
    p_frame_tiles += b * (F + 2)
    p_small += b * (F + 1)
    wide = tl.arange(0, WIDE)

    least, most, most_prefix = 0, S - 1, 0
    if BOUNDS:
        p_bounds += b * 3 * R
        least, most = S, -1
        for start in range(0, R, WIDE):
            r = start + wide
            inside = r < R
            first = store_bounds(p_first, stride_fb, stride_fr, p_bounds, b, r, inside, 0, FIRST)
            last = store_bounds(p_last, stride_lb, stride_lr, p_bounds + R, b, r, inside, S - 1, LAST)
            prefix = store_bounds(p_prefix, stride_pb, stride_pr, p_bounds + 2 * R, b, r, inside, 0, PREFIX)
            interval = inside & (first <= last)
            least = tl.minimum(least, tl.min(tl.where(interval, first, S), 0))
            most = tl.maximum(most, tl.max(tl.where(interval, last, -1), 0))
            most_prefix = tl.maximum(most_prefix, tl.max(tl.where(inside, prefix, 0), 0))

    for start in range(0, 2 * (F + 1), WIDE):
        tl.store(p_counts + start + wide, tl.zeros([WIDE], tl.int32), mask=start + wide < 2 * (F + 1))
    tl.debug_barrier()
    lane = tl.arange(0, BLOCK)
    for start in range(0, S, BLOCK):
        position = start + lane
        inside = position < S
        kind = kind_of_keys(p_ids + b * stride_ib, stride_is, position, inside, F, least, most, most_prefix)
        same = (kind[:, None] == kind[None, :]) & inside[None, :]
        rank = tl.sum((same & (lane[None, :] < lane[:, None])).to(tl.int32), 1)
        number = tl.sum(same.to(tl.int32), 1)
        before = tl.load(p_counts + kind, mask=inside, other=0)
        tl.store(p_rank + position, before + rank, mask=inside)
        tl.debug_barrier()
        tl.store(p_counts + kind, before + number, mask=inside & (rank == number - 1))
        tl.debug_barrier()

    # Large frames first, then small ones, then keys of no frame, then what no row sees.
    keys, tiles, small = 0, 0, 0
    for start in range(0, F, WIDE):
        frame = start + wide
        inside = frame < F
        count = tl.load(p_counts + frame, mask=inside, other=0)
        large = tl.where(2 * count >= size, count, 0)
        own_tiles = (large + size - 1) // size
        place, first_tile = keys + exclusive(large), tiles + exclusive(own_tiles)
        tl.store(p_starts + frame, place, mask=inside)
        tl.store(p_frame_tiles + frame, first_tile, mask=inside)
        store_tiles(p_tiles, first_tile, place, large, frame, size)
        keys += tl.sum(large, 0)
        tiles += tl.sum(own_tiles, 0)
    begin = keys
    for start in range(0, F, WIDE):
        frame = start + wide
        inside = frame < F
        count = tl.load(p_counts + frame, mask=inside, other=0)
        little = tl.where(2 * count < size, count, 0)
        place = begin + small + exclusive(little)
        tl.store(p_small + frame, place, mask=inside)
        tl.store(p_starts + frame, place, mask=inside & (2 * count < size))
        small += tl.sum(little, 0)
    one = tl.arange(0, 1)
    tl.store(p_small + F + one, begin + small + tl.zeros_like(one))
    tl.store(p_frame_tiles + F + one, tiles + tl.zeros_like(one))
    tl.debug_barrier()
    store_tiles(p_tiles, tiles + one, begin + one, small + one, F + 1 + one, size)
    tiles += (small + size - 1) // size
    tl.store(p_frame_tiles + F + 1 + one, tiles + tl.zeros_like(one))
    begin += small
    without = tl.load(p_counts + F)
    tl.store(p_starts + F + one, begin + tl.zeros_like(one))
    store_tiles(p_tiles, tiles + one, begin + one, without + one, F + one, size)
    tiles += (without + size - 1) // size
    begin += without
    for start in range(0, F + 1, WIDE):
        inside = start + wide < F + 1
        count = tl.load(p_counts + F + 1 + start + wide, mask=inside, other=0)
        tl.store(p_starts + F + 1 + start + wide, begin + exclusive(count), mask=inside)
        begin += tl.sum(count, 0)
    for start in range(tiles, T, WIDE):
        tile = start + wide
        for i in range(4):
            tl.store(p_tiles + tile * 4 + i, tl.zeros([WIDE], tl.int32), mask=tile < T)
    tl.debug_barrier()

    for start in range(0, S, WIDE):
        position = start + wide
        inside = position < S
        kind = kind_of_keys(p_ids + b * stride_ib, stride_is, position, inside, F, least, most, most_prefix)
        place = tl.load(p_starts + kind, mask=inside, other=0) + tl.load(p_rank + position, mask=inside, other=0)
        tl.store(p_order + place, position, mask=inside)
        tl.store(p_frames + place, tl.where(kind > F, kind - F - 1, kind), mask=inside)


@triton.jit
def kind_of_keys(p_ids, stride, position, inside, F, least, most, most_prefix):
    frame = narrowed(tl.load(p_ids + position.to(tl.int64) * stride, mask=inside, other=-1))
    frame = tl.where((frame < 0) | (frame >= F), F, frame)
    seen = ((position >= least) & (position <= most)) | (position < most_prefix)
    return tl.where(seen, frame, frame + F + 1)


@triton.jit(do_not_specialize=["R", "S", "T", "F", "size", "tile_rows"])
def mask_kernel(
    p_bounds, p_order, p_tiles, p_kinds, p_kv_indices, p_num_blocks, R, S, T, F, size, tile_rows,
    BOUNDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row of a ``BlockMask`` of one tile of rows. ROWS: tile_rows padded to a power of two."""
    row_tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_order += b * S
    p_tiles += b * T * 4
    place = (b * tl.num_programs(0) + row_tile) * T
    p_kinds += place
    p_kv_indices += place
    p_num_blocks += (b * tl.num_programs(0) + row_tile) * 3
    least_first, most_last, most_prefix = 0, S - 1, 0
    most_first, least_last, least_prefix = 0, S - 1, 0
    if BOUNDS:
        p_bounds += b * 3 * R
        r = row_tile * tile_rows + tl.arange(0, ROWS)
        valid = (tl.arange(0, ROWS) < tile_rows) & (r < R)
        first = tl.load(p_bounds + r, mask=valid, other=INT32_LEAST)
        last = tl.load(p_bounds + R + r, mask=valid, other=INT32_MOST)
        prefix = tl.load(p_bounds + 2 * R + r, mask=valid, other=0)
        interval = valid & (first <= last)
        least_first = tl.min(tl.where(interval, first, INT32_MOST), 0)
        most_last = tl.max(tl.where(interval, last, -1), 0)
        most_prefix = tl.max(prefix, 0)
        most_first, least_last = tl.max(first, 0), tl.min(last, 0)
        least_prefix = tl.min(tl.where(valid, prefix, INT32_MOST), 0)
    seen_before, full_before, unmasked_before, full_run, unmasked_run = 0, 0, 0, 1, 1
    for start in range(0, T, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        inside = tile < T
        begin = tl.load(p_tiles + tile * 4, mask=inside, other=0)
        length = tl.load(p_tiles + tile * 4 + 1, mask=inside, other=0)
        mixed = tl.load(p_tiles + tile * 4 + 2, mask=inside, other=0) == F + 1
        exists = length > 0
        low = tl.load(p_order + begin, mask=exists, other=0)
        high = tl.load(p_order + begin + length - 1, mask=exists, other=0)
        low, high = tl.where(mixed, 0, low), tl.where(mixed, S - 1, high)  # not ascending
        some = exists & (((least_first <= high) & (most_last >= low)) | (most_prefix > low))
        every = ((most_first <= low) & (least_last >= high)) | (least_prefix > high)
        unmasked = some & every & ~mixed
        full = unmasked & (length == size)
        kind = some.to(tl.int32) + unmasked.to(tl.int32) + full.to(tl.int32)
        tl.store(p_kinds + tile, kind.to(tl.int8), mask=inside)
        tl.store(p_kv_indices + seen_before + exclusive(some.to(tl.int32)), tile, mask=some)
        # Tiles before the first seen one that is of another kind: those in a run that has not ended.
        not_full, not_unmasked = (some & ~full).to(tl.int32), (some & ~unmasked).to(tl.int32)
        full_before += full_run * tl.sum((some & (tl.cumsum(not_full, 0) == 0)).to(tl.int32), 0)
        unmasked_before += unmasked_run * tl.sum((some & (tl.cumsum(not_unmasked, 0) == 0)).to(tl.int32), 0)
        full_run = tl.where(tl.sum(not_full, 0) == 0, full_run, 0)
        unmasked_run = tl.where(tl.sum(not_unmasked, 0) == 0, unmasked_run, 0)
        seen_before += tl.sum(some.to(tl.int32), 0)
    tl.store(p_num_blocks, full_before)
    tl.store(p_num_blocks + 1, unmasked_before)
    tl.store(p_num_blocks + 2, seen_before)


@triton.jit(do_not_specialize=["N", "T"])
def row_blocks_kernel(p_kinds, p_q_indices, p_num_blocks, N, T, SHORT: tl.constexpr, BLOCK: tl.constexpr):
    """Row tiles that see one tile of keys, those that need no mask first, and how many these and all are."""
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p_kinds += b * N * T + tile
    p_q_indices += (b * T + tile) * N
    found = 0
    for masked in range(2):
        for start in range(0, N, BLOCK):
            n = start + tl.arange(0, BLOCK)
            kind = tl.load(p_kinds + n.to(tl.int64) * T, mask=n < N, other=0).to(tl.int32)
            wanted = (kind > 0) & ((kind >= SHORT) == (masked == 0))
            tl.store(p_q_indices + found + exclusive(wanted.to(tl.int32)), n, mask=wanted)
            found += tl.sum(wanted.to(tl.int32), 0)
        tl.store(p_num_blocks + (b * T + tile) * 2 + masked, found)
