"""Backend "torch": one row-wise pass over tiles of tokens, gradients formed in the forward. Any device.

``linear_forward`` needs 6 MVD (M tokens x V vocabulary x D hidden, two operations each): one product for the logits,
two for the gradients of hidden and weight. At level "sequence" a token's gradient depends on the log-probabilities of
its whole sequence, so the logits are formed twice: 8 MVD.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from appo_kernels import dispatch
from appo_kernels.dtypes import compute_dtype
from appo_kernels.ops.weighted_surrogate.kinds import MASK, SHARE, Options
from appo_kernels.ops.weighted_surrogate.loss import evaluate, token_slope
from appo_kernels.ops.weighted_surrogate.tokens import Tokens
from appo_kernels.vocabulary.output_head import OutputHead
from appo_kernels.vocabulary.torch_rows import Coefficients, block_rows, row_pass
from appo_kernels.vocabulary.torch_tiles import tiles


def unsupported(problem: dispatch.Problem) -> str | None:
    return None


def forward(
    logprobs: Tensor, table: Tensor, options: Options, loss: Tensor, metrics: Tensor, grad_logprobs: Tensor | None
) -> None:
    """Plain surrogate: ``logprobs`` (B, T); ``table`` (7, B, T) as in loss.py. Writes the last three."""
    value, slope, measured = evaluate(logprobs, table, options)
    loss.copy_(value)
    metrics.copy_(measured)
    if grad_logprobs is not None:
        grad_logprobs.copy_(slope)


def logits_forward(
    logits: Tensor,
    targets: Tensor,
    table: Tensor,
    options: Options,
    loss: Tensor,
    metrics: Tensor,
    grad_logits: Tensor | None,
) -> None:
    """``logits`` (B, T, V), ``targets`` (B, T). ``grad_logits``, like logits, may share its memory.

    Each block of rows is read for the last time before its gradient is written, one sequence after the other, so that
    any strides of the batch and token dimensions do. Level "sequence" reads all logits twice.
    """
    B, T, V = logits.shape
    dtype = compute_dtype(logits.dtype)
    logprobs, entropy = table.new_zeros(B, T), table.new_zeros(B, T)
    two_passes = options.sequence_ratio and grad_logits is not None
    step = block_rows(T, V, logits.device)
    tile = torch.empty(step, V, dtype=dtype, device=logits.device)
    for passes_left in (1, 0) if two_passes else (0,):
        slope = None
        if two_passes and not passes_left:
            slope = evaluate(logprobs, table, options, entropy)[1]
        with_gradient = grad_logits is not None and not passes_left
        for b in range(B):
            valid = (table[MASK, b] != 0).nonzero()[:, 0]
            kept = [valid[:0]]
            for block in tiles(valid.shape[0], step):
                position = valid[block]
                rows = tile[: position.shape[0]].copy_(logits[b].index_select(0, position))
                result = row_pass(
                    rows,
                    targets[b, position],
                    _coefficients(table[:, b, position], options, None if slope is None else slope[b, position])
                    if with_gradient
                    else None,
                    temperature=options.temperature,
                )
                logprobs[b, position], entropy[b, position] = result.logprobs, result.entropy
                if grad_logits is not None and result.kept is not None:
                    kept.append(position[result.kept])
                    grad_logits[b].index_copy_(0, kept[-1], rows[: kept[-1].shape[0]].to(grad_logits.dtype))
            if grad_logits is not None and with_gradient:
                zero = torch.ones(T, dtype=torch.bool, device=logits.device).index_fill_(0, torch.cat(kept), False)
                grad_logits[b].index_fill_(0, zero.nonzero()[:, 0], 0.0)
    value, _, measured = evaluate(logprobs, table, options, entropy)
    loss.copy_(value)
    metrics.copy_(measured)


def _coefficients(rows: Tensor, options: Options, slope: Tensor | None) -> Coefficients:
    """g and h of the rows of a tile. ``rows`` (7, m): their part of the table; ``slope`` (m,): g where it is known."""

    def coefficients(logprobs: Tensor, part: slice) -> tuple[Tensor, Tensor | None]:
        g = token_slope(logprobs, rows[:, part], options) if slope is None else slope[part]
        h = -options.entropy_coef * rows[SHARE, part] if options.entropy_coef != 0.0 else None
        return g.to(logprobs.dtype), None if h is None else h.to(logprobs.dtype)

    return coefficients


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    table: Tensor,
    tokens: Tokens,
    options: Options,
    loss: Tensor,
    metrics: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """``hidden`` (B, T, D), ``weight`` (V, D), ``bias`` (V,), ``targets`` (B, T). Writes the last five.

    Masked tokens enter no product, and tokens whose gradient is zero (A = 0, clipped) only the first.
    """
    B, T, D = hidden.shape
    dtype = compute_dtype(hidden.dtype)
    flat = tokens.order[: tokens.valid]
    batch, token = flat // max(1, T), flat % max(1, T)
    table_M, targets_M = table[:, batch, token], targets[batch, token].long()
    wants_grad = grad_hidden is not None or grad_weight is not None or grad_bias is not None
    head = OutputHead(weight, bias, grad_weight, grad_bias, flat.shape[0])
    logprobs, entropy = table.new_zeros(B * T), table.new_zeros(B * T)
    if grad_hidden is not None:
        grad_hidden.zero_()

    slope = None
    if options.sequence_ratio and wants_grad:
        for part in tiles(flat.shape[0], head.rows):
            logits = head.logits(hidden[batch[part], token[part]])
            result = row_pass(logits, targets_M[part], None, temperature=options.temperature, softcap=options.softcap)
            logprobs[flat[part]], entropy[flat[part]] = result.logprobs, result.entropy
        slope = evaluate(logprobs.view(B, T), table, options, entropy.view(B, T))[1][batch, token]

    for part in tiles(flat.shape[0], head.rows):
        x = hidden[batch[part], token[part]]  # (m, D)
        logits = head.logits(x)
        known = None if slope is None else slope[part]
        coefficients = _coefficients(table_M[:, part], options, known) if wants_grad else None
        result = row_pass(
            logits, targets_M[part], coefficients, temperature=options.temperature, softcap=options.softcap
        )
        logprobs[flat[part]], entropy[flat[part]] = result.logprobs, result.entropy
        if result.kept is None or not result.kept.shape[0]:
            continue
        grad_x = torch.empty(result.kept.shape[0], D, dtype=dtype, device=x.device) if grad_hidden is not None else None
        x = x if result.kept.shape[0] == x.shape[0] else x[result.kept]
        head.backward(logits[: result.kept.shape[0]], x, grad_x)
        if grad_hidden is not None and grad_x is not None:
            grad_hidden.view(B * T, D).index_copy_(0, flat[part][result.kept], grad_x.to(grad_hidden.dtype))
    head.finish()
    value, _, measured = evaluate(logprobs.view(B, T), table, options, entropy.view(B, T))
    loss.copy_(value)
    metrics.copy_(measured)


def row_terms(values: Tensor, table: Tensor, options: Options, loss: Tensor, metrics: Tensor) -> Tensor:
    """values: (2, B, T) log-probabilities and entropies. Writes loss and metrics, returns d loss / d logprob (B, T)."""
    value, slope, measured = evaluate(values[0], table, options, values[1])
    loss.copy_(value)
    metrics.copy_(measured)
    return slope


def scale_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """``gradients`` times ``factor`` (), in place; nothing is read or written where that is 1."""
    if gradients and factor.item() != 1.0:
        for gradient in gradients:
            gradient.mul_(factor)
