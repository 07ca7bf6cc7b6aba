"""token_logprobs, backend "triton": the vendor's matrix products on tiles, one Triton pass over each tile."""

import torch
from torch import Tensor

from appo_kernels.ops.token_logprobs.gradients import backward_by_tiles, row_coefficients
from appo_kernels.triton_launch import unsupported as unsupported
from appo_kernels.vocabulary.torch_tiles import operand, product, tile_shape, tiles
from appo_kernels.vocabulary.triton_rows import fold, gradient, new_state, results


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logprobs: Tensor,
    entropy: Tensor,
    lse: Tensor,
) -> None:
    """Arguments as of ``streaming.forward``."""
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
    for result, value in zip((logprobs, entropy, lse), results(state), strict=True):
        result.copy_(value)


def backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logprobs: Tensor,
    entropy: Tensor,
    lse: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    grad_lse: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Arguments as of ``streaming.backward``."""
    tall, wide = tile_shape(hidden.shape[0], weight.shape[0], weight)
    tile = lse.new_empty(tall, wide)
    coefficients = row_coefficients(logprobs, entropy, grad_logprobs, grad_entropy.contiguous(), grad_lse)

    def gradient_of_tile(hidden_tile: Tensor, weight_tile: Tensor, rows: slice, columns: slice) -> Tensor:
        """d loss / d logits (m, v) of some rows and columns."""
        logits = tile[: rows.stop - rows.start, : columns.stop - columns.start]
        product(hidden_tile, weight_tile.t(), out=logits)
        # The products want the gradient in the dtype of their other operand; the sum for the bias wants fp32.
        dz = logits
        if grad_bias is None and hidden_tile.dtype != lse.dtype:
            dz = torch.empty_like(logits, dtype=hidden_tile.dtype)
        gradient(
            logits, targets[rows], lse[rows], *coefficients.rows(rows), dz, first_column=columns.start,
            bias=None if bias is None else bias[columns], temperature=temperature, softcap=softcap,
        )  # fmt: skip
        return dz

    backward_by_tiles(hidden, weight, grad_hidden, grad_weight, grad_bias, lse.dtype, (tall, wide), gradient_of_tile)
