"""The matrix products of an output head, by tiles of tokens: logits, and the gradients of hidden, weight and bias.

Shapes: m tokens of a tile, k of them with a gradient, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from appo_kernels.dtypes import HALVES, compute_dtype
from appo_kernels.vocabulary.torch_tiles import WEIGHT_TILE_BYTES, add_product_, operand, product, tiles

# Bytes of a tile of logits, whatever the number of tokens. Each further tile reads and writes the whole gradient of the
# weight once more: at a vocabulary of 152,064, tiles of 256 rows cost 6% over one product for 512 tokens, of 128 16%.
# On a GPU a tile may take what the fp32 sum of that gradient would, if it then holds all tokens: nothing is summed.
CPU_HEAD_TILE_BYTES, GPU_HEAD_TILE_BYTES = 160 << 20, 512 << 20
MAX_TILE_ROWS = 4096
LINE = 64  # elements
ROW_MULTIPLE = 128  # rows of a tile of the vendor's products on a GPU


def tile_rows(tokens: int, V: int, D: int, item: int, *, on_gpu: bool) -> int:
    """Tokens of a tile of logits, at least 1."""
    budget = GPU_HEAD_TILE_BYTES if on_gpu else CPU_HEAD_TILE_BYTES
    if on_gpu and tokens <= min(D, MAX_TILE_ROWS):
        budget = max(budget, V * D * item)
    rows = max(1, min(MAX_TILE_ROWS, budget // (max(1, V) * item)))
    if on_gpu and rows > ROW_MULTIPLE:
        rows = rows // ROW_MULTIPLE * ROW_MULTIPLE
    return max(1, min(tokens, rows))


class OutputHead:
    """The three matrix products with the weight (V, D), one tile of tokens at a time, and the sums of its gradients.

    A weight in half precision is taken in slices of the vocabulary where the whole would need a buffer of its size: its
    products on a CPU, which are of an fp32 copy, and its gradient, which is summed over tiles in fp32.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None, tokens: int
    ) -> None:
        """weight (V, D), bias (V,), buffers for their gradients or None; tokens: how many there will be in all."""
        V, D = weight.shape
        self.weight, self.bias, self.grad_weight, self.grad_bias = weight, bias, grad_weight, grad_bias
        dtype = compute_dtype(weight.dtype)
        self.rows = tile_rows(tokens, V, D, dtype.itemsize, on_gpu=weight.is_cuda)
        self.tile = torch.empty(self.rows, V, dtype=dtype, device=weight.device)
        columns = V
        if weight.dtype in HALVES:
            most = WEIGHT_TILE_BYTES * (8 if weight.is_cuda else 1) // (max(1, D) * dtype.itemsize)
            # Slices start on a cache line: the vendor's fast products read 16 bytes at a time.
            columns = most // LINE * LINE if most >= LINE else max(1, most)
        self.slices = list(tiles(V, columns))
        self.weight_slices = [slice(0, V)] if weight.is_cuda else self.slices
        several = tokens > self.rows
        self.weight_sum, self.bias_sum = grad_weight, grad_bias
        if grad_weight is not None and grad_weight.dtype != dtype:
            self.weight_sum = torch.empty(V, D, dtype=dtype, device=weight.device) if several else None
        if grad_bias is not None and grad_bias.dtype != dtype:
            self.bias_sum = torch.empty(V, dtype=dtype, device=weight.device)
        self.started = False

    def logits(self, x: Tensor) -> Tensor:
        """(m, V) of ``x`` (m, D), in the tile: valid until the next call."""
        tile = self.tile[: x.shape[0]]
        x = operand(x)
        for v in self.weight_slices:
            product(x, operand(self.weight[v]).t(), out=tile[:, v])
        return tile if self.bias is None else tile.add_(self.bias)

    def backward(self, dz: Tensor, x: Tensor, grad_x: Tensor | None) -> None:
        """Adds dz^T x and the column sums of ``dz`` (k, V) to the gradients; ``grad_x`` (k, D) becomes dz W."""
        if self.bias_sum is not None:
            summed = dz.sum(0)
            self.bias_sum.add_(summed) if self.started else self.bias_sum.copy_(summed)
        dz = dz.to(x.dtype) if dz.is_cuda else dz
        x = operand(x)
        if grad_x is not None:
            for v in self.weight_slices:
                weight = operand(self.weight[v])
                product(dz[:, v], weight, out=grad_x) if v.start == 0 else add_product_(grad_x, dz[:, v], weight)
        for v in self.slices:
            if self.grad_weight is None:
                break
            left = dz[:, v].t()
            if self.weight_sum is None:
                slice_sum = torch.empty(left.shape[0], x.shape[1], dtype=self.tile.dtype, device=x.device)
                self.grad_weight[v] = product(left, x, out=slice_sum)
            elif self.started:
                add_product_(self.weight_sum[v], left, x)
            else:
                product(left, x, out=self.weight_sum[v])
        self.started = True

    def finish(self) -> None:
        """Writes the summed gradients where they belong."""
        for total, result in ((self.weight_sum, self.grad_weight), (self.bias_sum, self.grad_bias)):
            if result is None:
                continue
            if not self.started:
                result.zero_()
            elif total is not None and total is not result:
                result.copy_(total)
