"""token_logprobs, backend "triton": the vendor's matrix products on tiles, one Triton pass over each tile."""

import torch
from torch import Tensor

from appo_kernels.ops.token_logprobs.arguments import Gradients, Projection, TokenLogprobs
from appo_kernels.ops.token_logprobs.gradients import backward_by_tiles, row_coefficients
from appo_kernels.triton_launch import unsupported as unsupported
from appo_kernels.vocabulary.torch_tiles import operand, product, tile_shape, tiles
from appo_kernels.vocabulary.triton_rows import fold, gradient, new_state
from appo_kernels.vocabulary.triton_rows import results as results_of


def forward(projection: Projection, targets: Tensor, results: TokenLogprobs) -> None:
    """Arguments as of ``streaming.forward``."""
    hidden, weight, bias, temperature, softcap = projection
    lse = results.lse
    (M, _), V = hidden.shape, weight.shape[0]
    tall, wide = tile_shape(M, V, weight)
    tile, state = lse.new_empty(tall, wide), new_state(M, lse)
    for columns in tiles(V, wide):
        weight_tile = operand(weight[columns])
        for rows in tiles(M, tall):
            logits = tile[: rows.stop - rows.start, : columns.stop - columns.start]
            product(operand(hidden[rows]), weight_tile.t(), out=logits)
            fold(
                logits, targets[rows], state[:, rows], first_column=columns.start,
                bias=None if bias is None else bias[columns], temperature=temperature, softcap=softcap,
            )  # fmt: skip
    for result, value in zip(results, results_of(state), strict=True):
        result.copy_(value)


def backward(
    projection: Projection, targets: Tensor, results: TokenLogprobs, upstream: TokenLogprobs, gradients: Gradients
) -> None:
    """Arguments as of ``streaming.backward``."""
    hidden, weight, bias, temperature, softcap = projection
    lse = results.lse
    tall, wide = tile_shape(hidden.shape[0], weight.shape[0], weight)
    tile = lse.new_empty(tall, wide)
    coefficients = row_coefficients(results, upstream._replace(entropy=upstream.entropy.contiguous()))

    def gradient_of_tile(hidden_tile: Tensor, weight_tile: Tensor, rows: slice, columns: slice) -> Tensor:
        """d loss / d logits (m, v) of some rows and columns."""
        logits = tile[: rows.stop - rows.start, : columns.stop - columns.start]
        product(hidden_tile, weight_tile.t(), out=logits)
        # The products want the gradient in the dtype of their other operand; the sum for the bias wants fp32.
        dz = logits
        if gradients.bias is None and hidden_tile.dtype != lse.dtype:
            dz = torch.empty_like(logits, dtype=hidden_tile.dtype)
        gradient(
            logits, targets[rows], lse[rows], *coefficients.rows(rows), dz, first_column=columns.start,
            bias=None if bias is None else bias[columns], temperature=temperature, softcap=softcap,
        )  # fmt: skip
        return dz

    backward_by_tiles(projection, gradients, lse.dtype, (tall, wide), gradient_of_tile)
