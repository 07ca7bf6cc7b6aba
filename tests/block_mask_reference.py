"""The definition of appo_kernels.attention.triton_block_mask, in torch operations.

A tile never holds keys of two frames, so that its row sum belongs to one frame, with one exception: frames smaller than
half a tile share tiles (MIXED), and their mass is replayed after the pass. Everything is computed on the device of the
inputs without a synchronisation; sizes that depend on data are bounded by shapes.

Shapes: B sequences, S keys, F frames, R rows, T key tiles (an upper bound), N row tiles.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from appo_kernels.attention.triton_block_mask import BlockMask
from appo_kernels.attention.triton_device import FULL, SHORT, SKIP


@dataclass(frozen=True)
class KeyPlan:
    """Keys in the order frames 0..F-1, small frames together, keys of no frame; keys that no row sees are left out.

    Within a frame, and within the keys of no frame, positions ascend. The order of a sequence's keys depends on nothing
    but that sequence, and padding does not shift it.
    """

    order: Tensor  # (B, S) int32: position of the i-th key in this order
    frames: Tensor  # (B, S) int32: its frame, F for none
    tiles: Tensor  # (B, T, 4) int32: start in the order, number of keys (0: no tile), frame (F: none, F + 1: mixed), 0
    frame_tiles: Tensor  # (B, F + 2) int32: first tile of each frame; [F]: of the mixed ones, [F + 1]: behind these
    small: Tensor  # (B, F + 1) int32: where small frame f starts in the order; empty ranges for the other frames
    low: Tensor  # (B, T) int32: smallest position in the tile
    high: Tensor  # (B, T) int32: largest


def key_plan(frame_ids: Tensor, num_frames: int, bounds: Tensor | None, size: int) -> KeyPlan:
    """frame_ids (B, S) int32, -1 for none; bounds as of ``row_bounds``; size: keys of a tile."""
    (B, S), F, device = frame_ids.shape, num_frames, frame_ids.device
    ids = torch.where(frame_ids < 0, F, frame_ids).long()
    seen = _seen_by_any_row(S, bounds, device)
    counts = torch.zeros(B, F + 1, dtype=torch.int64, device=device).scatter_add_(1, ids, seen.expand(B, S).long())
    small_frame = 2 * counts < size
    small_frame[:, F] = False
    # Groups of keys that tiles do not straddle: each large frame, F: small frames, F + 1: no frame, F + 2: unseen.
    group = torch.where(ids == F, F + 1, torch.where(small_frame.gather(1, ids), F, ids))
    group = torch.where(seen, group, F + 2)
    order = torch.argsort(group * (F + 1) + ids, dim=1, stable=True)
    sizes = torch.zeros(B, F + 3, dtype=torch.int64, device=device)
    sizes.scatter_add_(1, group, torch.ones_like(group))
    starts, tile_counts = _exclusive_sum(sizes), -(-sizes[:, : F + 2] // size)
    first_tile = _exclusive_sum(tile_counts)  # (B, F + 3), the last: number of tiles

    T = S // size + min(F, 2 * S // size) + 2  # every large frame has at least half a tile of keys
    tile = torch.arange(T, device=device).expand(B, T).contiguous()
    of = torch.searchsorted(first_tile[:, 1:].contiguous(), tile, right=True)  # group of each tile
    exists = of < F + 2
    of = of.clamp(max=F + 1)
    skipped = (tile - first_tile.gather(1, of)) * size
    start = starts.gather(1, of) + skipped
    length = torch.where(exists, (sizes.gather(1, of) - skipped).clamp(max=size), 0)
    frame = torch.where(of == F, F + 1, torch.where(of == F + 1, F, of))
    start = torch.where(exists, start, 0)

    low = order.gather(1, start)
    high = order.gather(1, (start + length - 1).clamp(min=0))
    mixed = frame == F + 1  # not ascending
    low, high = torch.where(mixed, 0, low), torch.where(mixed, S - 1, high)
    small_sizes = torch.where(small_frame, counts, 0)[:, :F]
    small = starts[:, F : F + 1] + _exclusive_sum(small_sizes)
    tiles = torch.stack([start, length, frame, torch.zeros_like(start)], dim=2)
    return KeyPlan(
        order.int(), ids.gather(1, order).int(), tiles.int(), first_tile[:, : F + 2].int().contiguous(),
        small.int().contiguous(), low.int(), high.int(),
    )  # fmt: skip


def row_bounds(
    batch: int, rows: int, keys: int, first_key: Tensor | None, last_key: Tensor | None, prefix_keys: Tensor | None
) -> Tensor | None:
    """(B, 3, R) int32: first, last and prefix of each row; None when every row sees every key."""
    given = [bound for bound in (first_key, last_key, prefix_keys) if bound is not None]
    if not given:
        return None
    defaults = (0, keys - 1, 0)
    bounds = torch.empty(batch, 3, rows, dtype=torch.int32, device=given[0].device)
    for i, (bound, default) in enumerate(zip((first_key, last_key, prefix_keys), defaults, strict=True)):
        bounds[:, i] = default if bound is None else bound
    return bounds


def block_mask(
    plan: KeyPlan, num_frames: int, bounds: Tensor | None, rows: int, tile_rows: int, tile_keys: int
) -> BlockMask:
    """The ``BlockMask`` of row tiles of ``tile_rows`` rows and the key tiles of ``plan``; one without keys is SKIP."""
    B, T = plan.low.shape
    N = -(-rows // tile_rows)
    exists = plan.tiles[:, None, :, 1] > 0
    pure = exists & (plan.tiles[:, None, :, 2] != num_frames + 1)
    whole = pure & (plan.tiles[:, None, :, 1] == tile_keys)
    if bounds is None:
        some, every = exists.expand(B, N, T), exists.expand(B, N, T)
    else:
        low, high = plan.low[:, None], plan.high[:, None]
        first, last, prefix = bounds.unbind(1)
        empty, big = first > last, torch.iinfo(torch.int32).max
        least_first, most_last, most_prefix = (
            _per_tile(values, tile_rows, fill, largest)
            for values, fill, largest in (
                (torch.where(empty, big, first), big, False),
                (torch.where(empty, -1, last), -1, True),
                (prefix, 0, True),
            )
        )
        most_first, least_last, least_prefix = (
            _per_tile(values, tile_rows, fill, largest)
            for values, fill, largest in ((first, -big, True), (last, big, False), (prefix, big, False))
        )
        some = exists & (((least_first <= high) & (most_last >= low)) | (most_prefix > low))
        every = ((most_first <= low) & (least_last >= high)) | (least_prefix > high)
    unmasked = some & every & pure
    kinds = some.to(torch.int8) + unmasked.to(torch.int8) + (unmasked & whole).to(torch.int8)
    tiles = torch.argsort((kinds == SKIP).to(torch.int8), dim=2, stable=True)
    in_order = kinds.gather(2, tiles)
    prefixes = [(in_order >= least).int().cumprod(2).sum(2) for least in (FULL, SHORT)]
    counts = torch.stack([*prefixes, some.sum(2)], dim=2)
    return BlockMask(tiles.int(), counts.int().contiguous(), kinds.contiguous())


def row_blocks(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """The transpose: q_indices (B, T, N) int32, row tiles that see each key tile, those that need no mask
    first; q_num_blocks (B, T, 2) int32: these, all."""
    kinds = mask.kinds.transpose(1, 2)
    rows = torch.argsort(-kinds, dim=2, stable=True)
    counts = torch.stack([(kinds >= SHORT).sum(2), (kinds != SKIP).sum(2)], dim=2)
    return rows.int().contiguous(), counts.int().contiguous()


def _exclusive_sum(counts: Tensor) -> Tensor:
    """(B, n) -> (B, n + 1): sums of the first 0, 1, ..., n."""
    return torch.nn.functional.pad(counts.cumsum(1), (1, 0))


def _seen_by_any_row(keys: int, bounds: Tensor | None, device: torch.device) -> Tensor:
    """(B or 1, S) bool. A key between the intervals of two rows counts as seen."""
    position = torch.arange(keys, device=device)[None]
    if bounds is None:
        return torch.ones_like(position, dtype=torch.bool)
    first, last, prefix = bounds.unbind(1)
    empty = first > last
    if not first.shape[1]:
        return torch.zeros(first.shape[0], keys, dtype=torch.bool, device=device)
    least = torch.where(empty, keys, first).amin(1, keepdim=True)
    most = torch.where(empty, -1, last).amax(1, keepdim=True)
    return ((position >= least) & (position <= most)) | (position < prefix.amax(1, keepdim=True))


def _per_tile(values: Tensor, size: int, fill: int, largest: bool) -> Tensor:
    """(B, R) -> (B, N, 1): the largest or smallest of each ``size`` rows; ``fill`` stands for rows beyond the last."""
    rows = values.shape[1]
    tiles = torch.nn.functional.pad(values, (0, -rows % size), value=fill).unflatten(1, (-1, size))
    return (tiles.amax(2) if largest else tiles.amin(2))[..., None]
