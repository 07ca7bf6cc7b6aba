"""Attention passes by Triton: one online-softmax pass, its finish, the gradients; without a value the mass alone."""

import math

import torch
import triton
from torch import Tensor

from appo_kernels.attention import triton_backward as backward_kernels
from appo_kernels.attention import triton_delta, triton_mass
from appo_kernels.attention import triton_forward as forward_kernels
from appo_kernels.attention.arguments import AttentionLayout, Gradients, Upstream
from appo_kernels.attention.triton_block_mask import BlockMask, KeyPlan, block_mask, key_plan, row_blocks
from appo_kernels.dtypes import LOG2_E
from appo_kernels.triton_launch import (
    BACKWARD_DELTA,
    BACKWARD_KEY,
    BACKWARD_QUERY,
    FORWARD,
    Tiling,
    TilingTable,
    architecture,
    multiprocessors,
    on_its_device,
    padded_head_dim,
    tiling,
)

# Row sums and maxima of all tiles, kept until the final normaliser is known. Longer inputs are taken in parts of rows.
SCRATCH_BYTES = 256 << 20


@on_its_device
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    layout: AttentionLayout,
    out: Tensor | None,
    lse: Tensor,
    mass: Tensor,
    per_head: bool,
) -> None:
    """Arguments as of ``torch_passes.attend``; ``lse`` contiguous."""
    (B, Hq, R, D), (HKV, S) = query.shape, key.shape[1:3]
    F = mass.shape[3]
    scale, frame_weights = layout.scale, layout.frame_weights
    if not B * R:
        return
    if not S:
        lse.fill_(-math.inf)
        if out is not None:
            out.zero_()
        return
    choice = tiling(FORWARD, architecture(query.device), query.element_size(), D, Hq // HKV)
    G, tile_bytes = Hq // HKV, 2 * 4 * choice.rows
    plan, mask = block_mask(layout, B, R, S, F, choice.keys, choice.rows // G)
    N, T = mask.kv_indices.shape[1:]
    # Enough row tiles at a time for two programs on every multiprocessor, whatever that takes.
    fill = triton.cdiv(2 * multiprocessors(query.device), B * HKV)
    part = min(N, max(1, fill, SCRATCH_BYTES // (B * HKV * T * tile_bytes)))
    scratch = torch.empty(2, B * HKV * part * T * choice.rows if F else 1, dtype=torch.float32, device=query.device)
    bounds_or_any = _or(plan.bounds, plan.order)
    value_or_any, out_or_any = (key, query) if value is None or out is None else (value, out)
    for start in range(0, N, part):
        tiles = min(part, N - start)
        forward_kernels.online_kernel[(tiles, B * HKV)](
            query, key, value_or_any, out_or_any, lse, plan.order, plan.tiles, mask.kv_indices,
            mask.kv_num_blocks, bounds_or_any, *scratch, *query.stride()[:3], *key.stride()[:3],
            *value_or_any.stride()[:3], *out_or_any.stride()[:3], HKV, R, S, T, N, start, magnitude(scale),
            G=G, D=D, DP=padded_head_dim(D), BM=choice.rows, BN=choice.keys, BOUNDS=plan.bounds is not None,
            VALUE=value is not None, MASS=F > 0, NEGATIVE=scale < 0,
            PARTIAL_STAGES=choice.partial_stages, **choice.options,
        )  # fmt: skip
        if F:
            forward_kernels.mass_from_tiles_kernel[(tiles, F, B)](
                *scratch, lse, mask.kinds, plan.frame_tiles, lse if frame_weights is None else frame_weights, mass,
                *mass.stride(), HKV, R, T, N, F, start, 1.0 if per_head else 1.0 / Hq,
                G=G, BM=choice.rows, WEIGHTED=frame_weights is not None, PER_HEAD=per_head,
                ROWS=triton.next_power_of_2(choice.rows // G), num_warps=4,
            )  # fmt: skip
    if F:
        triton_mass.mass_from_lse(query, key, lse, plan, frame_weights, scale, mass, per_head, choice, large=False)


def magnitude(scale: float) -> float:
    """|scale| in base 2. A scale of 0 becomes one that leaves every score at 0, without making NaN of -inf."""
    return max(abs(scale) * LOG2_E, 1e-37)


@on_its_device
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
    """Arguments as of ``torch_passes.attend_backward``."""
    grad_out, grad_lse, grad_mass = upstream
    grad_query, grad_key, grad_value = gradients
    (B, Hq, R, D), (HKV, S) = query.shape, key.shape[1:3]
    for gradient in (grad_key, grad_value):
        if gradient is not None:
            gradient.zero_()  # keys that no row sees have no tile
    if not B * R * S:
        if grad_query is not None:
            grad_query.zero_()
        return
    G, F = Hq // HKV, 0 if grad_mass is None else grad_mass.shape[3]

    def chosen(table: TilingTable) -> Tiling:
        return tiling(table, architecture(query.device), query.element_size(), D, G)

    def masked(choice: Tiling) -> tuple[KeyPlan, BlockMask]:
        return block_mask(layout, B, R, S, F, choice.keys, choice.rows // G)

    lse = lse.contiguous()
    if grad_out is not None and grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    if value is None or grad_out is None:  # nothing reaches the values: dP is the gradient of the mass alone
        value = grad_out = None
    frame_weights = layout.frame_weights if F else None
    if not F:
        grad_mass = None
    factor = 1.0 if per_head else 1.0 / Hq
    signed = math.copysign(magnitude(layout.scale), layout.scale)
    query_strides, key_strides = query.stride()[:3], key.stride()[:3]
    value_strides = key_strides if value is None else value.stride()[:3]
    out_strides = (0, 0, 0) if grad_out is None else grad_out.stride()[:3]
    lse_strides = (0, 0, 0) if grad_lse is None else grad_lse.stride()
    mass_strides = (0, 0, 0, 0) if grad_mass is None else _head_strides(grad_mass, per_head)
    # Kernels take a pointer for every operand, whatever their flags leave out.
    grad_mass_or_any, weights_or_any = _or(grad_mass, lse), _or(frame_weights, lse)
    common = {
        "G": G, "D": D, "DP": padded_head_dim(D), "BOUNDS": layout.bounds != (None, None, None),
        "MASS": grad_mass is not None, "WEIGHTED": frame_weights is not None,
    }  # fmt: skip
    delta = torch.empty_like(lse)
    choice = chosen(BACKWARD_DELTA)
    plan = key_plan(layout, R, F, choice.keys)
    triton_delta.delta_kernel[(triton.cdiv(R, choice.rows // G), B * HKV)](
        query, key, lse, _or(out, lse), _or(grad_out, lse), _or(grad_lse, lse), grad_mass_or_any, weights_or_any,
        plan.order, plan.frames, plan.tiles, plan.frame_tiles, plan.small, _or(plan.bounds, plan.order),
        delta, *query_strides, *key_strides, *out_strides, *lse_strides, *mass_strides, HKV, R, S, plan.tiles.shape[1],
        F, signed, factor, BM=choice.rows, BN=choice.keys, OUT=grad_out is not None, LSE=grad_lse is not None,
        **common, **choice.options,
    )  # fmt: skip
    operands = (
        query, key, _or(value, key), _or(grad_out, query), grad_mass_or_any, weights_or_any, lse, delta,
    )  # fmt: skip
    strides = *query_strides, *key_strides, *value_strides, *out_strides, *mass_strides, HKV, R, S
    if grad_query is not None:
        choice = chosen(BACKWARD_QUERY)
        plan, mask = masked(choice)
        N, T = mask.kv_indices.shape[1:]
        backward_kernels.query_kernel[(N, B * HKV)](
            *operands, grad_query, plan.order, plan.frames, plan.tiles, mask.kv_indices, mask.kv_num_blocks,
            _or(plan.bounds, plan.order), *strides, T, N, F, signed, factor, BM=choice.rows, BN=choice.keys,
            VALUE=value is not None, **common, **choice.options,
        )  # fmt: skip
    if grad_key is not None or grad_value is not None:
        choice = chosen(BACKWARD_KEY)
        plan, mask = masked(choice)
        N, T = mask.kv_indices.shape[1:]
        q_indices, q_num_blocks = row_blocks(mask.kinds)
        grad_key = key.new_empty(key.shape) if grad_key is None else grad_key
        grad_value = key.new_empty(key.shape if value is not None else 1) if grad_value is None else grad_value
        backward_kernels.key_kernel[(T, B * HKV)](
            *operands, grad_key, grad_value, plan.order, plan.frames, plan.tiles, q_indices, q_num_blocks,
            _or(plan.bounds, plan.order), *strides, T, N, F, signed, factor, BM=choice.rows, BN=choice.keys,
            VALUE=value is not None, **common, **choice.options,
        )  # fmt: skip


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """``tensor``, or where there is none any other: a pointer that is not read."""
    return other if tensor is None else tensor


def _head_strides(grad_mass: Tensor, per_head: bool) -> tuple[int, ...]:
    """Strides of (B, Hq, R, F); 0 for the heads when all share the gradient of their mean."""
    b, h, r, f = grad_mass.stride()
    return b, h if per_head else 0, r, f
