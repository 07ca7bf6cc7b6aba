"""Parts of the backward pass that backends share: coefficients of a row's gradient, the loop over tiles of logits.

Shapes: M tokens, D hidden size, V vocabulary; a tile has m of the tokens and v of the columns.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from appo_kernels.dtypes import LOG_ZERO
from appo_kernels.ops.token_logprobs.arguments import Gradients, Projection, TokenLogprobs
from appo_kernels.vocabulary.torch_tiles import add_product_, operand, tiles


class RowCoefficients(NamedTuple):
    """d logprob / dz_v = [v = target] - p_v;  d entropy / dz_v = -p_v (log p_v + entropy);  d lse / dz_v = p_v.

    With the three upstream gradients (M,), that of a logit is p_v (constant - slope log p_v), and at_target for the
    target.
    """

    constant: Tensor  # (M,)
    slope: Tensor  # (M,)
    at_target: Tensor  # (M,)

    def rows(self, rows: slice) -> "RowCoefficients":
        return RowCoefficients(*(column[rows] for column in self))


def row_coefficients(results: TokenLogprobs, upstream: TokenLogprobs) -> RowCoefficients:
    """Of the results, and the gradients of each."""
    (logprobs, entropy, _), (grad_logprobs, grad_entropy, grad_lse) = results, upstream
    constant = grad_lse - grad_logprobs - grad_entropy * entropy
    # 1 - p of the target as -expm1(log p): exact where p is close to 1.
    bounded = logprobs.clamp(min=LOG_ZERO)
    others = bounded.exp() * (grad_lse - grad_entropy * (bounded + entropy))
    return RowCoefficients(constant, grad_entropy, others - grad_logprobs * torch.expm1(bounded))


def backward_by_tiles(
    projection: Projection,
    gradients: Gradients,
    sum_dtype: torch.dtype,
    tile: tuple[int, int],
    tile_gradient: Callable[[Tensor, Tensor, slice, slice], Tensor],
) -> None:
    """Write the ``gradients`` that are wanted, tile after tile.

    tile_gradient(hidden_tile (m, D), weight_tile (v, D), rows, columns) gives that of a tile of raw logits, (m, v).
    Sums run in ``sum_dtype``: in the gradient itself where it has that, else in a buffer that is rounded once.
    """
    hidden, weight = projection.hidden, projection.weight
    grad_hidden, grad_weight, grad_bias = gradients
    (M, D), V = hidden.shape, weight.shape[0]
    tall, wide = tile
    in_place = hidden.dtype == sum_dtype
    hidden_sum = grad_hidden if in_place or grad_hidden is None else hidden.new_empty(M, D, dtype=sum_dtype)
    weight_buffer = None if in_place or grad_weight is None else weight.new_empty(wide, D, dtype=sum_dtype)
    if hidden_sum is not None:
        hidden_sum.zero_()
    for columns in tiles(V, wide):
        width = columns.stop - columns.start
        weight_tile = operand(weight[columns])
        weight_sum = None
        if grad_weight is not None:
            weight_sum = (grad_weight[columns] if weight_buffer is None else weight_buffer[:width]).zero_()
        bias_sum = None if grad_bias is None else hidden.new_zeros(width, dtype=sum_dtype)
        for rows in tiles(M, tall):
            hidden_tile = operand(hidden[rows])
            gradient = tile_gradient(hidden_tile, weight_tile, rows, columns)
            if bias_sum is not None:
                bias_sum += gradient.sum(0)
            gradient = gradient.to(weight_tile.dtype)
            if hidden_sum is not None:
                add_product_(hidden_sum[rows], gradient, weight_tile)
            if weight_sum is not None:
                add_product_(weight_sum, gradient.t(), hidden_tile)
        if grad_weight is not None and weight_buffer is not None:
            grad_weight[columns] = weight_buffer[:width]
        if grad_bias is not None and bias_sum is not None:
            grad_bias[columns] = bias_sum
    if grad_hidden is not None and hidden_sum is not None and not in_place:
        grad_hidden.copy_(hidden_sum)
