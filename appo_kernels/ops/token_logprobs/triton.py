"""token_logprobs, backend "triton": the vendor's matrix products on tiles, one Triton pass over each tile."""

import torch
from torch import Tensor

from appo_kernels.dispatch import Problem
from appo_kernels.dtypes import LOG_ZERO
from appo_kernels.triton_launch import unsupported as _unsupported
from appo_kernels.vocabulary.torch_tiles import add_product_, operand, product, tile_shape, tiles
from appo_kernels.vocabulary.triton_rows import fold, gradient, new_state, results


def unsupported(problem: Problem) -> str | None:
    return _unsupported(problem)


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
    (M, D), V = hidden.shape, weight.shape[0]
    tall, wide = tile_shape(M, V, weight)
    tile = lse.new_empty(tall, wide)
    # d logprob = [v = target] - p;  d entropy = -p (log p + H);  d lse = p
    constant = grad_lse - grad_logprobs - grad_entropy * entropy
    slope = grad_entropy.contiguous()
    bounded = logprobs.clamp(min=LOG_ZERO)
    at_target = bounded.exp() * (grad_lse - grad_entropy * (bounded + entropy)) - grad_logprobs * torch.expm1(bounded)
    hidden_sum = None if grad_hidden is None else lse.new_zeros(M, D)
    for columns in tiles(V, wide):
        weight_tile = operand(weight[columns])
        weight_sum = None if grad_weight is None else lse.new_zeros(columns.stop - columns.start, D)
        bias_sum = None if grad_bias is None else lse.new_zeros(columns.stop - columns.start)
        for rows in tiles(M, tall):
            hidden_tile = operand(hidden[rows])
            logits = tile[: rows.stop - rows.start, : columns.stop - columns.start]
            product(hidden_tile, weight_tile.t(), out=logits)
            # The products want the gradient in the dtype of their other operand; the sum for the bias wants fp32.
            dz = logits if bias_sum is not None or hidden_tile.dtype == lse.dtype else torch.empty_like(
                logits, dtype=hidden_tile.dtype
            )  # fmt: skip
            gradient(
                logits, targets[rows], lse[rows], constant[rows], slope[rows], at_target[rows], dz,
                first_column=columns.start, bias=None if bias is None else bias[columns], temperature=temperature,
                softcap=softcap,
            )  # fmt: skip
            if bias_sum is not None:
                bias_sum += dz.sum(0)
            dz = dz.to(hidden_tile.dtype)
            if hidden_sum is not None:
                add_product_(hidden_sum[rows], dz, weight_tile)
            if weight_sum is not None:
                add_product_(weight_sum, dz.t(), hidden_tile)
        if grad_weight is not None and weight_sum is not None:
            grad_weight[columns] = weight_sum
        if grad_bias is not None and bias_sum is not None:
            grad_bias[columns] = bias_sum
    if grad_hidden is not None and hidden_sum is not None:
        grad_hidden.copy_(hidden_sum)
