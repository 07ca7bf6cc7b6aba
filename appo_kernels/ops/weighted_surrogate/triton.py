"""Backend "triton" of the surrogates: the vendor's matrix products, and two Triton passes over each tile of logits.

The first gives log-probabilities and entropies, then the loss tells each row's coefficients, then the second writes the
gradient. ``forward``, on log-probabilities, has no vocabulary in it and is torch's.
"""

from typing import Any

import torch
from torch import Tensor

from appo_kernels import dispatch
from appo_kernels.dtypes import compute_dtype
from appo_kernels.ops.weighted_surrogate import streaming
from appo_kernels.ops.weighted_surrogate.kinds import MASK, SHARE, Options
from appo_kernels.ops.weighted_surrogate.loss import evaluate, token_slope
from appo_kernels.triton_launch import unsupported as _unsupported
from appo_kernels.vocabulary.output_head import OutputHead
from appo_kernels.vocabulary.torch_tiles import tiles
from appo_kernels.vocabulary.triton_rows import fold, gradient, new_state, results

# Stands for the log-probability of an impossible token in products with its probability, which is 0.
IMPOSSIBLE = -1e4

forward = streaming.forward


def unsupported(problem: dispatch.Problem) -> str | None:
    return _unsupported(problem)


def row_coefficients(logprobs: Tensor, entropy: Tensor, g: Tensor, h: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """constant, slope and at_target of ``triton_rows``; g = d loss / d logprob, h = d loss / d entropy, all (m,).

    dz = g (onehot - p) - h p (log p + H)
    """
    h = torch.as_tensor(h, dtype=g.dtype, device=g.device).expand_as(g)
    p_terms = torch.where(logprobs > IMPOSSIBLE, logprobs.exp() * (logprobs + entropy), 0.0)
    return -g - h * entropy, h.contiguous(), -torch.expm1(logprobs) * g - h * p_terms


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

    Logits are read where they lie; the gradient of a row is written after its last read.
    """
    B, T, _ = logits.shape
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    flat = (table[MASK] != 0).view(-1).nonzero()[:, 0]
    targets_M = targets.reshape(-1)[flat].contiguous()
    state = new_state(flat.shape[0], table)
    scaling: dict[str, Any] = {"rows": flat, "temperature": options.temperature, "softcap": options.softcap}
    fold(logits, targets_M, state, **scaling)
    logprobs_M, entropy_M, lse_M = results(state)
    logprobs, entropy = table.new_zeros(B * T), table.new_zeros(B * T)
    logprobs[flat], entropy[flat] = logprobs_M, entropy_M
    value, slope, measured = evaluate(logprobs.view(B, T), table, options, entropy.view(B, T))
    loss.copy_(value)
    metrics.copy_(measured)
    if grad_logits is None:
        return
    target = grad_logits if grad_logits.stride(2) == 1 else torch.empty_like(logits)
    h = -options.entropy_coef * table[SHARE].reshape(-1)[flat]
    coefficients = row_coefficients(logprobs_M, entropy_M, slope.reshape(-1)[flat], h)
    gradient(logits, targets_M, lse_M, *coefficients, target, **scaling)
    for b, masked in enumerate(table[MASK] == 0):  # row by row of the batch: any strides, no copy of the gradient
        target[b].index_fill_(0, masked.nonzero()[:, 0], 0.0)
    if target is not grad_logits:
        grad_logits.copy_(target)


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    table: Tensor,
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
    batch, token = (table[MASK] != 0).nonzero(as_tuple=True)
    flat, M = batch * T + token, batch.shape[0]
    table_M, targets_M = table[:, batch, token], targets[batch, token].long()
    wants_grad = grad_hidden is not None or grad_weight is not None or grad_bias is not None
    head = OutputHead(weight, bias, grad_weight, grad_bias, M)
    logprobs, entropy, lse = table.new_zeros(3, M)
    scaling: dict[str, Any] = {"temperature": options.temperature, "softcap": options.softcap}
    if grad_hidden is not None:
        grad_hidden.zero_()

    def tile_results(part: slice) -> Tensor:
        logits = head.logits(hidden[batch[part], token[part]])
        state = new_state(logits.shape[0], logits)
        fold(logits, targets_M[part], state, **scaling)
        logprobs[part], entropy[part], lse[part] = results(state)
        return logits

    def evaluated() -> tuple[Tensor, Tensor, Tensor]:
        both = table.new_zeros(2, B * T)
        both[:, flat] = torch.stack([logprobs, entropy])
        return evaluate(both[0].view(B, T), table, options, both[1].view(B, T))

    slope = None
    if options.sequence_ratio and wants_grad:  # a token's gradient depends on its whole sequence
        for part in tiles(M, head.rows):
            tile_results(part)
        slope = evaluated()[1][batch, token]
    for part in tiles(M, head.rows):
        logits = tile_results(part)
        if not wants_grad:
            continue
        g = token_slope(logprobs[part], table_M[:, part], options) if slope is None else slope[part]
        h = -options.entropy_coef * table_M[SHARE, part]
        kept = ((g != 0) | (h != 0)).nonzero()[:, 0]
        if not kept.shape[0]:
            continue
        at = kept + part.start
        x = hidden[batch[at], token[at]]  # (k, D)
        dz = _gradient_buffer(logits, kept.shape[0], x.dtype, grad_bias is not None)
        gradient(
            logits, targets_M[at], lse[at], *row_coefficients(logprobs[at], entropy[at], g[kept], h[kept]), dz,
            rows=None if dz is logits else kept, **scaling,
        )  # fmt: skip
        grad_x = None
        if grad_hidden is not None:
            grad_x = torch.empty(kept.shape[0], D, dtype=compute_dtype(hidden.dtype), device=hidden.device)
        head.backward(dz, x, grad_x)
        if grad_hidden is not None and grad_x is not None:
            grad_hidden.view(B * T, D).index_copy_(0, flat[at], grad_x.to(grad_hidden.dtype))
    head.finish()
    value, _, measured = evaluated()
    loss.copy_(value)
    metrics.copy_(measured)


def _gradient_buffer(logits: Tensor, rows: int, dtype: torch.dtype, exact: bool) -> Tensor:
    """(rows, V) for the gradient: the logits themselves where all rows have one and products read fp32.

    exact: fp32 whatever products read, because columns are summed as well (the gradient of the bias).
    """
    dtype = dtype if logits.is_cuda and not exact else logits.dtype
    if rows == logits.shape[0] and dtype == logits.dtype:
        return logits
    return torch.empty(rows, logits.shape[1], dtype=dtype, device=logits.device)
