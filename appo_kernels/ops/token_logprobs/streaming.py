"""token_logprobs, backend "torch": tiles of tokens x vocabulary on any device.

The vocabulary is the outer loop, so a half-precision weight is converted once and its gradient is written once.
Shapes: m of M rows, v of V vocabulary columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from appo_kernels.dispatch import Problem
from appo_kernels.dtypes import LOG_ZERO
from appo_kernels.vocabulary.torch_tiles import add_product_, logits_tile, operand, raw_gradient_, tile_shape, tiles


class Running(NamedTuple):
    """Per row, over the columns seen so far, each (M,)."""

    peak: Tensor  # largest logit
    total: Tensor  # sum of exp(z - peak)
    moment: Tensor  # sum of (z - peak) exp(z - peak)
    picked: Tensor  # logit of the target

    def rows(self, rows: slice) -> "Running":
        return Running(*(column[rows] for column in self))


def unsupported(problem: Problem) -> str | None:
    return None


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
    scratch, spare = lse.new_empty(2, tall * wide)
    running = Running(torch.full_like(lse, float("-inf")), *(torch.zeros_like(lse) for _ in range(3)))
    for columns in tiles(V, wide):
        weight_tile = operand(weight[columns])
        bias_tile = None if bias is None else bias[columns]
        for rows in tiles(M, tall):
            logits = logits_tile(operand(hidden[rows]), weight_tile, bias_tile, temperature, softcap, scratch)
            fold_tile(logits, targets[rows] - columns.start, running.rows(rows), spare)
    log_total = running.total.log()
    torch.add(running.peak, log_total, out=lse)
    torch.sub(running.picked - running.peak, log_total, out=logprobs)  # not through lse, which may be large and rounded
    torch.sub(log_total, running.moment / running.total, out=entropy)


def fold_tile(logits: Tensor, column: Tensor, running: Running, spare: Tensor) -> None:
    """Take one tile of logits (m, v), which is overwritten, into ``running`` (m,).

    column (m,): where in this tile the target stands; outside [0, v) when it is in another tile.
    """
    m, v = logits.shape
    here = (column >= 0) & (column < v)
    target_logit = logits.gather(1, column.clamp(0, v - 1).long()[:, None]).squeeze(1)
    running.picked.copy_(torch.where(here, target_logit, running.picked))

    peak = torch.maximum(running.peak, logits.amax(1))
    base = peak.masked_fill(peak == float("-inf"), 0.0)  # a row with nothing but -inf so far
    shifted = torch.sub(logits, base[:, None], out=spare[: m * v].view(m, v)).clamp_(min=LOG_ZERO)
    exponential = torch.exp(shifted, out=logits)
    step = (running.peak - base).clamp_(min=LOG_ZERO)  # what was summed relative to the old peak moves to the new one
    decay = step.exp()
    running.moment.add_(step * running.total).mul_(decay)
    running.total.mul_(decay).add_(exponential.sum(1))
    running.moment.add_(shifted.mul_(exponential).sum(1))
    running.peak.copy_(peak)


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
    scratch, spare, third = lse.new_empty(3, tall * wide)
    # Sums run in fp32: in the gradient itself where it is fp32, else in a buffer that is rounded once at the end.
    in_place = hidden.dtype == lse.dtype
    hidden_sum = grad_hidden if in_place or grad_hidden is None else lse.new_empty(M, D)
    weight_buffer = None if in_place or grad_weight is None else lse.new_empty(wide, D)
    if hidden_sum is not None:
        hidden_sum.zero_()
    for columns in tiles(V, wide):
        width = columns.stop - columns.start
        weight_tile = operand(weight[columns])
        bias_tile = None if bias is None else bias[columns]
        weight_sum = None
        if grad_weight is not None:
            weight_sum = (grad_weight[columns] if weight_buffer is None else weight_buffer[:width]).zero_()
        bias_sum = None if grad_bias is None else lse.new_zeros(width)
        for rows in tiles(M, tall):
            hidden_tile = operand(hidden[rows])
            logits = logits_tile(hidden_tile, weight_tile, bias_tile, temperature, softcap, scratch)
            gradient = tile_gradient(
                logits, targets[rows] - columns.start, temperature, softcap, logprobs[rows], entropy[rows], lse[rows],
                grad_logprobs[rows], grad_entropy[rows], grad_lse[rows], spare, third,
            )  # fmt: skip
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


def tile_gradient(
    logits: Tensor,
    column: Tensor,
    temperature: float,
    softcap: float | None,
    logprobs: Tensor,
    entropy: Tensor,
    lse: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    grad_lse: Tensor,
    spare: Tensor,
    third: Tensor,
) -> Tensor:
    """Gradient of the raw logits (before bias, cap and temperature) of one tile, (m, v), in ``spare``.

    d logprob / dz_v = [v = target] - p_v;  d entropy / dz_v = -p_v (log p_v + entropy);  d lse / dz_v = p_v.
    ``logits`` is overwritten; the other operands are (m,); ``column`` as in ``fold_tile``.
    """
    m, v = logits.shape
    log_p = torch.sub(logits, lse[:, None], out=spare[: m * v].view(m, v)).clamp_(min=LOG_ZERO)
    p = torch.exp(log_p, out=third[: m * v].view(m, v))
    constant = grad_lse - grad_logprobs - grad_entropy * entropy
    gradient = log_p.mul_(-grad_entropy[:, None]).add_(constant[:, None]).mul_(p)

    # 1 - p of the target as -expm1(log p): exact where p is close to 1.
    bounded = logprobs.clamp(min=LOG_ZERO)
    others = bounded.exp() * (grad_lse - grad_entropy * (bounded + entropy))
    at_target = others - grad_logprobs * torch.expm1(bounded)
    here = ((column >= 0) & (column < v))[:, None]
    index = column.clamp(0, v - 1).long()[:, None]
    gradient.scatter_(1, index, torch.where(here, at_target[:, None], gradient.gather(1, index)))
    return raw_gradient_(gradient, logits, temperature, softcap)
