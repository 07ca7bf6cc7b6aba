"""Tiles of logits: what the operators that stream over the vocabulary share.

    logits = softcap(hidden weight^T + bias) / temperature, softcap(x) = cap tanh(x / cap), or x without one

Tiles are fp32 (fp64 for fp64 inputs) whatever the dtype of hidden and weight: with bf16 tiles, near-identical
distributions lose the differences that a divergence is made of.

Shapes: m rows of M, v vocabulary columns of V, D hidden size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from appo_kernels.dtypes import HALVES, compute_dtype

# Bytes of one tile of logits. On a CPU a tile is read again by the passes after its matrix product and should
# still be in the last level of cache then; a GPU wants few launches and matrix products that fill it.
CPU_LOGITS_TILE_BYTES, GPU_LOGITS_TILE_BYTES = 4 << 20, 128 << 20
# Rows of a tile: enough that reading the weight is cheap beside multiplying with it.
CPU_TILE_ROWS, GPU_TILE_ROWS = 512, 2048
# Bytes of the fp32 copy of one vocabulary tile of a half-precision weight, where products need such a copy.
WEIGHT_TILE_BYTES = 32 << 20


def operand(tensor: Tensor) -> Tensor:
    """``tensor`` as a matrix product reads it: half precision stays so on a GPU and becomes fp32 elsewhere.

    To be called once per vocabulary tile, not once per product: on a CPU it copies.
    """
    return tensor.float() if tensor.dtype in HALVES and not tensor.is_cuda else tensor


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b into ``out`` (fp32 or fp64); products of half-precision GPU tensors are accumulated in fp32."""
    if a.dtype in HALVES:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out=out)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a @ b with ``total`` in fp32 or fp64, added where the product is made: no other tensor of its size."""
    if a.dtype in HALVES:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.addmm_(a, b)


def convertible_columns(weight: Tensor) -> int:
    """Rows of ``weight`` (V, D) whose ``operand`` stays within WEIGHT_TILE_BYTES; V where ``operand`` makes no copy."""
    if weight.dtype not in HALVES or weight.is_cuda:
        return weight.shape[0]
    return max(64, WEIGHT_TILE_BYTES // (max(1, weight.shape[1]) * 4))


def tile_shape(rows: int, columns: int, weight: Tensor, *, tile_bytes: int | None = None) -> tuple[int, int]:
    """(rows, columns) of a tile of logits of at most about ``tile_bytes``, whatever the number of rows.

    Columns are also limited by the fp32 copy that ``operand`` makes of that many rows of ``weight`` (V, D).
    """
    on_gpu = weight.is_cuda
    item = compute_dtype(weight.dtype).itemsize
    budget = tile_bytes or (GPU_LOGITS_TILE_BYTES if on_gpu else CPU_LOGITS_TILE_BYTES)
    tall = max(1, min(rows, GPU_TILE_ROWS if on_gpu else CPU_TILE_ROWS))
    wide = min(max(64, budget // (tall * item)), convertible_columns(weight))
    return tall, whole_lines(columns, wide)


def whole_lines(columns: int, most: int) -> int:
    """Columns of a tile: all of them, or at most ``most`` (at least 64) so that rows of the tile start on a cache line.

    Matrix products and kernels read such rows in 16-byte pieces, and all widths look alike to a kernel's compiler.
    """
    return max(1, columns) if columns <= most else most // 64 * 64


def tiles(length: int, step: int) -> Iterator[slice]:
    """The slices of at most ``step`` that cover ``range(length)``, in order."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def logits_tile(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    scratch: Tensor,
) -> Tensor:
    """One tile of logits, (m, v), in the front of ``scratch`` (flat, at least m v elements, fp32 or fp64).

    hidden (m, D) and weight (v, D) have passed ``operand``; bias (v,) in any dtype.
    """
    m, v = hidden.shape[0], weight.shape[0]
    tile = product(hidden, weight.t(), out=scratch[: m * v].view(m, v))
    if bias is not None:
        tile += bias
    if softcap is not None:
        tile.div_(softcap).tanh_().mul_(softcap)
    return tile if temperature == 1.0 else tile.div_(temperature)


def raw_gradient_(gradient: Tensor, logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """In place: the gradient of (hidden weight^T + bias) from the ``gradient`` of ``logits``, both (m, v).

    ``logits`` is overwritten when there is a softcap.
    """
    if softcap is not None:  # d softcap(x) / dx = 1 - tanh^2, and tanh = logits temperature / cap
        slope = logits.mul_(temperature / softcap).square_().neg_().add_(1.0)
        gradient.mul_(slope)
    return gradient if temperature == 1.0 else gradient.div_(temperature)
