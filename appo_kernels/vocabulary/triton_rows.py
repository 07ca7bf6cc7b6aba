# mypy: disable-error-code="no-untyped-def"
"""Triton: what the operators on logits do with each row between the vendor's matrix products.

Bias, soft cap and temperature are applied on the way, so a tile of logits is written by its matrix product and read
once by ``fold`` (log-sum-exp, entropy, logit of the target) and once by ``gradient``, which writes d loss / d logits:

    gradient_v = p_v (constant - slope log p_v), ``at_target`` where v is the target; then through cap and temperature

Shapes: m rows of a tile, v columns of V. Rows are those of a (B, T, v) tensor of any strides with a unit last one,
m = B T.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from appo_kernels.triton_launch import on_its_device

FOLD_COLUMNS, GRADIENT_COLUMNS = 4096, 2048
FEW_COLUMNS = 512  # for the last tile of a vocabulary, or a small one: at most two kernels for all widths
# Rows of the state that ``fold`` keeps: largest logit, sum of e = exp(z - row_max), sum of (z - row_max) e, and the
# target's logit.
ROW_MAX, ROW_SUM, WEIGHTED_SUM, TARGET_LOGIT = range(4)


# Loaded as scalars: the alignment of slices of them must not compile another kernel.
ROW_VECTORS = ("p_mask", "p_targets", "p_lse", "p_constant", "p_slope", "p_at_target")


@triton.jit
def tanh(x):
    """In fp32; a series near 0, where 1 - 2 / (exp(2 x) + 1) would cancel."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.3, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def exp_minus_line(d):
    """exp(d) - d - 1, by its series near 0, where the difference would cancel."""
    series = 1.0 / 24 + d * (1.0 / 120 + d * (1.0 / 720 + d * (1.0 / 5040 + d * (1.0 / 40320))))
    series = d * d * (0.5 + d * (1.0 / 6 + d * series))
    return tl.where(tl.abs(d) < 0.5, series, tl.exp(d) - d - 1.0)


@triton.jit
def scaled(x, cap, temperature, CAP: tl.constexpr):
    """softcap(x) / temperature of raw logits with their bias, fp32."""
    if CAP:
        x = cap * tanh(x / cap)
    return x / temperature


@triton.jit
def load_logits(p_row, p_bias, column, inside, BIAS: tl.constexpr):
    """Raw logits plus bias in fp32; 0 outside."""
    x = tl.load(p_row + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(p_bias + column, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def row_offset(r, T, stride_b, stride_t):
    """Offset of row r, int64: 4,096 x 152,064 elements do not fit 31 bits."""
    row = r.to(tl.int64)
    return row // T * stride_b + row % T * stride_t


@triton.jit(do_not_specialize=["p_mask", "p_targets", "p_state", "stride_state", "T", "first_column", "v"])
def fold_kernel(
    p_logits, p_mask, p_bias, p_targets, p_state, stride_b, stride_t, stride_state, T, first_column, v,
    cap, temperature, CAP: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Takes the columns of one row into its state, unless it is masked. One program per row."""
    r = tl.program_id(0)
    if MASKED:
        unread = tl.load(p_mask + r) == 0.0
        if unread:
            return
    p_logits += row_offset(r, T, stride_b, stride_t)
    row_max = tl.load(p_state + r)
    row_sum = tl.load(p_state + stride_state + r)
    weighted_sum = tl.load(p_state + 2 * stride_state + r)
    for start in range(0, v, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < v
        z = scaled(load_logits(p_logits, p_bias, column, inside, BIAS), cap, temperature, CAP)  # (BLOCK,)
        z = tl.where(inside, z, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(z, 0))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        e = tl.exp(z - base)
        step = tl.where(row_max == float("-inf"), 0.0, row_max - base)  # what was summed moves to the new maximum
        decay = tl.where(row_max == float("-inf"), 0.0, tl.exp(step))
        moved = tl.where(decay == 0.0, 0.0, (weighted_sum + step * row_sum) * decay)  # step * row_sum may overflow
        weighted_sum = moved + tl.sum(tl.where(z == float("-inf"), 0.0, (z - base) * e), 0)
        row_sum = row_sum * decay + tl.sum(e, 0)
        row_max = new_max
    tl.store(p_state + r, row_max)
    tl.store(p_state + stride_state + r, row_sum)
    tl.store(p_state + 2 * stride_state + r, weighted_sum)
    target = tl.load(p_targets + r) - first_column
    if (target >= 0) & (target < v):
        x = tl.load(p_logits + target).to(tl.float32)
        if BIAS:
            x += tl.load(p_bias + target).to(tl.float32)
        tl.store(p_state + 3 * stride_state + r, scaled(x, cap, temperature, CAP))


@triton.jit(do_not_specialize=[*ROW_VECTORS, "T", "first_column", "v"])
def gradient_kernel(
    p_logits, p_out, p_mask, p_bias, p_targets, p_lse, p_constant, p_slope, p_at_target,
    stride_b, stride_t, stride_ob, stride_ot, T, first_column, v, cap, temperature,
    CAP: tl.constexpr, BIAS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of a block of columns of one row to the same row of p_out, which may be p_logits; 0 where the
    row is masked."""
    r = tl.program_id(0)
    offset, out = row_offset(r, T, stride_b, stride_t), row_offset(r, T, stride_ob, stride_ot)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < v
    if MASKED:
        unread = tl.load(p_mask + r) == 0.0
        if unread:
            tl.store(p_out + out + column, tl.zeros([BLOCK], p_out.dtype.element_ty), mask=inside)
            return
    x = load_logits(p_logits + offset, p_bias, column, inside, BIAS)  # (BLOCK,)
    slope_of_cap = 1.0
    if CAP:
        t = tanh(x / cap)
        slope_of_cap = 1.0 - t * t
        x = cap * t
    log_p = x / temperature - tl.load(p_lse + r)
    p = tl.exp(log_p)
    gradient = tl.where(p == 0.0, 0.0, p * (tl.load(p_constant + r) - tl.load(p_slope + r) * log_p))
    gradient = tl.where(column == tl.load(p_targets + r) - first_column, tl.load(p_at_target + r), gradient)
    gradient = gradient * slope_of_cap / temperature
    tl.store(p_out + out + column, gradient.to(p_out.dtype.element_ty), mask=inside)


def new_state(rows: int, like: Tensor) -> Tensor:
    """(4, rows) fp32: the state of rows of which nothing has been seen."""
    state = torch.zeros(4, rows, dtype=torch.float32, device=like.device)
    state[ROW_MAX] = float("-inf")
    return state


@on_its_device
def fold(
    logits: Tensor,
    targets: Tensor,
    state: Tensor,
    *,
    first_column: int = 0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> None:
    """Takes columns ``first_column``.. of rows into ``state`` (4, m), unit last stride.

    logits: (m, v) or (B, T, v), m = B T; raw, any float dtype, read once. bias (v,): the part that belongs to these
    columns. targets (m,): token ids, counted from the first column of the vocabulary. mask (m,) fp32: rows where it is
    0 are not read.
    """
    stride_b, stride_t, T, v = row_layout(logits)
    if not targets.shape[0] * v:
        return
    fold_kernel[(targets.shape[0],)](
        logits, state if mask is None else mask, targets if bias is None else bias, targets, state,
        stride_b, stride_t, state.stride(0), T, first_column, v, softcap or 1.0, temperature,
        CAP=softcap is not None, BIAS=bias is not None, MASKED=mask is not None,
        BLOCK=FOLD_COLUMNS if v > FEW_COLUMNS else FEW_COLUMNS, num_warps=8,
    )  # fmt: skip


def results(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the target, entropy and lse, each (m,), of rows whose whole vocabulary is in ``state``."""
    row_max, row_sum, weighted_sum, target_logit = state
    log_sum = row_sum.log()
    return target_logit - row_max - log_sum, log_sum - weighted_sum / row_sum, row_max + log_sum


@on_its_device
def gradient(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    constant: Tensor,
    slope: Tensor,
    at_target: Tensor,
    out: Tensor,
    *,
    first_column: int = 0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> None:
    """Writes the gradient of the raw logits; other arguments as of ``fold``, vectors (m,) fp32.

    out: like ``logits``, or ``logits`` itself; rows where the mask is 0 become 0.
    """
    stride_b, stride_t, T, v = row_layout(logits)
    stride_ob, stride_ot, _, _ = row_layout(out)
    m = targets.shape[0]
    if not m * v:
        return
    block = GRADIENT_COLUMNS if v > FEW_COLUMNS else FEW_COLUMNS
    gradient_kernel[(m, triton.cdiv(v, block))](
        logits, out, lse if mask is None else mask, targets if bias is None else bias, targets, lse, constant,
        slope, at_target, stride_b, stride_t, stride_ob, stride_ot, T, first_column, v, softcap or 1.0, temperature,
        CAP=softcap is not None, BIAS=bias is not None, MASKED=mask is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip


def row_layout(tensor: Tensor) -> tuple[int, int, int, int]:
    """Strides of B and T, T, and v of a (B, T, v) or (m, v) tensor."""
    if tensor.dim() == 2:
        return 0, tensor.stride(0), max(1, tensor.shape[0]), tensor.shape[1]
    return tensor.stride(0), tensor.stride(1), max(1, tensor.shape[1]), tensor.shape[2]
