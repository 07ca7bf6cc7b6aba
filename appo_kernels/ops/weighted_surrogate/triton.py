"""Backend "triton" of the surrogates: the vendor's matrix products, and Triton passes over tokens and tiles of logits.

``terms_kernel`` has the loss of every token, its derivative and the sums of both; ``triton_rows`` the two passes over
logits, between which it turns log-probabilities into the coefficients of each row's gradient. Without its matrix
products a call is four launches, and three more for each tile.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from appo_kernels.dtypes import compute_dtype
from appo_kernels.ops.weighted_surrogate import triton_terms
from appo_kernels.ops.weighted_surrogate.kinds import MASK, Options
from appo_kernels.ops.weighted_surrogate.tokens import Tokens
from appo_kernels.triton_launch import on_its_device
from appo_kernels.triton_launch import unsupported as unsupported
from appo_kernels.vocabulary.output_head import OutputHead
from appo_kernels.vocabulary.torch_tiles import tiles
from appo_kernels.vocabulary.triton_rows import fold, gradient, new_state, row_layout

BLOCK = 512  # tokens that a program has at a time
SCALED = 4096  # columns of a program of ``scale_``
KIND = {"clip": 0, "gspo_token": 0, "cispo": 1, "sapo": 2, "dppo_tv": 3, "gpg": 4}


@on_its_device
def terms(
    values: Tensor,
    table: Tensor,
    options: Options,
    *,
    tokens: int,
    loss: Tensor | None = None,
    metrics: Tensor | None = None,
    slope: Tensor | None = None,
    rows: Tensor | None = None,
) -> None:
    """Everything that log-probabilities give, written into those of the last four that are there.

    values: rows of n = B T tokens, a unit last stride: log-probabilities (1, n), with entropies (2, n), or the state
    (4, n) that ``fold`` leaves. table: (7, n), a unit last stride. tokens: T. loss (), metrics (10,); slope (n,)
    d loss / d logprob; rows (4, n): lse, constant, slope and at_target of ``triton_rows.gradient``.
    """
    (given, n), o = values.shape, options
    responses = n // tokens if tokens else 0
    parts = 1 if o.sequence_ratio else triton.cdiv(tokens, BLOCK)
    count = responses * parts
    sums = torch.empty(max(1, count) * triton_terms.LANES, dtype=torch.float64, device=values.device)
    outputs = [values] * 4 if rows is None else list(rows.unbind())
    lse, constant, row_slope, at_target = outputs
    if count and (loss is not None or slope is not None or rows is not None):
        triton_terms.terms_kernel[(parts, responses)](
            values, table, sums, row_slope if slope is None else slope, lse, constant, at_target,
            values.stride(0), table.stride(0), tokens,
            o.eps_low, o.eps_high, 0.0 if o.delta is None else o.delta, o.beta, o.entropy_coef,
            KIND=KIND[o.kind], DELTA=o.delta is not None, SEQUENCE=o.sequence_ratio, COUPLED=o.couples_tokens,
            BETA=o.beta != 0.0, KL_RATIO=o.kl_ratio,
            COUPLED_KL=o.beta != 0.0 and o.kl_ratio and o.level == "sequence" and o.kind != "gspo_token",
            GIVEN=given, SUM=loss is not None, SLOPE=slope is not None, ROWS=rows is not None,
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    if loss is not None:
        triton_terms.sums_kernel[(1,)](sums, loss, metrics, count, HAS_ENTROPY=given > 1, num_warps=1)


def forward(
    logprobs: Tensor, table: Tensor, options: Options, loss: Tensor, metrics: Tensor, grad_logprobs: Tensor | None
) -> None:
    """Plain surrogate: ``logprobs`` (B, T); ``table`` (7, B, T) as in loss.py. Writes the last three."""
    slope = None if grad_logprobs is None else grad_logprobs.view(-1)
    terms(
        logprobs.reshape(1, -1), table.flatten(1), options, tokens=logprobs.shape[1], loss=loss, metrics=metrics,
        slope=slope,
    )  # fmt: skip


def row_terms(values: Tensor, table: Tensor, options: Options, loss: Tensor, metrics: Tensor) -> Tensor:
    """values: (2, B, T) log-probabilities and entropies. Writes loss and metrics, returns d loss / d logprob (B, T)."""
    slope = torch.empty_like(values[0])
    terms(
        values.flatten(1), table.flatten(1), options, tokens=values.shape[2], loss=loss, metrics=metrics,
        slope=slope.view(-1),
    )  # fmt: skip
    return slope


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
    table, targets = table.flatten(1), targets.reshape(-1)
    state = new_state(B * T, table)
    scaling: dict[str, Any] = {"mask": table[MASK], "temperature": options.temperature}
    fold(logits, targets, state, **scaling)
    rows = None if grad_logits is None else torch.empty_like(state)
    terms(state, table, options, tokens=T, loss=loss, metrics=metrics, rows=rows)
    if grad_logits is None or rows is None:
        return
    target = grad_logits if grad_logits.stride(2) == 1 else torch.empty_like(logits)
    lse, constant, slope, at_target = rows
    gradient(logits, targets, lse, constant, slope, at_target, target, **scaling)
    if target is not grad_logits:
        grad_logits.copy_(target)


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

    Masked tokens enter no product, and tokens that move nothing whatever their ratio (A = 0) only the first.
    """
    B, T, D = hidden.shape
    M, learning = tokens.valid, tokens.learning
    flat = tokens.order[:M]
    batch, token = flat // max(1, T), flat % max(1, T)
    table_M, targets_M = table.flatten(1)[:, flat], targets[batch, token].long()
    wants_grad = grad_hidden is not None or grad_weight is not None or grad_bias is not None
    head = OutputHead(weight, bias, grad_weight, grad_bias, M)
    scaling: dict[str, Any] = {"temperature": options.temperature, "softcap": options.softcap}
    state, rows = new_state(M, table), torch.empty(4, M, dtype=table.dtype, device=table.device)
    if grad_hidden is not None:
        grad_hidden.zero_()

    def fold_tile(part: slice) -> Tensor:
        logits = head.logits(hidden[batch[part], token[part]])
        fold(logits, targets_M[part], state[:, part], **scaling)
        return logits

    def evaluate(rows: Tensor | None = None) -> None:
        """Loss and metrics of all tokens in their places."""
        in_place = new_state(B * T, table).index_copy_(1, flat, state)
        terms(in_place, table.flatten(1), options, tokens=T, loss=loss, metrics=metrics, rows=rows)

    if options.sequence_ratio and wants_grad:  # a token's gradient depends on its whole sequence
        for part in tiles(M, head.rows):
            fold_tile(part)
        rows_BT = torch.empty(4, B * T, dtype=table.dtype, device=table.device)
        evaluate(rows_BT)
        rows, state = rows_BT[:, flat], new_state(M, table)
    for part in tiles(M, head.rows):
        logits = fold_tile(part)
        k = min(learning, part.stop) - part.start  # tokens with a gradient come first
        if not wants_grad or k <= 0:
            continue
        with_gradient = slice(part.start, part.start + k)
        if not options.sequence_ratio:
            terms(
                state[:, with_gradient], table_M[:, with_gradient], options, tokens=k,
                rows=rows[:, with_gradient],
            )  # fmt: skip
        x = hidden[batch[with_gradient], token[with_gradient]]  # (k, D)
        dz = _gradient_buffer(logits[:k], x.dtype, grad_bias is not None)
        lse, constant, slope, at_target = rows[:, with_gradient]
        gradient(logits[:k], targets_M[with_gradient], lse, constant, slope, at_target, dz, **scaling)
        grad_x = None
        if grad_hidden is not None:
            grad_x = torch.empty(k, D, dtype=compute_dtype(hidden.dtype), device=hidden.device)
        head.backward(dz, x, grad_x)
        if grad_hidden is not None and grad_x is not None:
            grad_hidden.view(B * T, D).index_copy_(0, flat[with_gradient], grad_x.to(grad_hidden.dtype))
    head.finish()
    if not (options.sequence_ratio and wants_grad):
        evaluate()


def _gradient_buffer(logits: Tensor, dtype: torch.dtype, exact: bool) -> Tensor:
    """(k, V) for the gradient: the logits themselves where products read fp32.

    exact: fp32 whatever products read, because columns are summed as well (the gradient of the bias).
    """
    dtype = dtype if logits.is_cuda and not exact else logits.dtype
    return logits if dtype == logits.dtype else torch.empty(logits.shape, dtype=dtype, device=logits.device)


def scale_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Arguments as of ``streaming.scale_``; the host does not wait to know the factor."""
    for values in gradients:
        if values.dim() == 1:
            _scale(values[None], factor)
        elif values.dim() <= 3 and values.stride(-1) == 1:
            _scale(values, factor)
        else:
            values.mul_(factor)


@on_its_device
def _scale(values: Tensor, factor: Tensor) -> None:
    stride_b, stride_t, T, v = row_layout(values)
    if values.numel():
        blocks = triton.cdiv(v, SCALED)
        triton_terms.scale_kernel[(values.numel() // v * blocks,)](
            values, factor, stride_b, stride_t, T, v, blocks, BLOCK=SCALED, num_warps=8
        )
