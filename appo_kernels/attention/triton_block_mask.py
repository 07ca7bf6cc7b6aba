"""Tiles of keys sorted by frame, and the block mask of row tiles and key tiles, for the Triton attention kernels.

A tile never holds keys of two frames, so that its row sum belongs to one frame, with one exception: frames smaller than
half a tile share tiles (mixed ones), and their mass is replayed after the pass. ``triton_plan`` finds everything on the
device of the inputs; sizes that depend on data are bounded by shapes.

Shapes: B sequences, S keys, F frames, R rows, T key tiles (an upper bound), N row tiles.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from appo_kernels.attention import triton_plan
from appo_kernels.attention.arguments import AttentionLayout
from appo_kernels.attention.frame_plan import kept
from appo_kernels.attention.triton_device import SHORT
from appo_kernels.triton_launch import on_its_device


@dataclass(frozen=True)
class KeyPlan:
    """Keys in the order frames 0..F-1, small frames together, keys of no frame; then those that no row sees.

    Within a frame, and within the keys of no frame, positions ascend. The order of a sequence's keys depends on nothing
    but that sequence, and padding does not shift it.
    """

    bounds: Tensor | None  # (B, 3, R) int32: first, last and prefix of each row; None: every row sees every key
    order: Tensor  # (B, S) int32: position of the i-th key in this order
    frames: Tensor  # (B, S) int32: its frame, F for none
    tiles: Tensor  # (B, T, 4) int32: start in the order, number of keys (0: no tile), frame (F: none, F + 1: mixed), 0
    frame_tiles: Tensor  # (B, F + 2) int32: first tile of each frame; [F]: of the mixed ones, [F + 1]: behind these
    small: Tensor  # (B, F + 1) int32: where small frame f starts in the order; empty ranges for the other frames


@dataclass(frozen=True)
class BlockMask:
    """The key tiles that each row tile sees; FlexAttention's BlockMask, with one list for all kinds of tiles."""

    kv_indices: Tensor  # (B, N, T) int32: key tiles in ascending order; those not seen have no place in it
    kv_num_blocks: Tensor  # (B, N, 3) int32: tiles before the first seen that is not FULL, not FULL or SHORT, all seen
    kinds: Tensor  # (B, N, T) int8: SKIP, PARTIAL, SHORT or FULL of ``triton_device``


def key_plan(layout: AttentionLayout, rows: int, num_frames: int, size: int) -> KeyPlan:
    """size: keys of a tile. Once for a plan."""
    return kept(
        layout.frame_ids,
        ("keys", rows, num_frames, size),
        lambda: _key_plan(layout.frame_ids, layout, rows, num_frames, size),
    )


@on_its_device
def _key_plan(frame_ids: Tensor, layout: AttentionLayout, rows: int, num_frames: int, size: int) -> KeyPlan:
    """The plan, by one launch: frame_ids (B, S) int32, bounds (B, R) of any integers."""
    (B, S), F = frame_ids.shape, num_frames
    T = S // size + min(F, 2 * S // size) + 2  # every large frame has at least half a tile of keys
    given = [bound is not None for bound in layout.bounds]
    first, last, prefix = (frame_ids if bound is None else bound for bound in layout.bounds)

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=frame_ids.device)

    bounds = ints(B, 3, rows) if any(given) else None
    plan = KeyPlan(bounds, ints(B, S), ints(B, S), ints(B, T, 4), ints(B, F + 2), ints(B, F + 1))
    triton_plan.plan_kernel[(B,)](
        frame_ids, first, last, prefix, plan.order if bounds is None else bounds, ints(B, 4 * (F + 1)), ints(B, S),
        plan.order, plan.frames, plan.tiles, plan.frame_tiles, plan.small,
        *frame_ids.stride(), *first.stride(), *last.stride(), *prefix.stride(), rows, S, F, T, size,
        BOUNDS=any(given), FIRST=given[0], LAST=given[1], PREFIX=given[2], BLOCK=128, WIDE=512, num_warps=8,
    )  # fmt: skip
    return plan


def block_mask(
    layout: AttentionLayout, batch: int, rows: int, keys: int, num_frames: int, tile_keys: int, tile_rows: int
) -> tuple[KeyPlan, BlockMask]:
    """Tiles of keys and what row tiles of ``tile_rows`` rows see of them, once for a plan."""
    plan = key_plan(layout, rows, num_frames, tile_keys)
    name = ("block mask", rows, num_frames, tile_keys, tile_rows)
    return plan, kept(
        layout.frame_ids, name, lambda: _block_mask(plan.order, plan, rows, num_frames, tile_keys, tile_rows)
    )


@on_its_device
def _block_mask(order: Tensor, plan: KeyPlan, rows: int, num_frames: int, tile_keys: int, tile_rows: int) -> BlockMask:
    """The mask, by one launch: order (B, S) int32."""
    (B, S), T, N = order.shape, plan.tiles.shape[1], triton.cdiv(rows, tile_rows)
    mask = BlockMask(
        torch.empty(B, N, T, dtype=torch.int32, device=order.device),
        torch.empty(B, N, 3, dtype=torch.int32, device=order.device),
        torch.empty(B, N, T, dtype=torch.int8, device=order.device),
    )
    triton_plan.mask_kernel[(N, B)](
        order if plan.bounds is None else plan.bounds, order, plan.tiles, mask.kinds, mask.kv_indices,
        mask.kv_num_blocks, rows, S, T, num_frames, tile_keys, tile_rows, BOUNDS=plan.bounds is not None,
        ROWS=triton.next_power_of_2(tile_rows), BLOCK=128, num_warps=4,
    )  # fmt: skip
    return mask


@on_its_device
def row_blocks(kinds: Tensor) -> tuple[Tensor, Tensor]:
    """The transpose of a mask, from its kinds: q_indices (B, T, N) int32, row tiles that see each key tile, those that
    need no mask first; q_num_blocks (B, T, 2) int32: these, all."""
    B, N, T = kinds.shape
    indices = torch.empty(B, T, N, dtype=torch.int32, device=kinds.device)
    counts = torch.empty(B, T, 2, dtype=torch.int32, device=kinds.device)
    triton_plan.row_blocks_kernel[(T, B)](kinds, indices, counts, N, T, SHORT=SHORT, BLOCK=128, num_warps=4)
    return indices, counts
