"""token_logprobs, backend "torch": tiles of tokens x vocabulary on any device.

The vocabulary is the outer loop, so a half-precision weight is converted once and its gradient is written once.
Shapes: m of M rows, v of V vocabulary columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from appo_kernels.dispatch import Problem
from appo_kernels.dtypes import LOG_ZERO
from appo_kernels.ops.token_logprobs.arguments import Gradients, Projection, TokenLogprobs
from appo_kernels.ops.token_logprobs.gradients import RowCoefficients, backward_by_tiles, row_coefficients
from appo_kernels.vocabulary.torch_tiles import logits_tile, operand, raw_gradient_, tile_shape, tiles


class Running(NamedTuple):
    """Per row, over the columns seen so far, each (M,)."""

    row_max: Tensor  # largest logit
    row_sum: Tensor  # sum of exp(z - row_max)
    weighted_sum: Tensor  # sum of (z - row_max) exp(z - row_max)
    target_logit: Tensor  # logit of the target

    def rows(self, rows: slice) -> "Running":
        return Running(*(column[rows] for column in self))


def unsupported(problem: Problem) -> str | None:
    return None


def forward(projection: Projection, targets: Tensor, results: TokenLogprobs) -> None:
    """Writes ``results`` of the targets (M,)."""
    hidden, weight, bias, temperature, softcap = projection
    logprobs, entropy, lse = results
    (M, _), V = hidden.shape, weight.shape[0]
    tall, wide = tile_shape(M, V, weight)
    scratch, spare = lse.new_empty(2, tall * wide)
    running = Running(torch.full_like(lse, float("-inf")), *(torch.zeros_like(lse) for _ in range(3)))
    for columns in tiles(V, wide):
        weight_tile = operand(weight[columns])
        bias_tile = None if bias is None else bias[columns]
        for rows in tiles(M, tall):
            logits = logits_tile(operand(hidden[rows]), weight_tile, bias_tile, temperature, softcap, scratch)
            fold_tile(logits, targets[rows] - columns.start, running.rows(rows), spare)
    log_sum = running.row_sum.log()
    torch.add(running.row_max, log_sum, out=lse)
    # Not through lse, which may be large and rounded.
    torch.sub(running.target_logit - running.row_max, log_sum, out=logprobs)
    torch.sub(log_sum, running.weighted_sum / running.row_sum, out=entropy)


def fold_tile(logits: Tensor, column: Tensor, running: Running, spare: Tensor) -> None:
    """Take one tile of logits (m, v), which is overwritten, into ``running`` (m,).

    column (m,): where in this tile the target stands; outside [0, v) when it is in another tile.
    """
    m, v = logits.shape
    here = (column >= 0) & (column < v)
    at_target = logits.gather(1, column.clamp(0, v - 1).long()[:, None]).squeeze(1)
    running.target_logit.copy_(torch.where(here, at_target, running.target_logit))

    row_max = torch.maximum(running.row_max, logits.amax(1))
    base = row_max.masked_fill(row_max == float("-inf"), 0.0)  # a row with nothing but -inf so far
    shifted = torch.sub(logits, base[:, None], out=spare[: m * v].view(m, v)).clamp_(min=LOG_ZERO)
    exponential = torch.exp(shifted, out=logits)
    step = (running.row_max - base).clamp_(min=LOG_ZERO)  # what was summed so far is moved to the new maximum
    decay = step.exp()
    running.weighted_sum.add_(step * running.row_sum).mul_(decay)
    running.row_sum.mul_(decay).add_(exponential.sum(1))
    running.weighted_sum.add_(shifted.mul_(exponential).sum(1))
    running.row_max.copy_(row_max)


def backward(
    projection: Projection, targets: Tensor, results: TokenLogprobs, upstream: TokenLogprobs, gradients: Gradients
) -> None:
    """Writes the ``gradients`` that are not None, from ``upstream``, those of ``results``."""
    hidden, weight, bias, temperature, softcap = projection
    lse = results.lse
    tall, wide = tile_shape(hidden.shape[0], weight.shape[0], weight)
    scratch, spare, third = lse.new_empty(3, tall * wide)
    coefficients = row_coefficients(results, upstream)

    def gradient_of_tile(hidden_tile: Tensor, weight_tile: Tensor, rows: slice, columns: slice) -> Tensor:
        """d loss / d logits (m, v) of some rows and columns."""
        bias_tile = None if bias is None else bias[columns]
        logits = logits_tile(hidden_tile, weight_tile, bias_tile, temperature, softcap, scratch)
        column = targets[rows] - columns.start
        return tile_gradient(logits, column, temperature, softcap, lse[rows], coefficients.rows(rows), spare, third)

    backward_by_tiles(projection, gradients, lse.dtype, (tall, wide), gradient_of_tile)


def tile_gradient(
    logits: Tensor,
    column: Tensor,
    temperature: float,
    softcap: float | None,
    lse: Tensor,
    coefficients: RowCoefficients,
    spare: Tensor,
    third: Tensor,
) -> Tensor:
    """Gradient of the raw logits (before bias, cap and temperature) of one tile, (m, v), in ``spare``.

    ``logits`` is overwritten; lse and coefficients are (m,); ``column`` as in ``fold_tile``.
    """
    m, v = logits.shape
    log_p = torch.sub(logits, lse[:, None], out=spare[: m * v].view(m, v)).clamp_(min=LOG_ZERO)
    p = torch.exp(log_p, out=third[: m * v].view(m, v))
    gradient = log_p.mul_(-coefficients.slope[:, None]).add_(coefficients.constant[:, None]).mul_(p)
    here = ((column >= 0) & (column < v))[:, None]
    index = column.clamp(0, v - 1).long()[:, None]
    at_target = torch.where(here, coefficients.at_target[:, None], gradient.gather(1, index))
    gradient.scatter_(1, index, at_target)
    return raw_gradient_(gradient, logits, temperature, softcap)
