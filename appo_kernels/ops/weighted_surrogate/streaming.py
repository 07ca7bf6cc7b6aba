"""Backend "torch": one row-wise pass over tiles of tokens, gradients formed in the forward. Any device.

``linear_forward`` needs 6 MVD (M tokens x V vocabulary x D hidden, two operations each): one product for the logits,
two for the gradients of hidden and weight. At level "sequence" a token's gradient depends on the log-probabilities of
its whole sequence, so the logits are formed twice: 8 MVD.
"""

import torch
from torch import Tensor

from appo_kernels import dispatch
from appo_kernels.logits import HALVES, WEIGHT_TILE_BYTES, add_product_, compute_dtype, operand, product, tiles
from appo_kernels.ops.weighted_surrogate.loss import MASK, SHARE, Settings, evaluate, token_slope
from appo_kernels.ops.weighted_surrogate.rowwise import Coefficients, block_rows, row_pass

# Bytes of a tile of logits, whatever the number of tokens. Each further tile reads and writes the whole gradient of the
# weight once more: at a vocabulary of 152,064, tiles of 256 rows cost 6% over one product for 512 tokens, of 128 16%.
CPU_TILE_BYTES, GPU_TILE_BYTES = 160 << 20, 512 << 20
MAX_TILE_ROWS = 4096


def unsupported(problem: dispatch.Problem) -> str | None:
    return None


def forward(
    logprobs: Tensor, table: Tensor, settings: Settings, loss: Tensor, metrics: Tensor, grad_logprobs: Tensor | None
) -> None:
    """Plain surrogate: ``logprobs`` (B, T); ``table`` (7, B, T) as in loss.py. Writes the last three."""
    value, slope, measured = evaluate(logprobs, table, settings)
    loss.copy_(value)
    metrics.copy_(measured)
    if grad_logprobs is not None:
        grad_logprobs.copy_(slope)


def logits_forward(
    logits: Tensor,
    targets: Tensor,
    table: Tensor,
    settings: Settings,
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
    two_passes = settings.level == "sequence" and grad_logits is not None
    step = block_rows(T, V, logits.device)
    tile = torch.empty(step, V, dtype=dtype, device=logits.device)
    for passes_left in (1, 0) if two_passes else (0,):
        slope = None
        if two_passes and not passes_left:
            slope = evaluate(logprobs, table, settings, entropy)[1]
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
                    _coefficients(table[:, b, position], settings, None if slope is None else slope[b, position])
                    if with_gradient
                    else None,
                    temperature=settings.temperature,
                    softcap=settings.softcap,
                )
                logprobs[b, position], entropy[b, position] = result.logprobs, result.entropy
                if grad_logits is not None and result.kept is not None:
                    kept.append(position[result.kept])
                    grad_logits[b].index_copy_(0, kept[-1], rows[: kept[-1].shape[0]].to(grad_logits.dtype))
            if grad_logits is not None and with_gradient:
                zero = torch.ones(T, dtype=torch.bool, device=logits.device).index_fill_(0, torch.cat(kept), False)
                grad_logits[b].index_fill_(0, zero.nonzero()[:, 0], 0.0)
    value, _, measured = evaluate(logprobs, table, settings, entropy)
    loss.copy_(value)
    metrics.copy_(measured)


def _coefficients(rows: Tensor, settings: Settings, slope: Tensor | None) -> Coefficients:
    """g and h of the rows of a tile. ``rows`` (7, m): their part of the table; ``slope`` (m,): g where it is known."""

    def coefficients(logprobs: Tensor, part: slice) -> tuple[Tensor, Tensor | None]:
        g = token_slope(logprobs, rows[:, part], settings) if slope is None else slope[part]
        h = -settings.entropy_coef * rows[SHARE, part] if settings.entropy_coef != 0.0 else None
        return g.to(logprobs.dtype), None if h is None else h.to(logprobs.dtype)

    return coefficients


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    table: Tensor,
    settings: Settings,
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
    batch, token = (table[MASK] != 0).nonzero(as_tuple=True)
    flat = batch * T + token
    table_M, targets_M = table[:, batch, token], targets[batch, token].long()
    wants_grad = grad_hidden is not None or grad_weight is not None or grad_bias is not None
    head = _Head(weight, bias, grad_weight, grad_bias, flat.shape[0])
    logprobs, entropy = table.new_zeros(B * T), table.new_zeros(B * T)
    if grad_hidden is not None:
        grad_hidden.zero_()

    slope = None
    if settings.level == "sequence" and wants_grad:
        for part in tiles(flat.shape[0], head.rows):
            logits = head.logits(hidden[batch[part], token[part]])
            result = row_pass(logits, targets_M[part], None, temperature=settings.temperature, softcap=settings.softcap)
            logprobs[flat[part]], entropy[flat[part]] = result.logprobs, result.entropy
        slope = evaluate(logprobs.view(B, T), table, settings, entropy.view(B, T))[1][batch, token]

    for part in tiles(flat.shape[0], head.rows):
        x = hidden[batch[part], token[part]]  # (m, D)
        logits = head.logits(x)
        known = None if slope is None else slope[part]
        coefficients = _coefficients(table_M[:, part], settings, known) if wants_grad else None
        result = row_pass(
            logits, targets_M[part], coefficients, temperature=settings.temperature, softcap=settings.softcap
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
    value, _, measured = evaluate(logprobs.view(B, T), table, settings, entropy.view(B, T))
    loss.copy_(value)
    metrics.copy_(measured)


class _Head:
    """The three matrix products with the weight (V, D), one tile of tokens at a time, and the sums of its gradients.

    A weight in half precision is taken in slices of the vocabulary where the whole would need a buffer of its size: its
    products on a CPU, which are of an fp32 copy, and its gradient, which is summed over tiles in fp32.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None, tokens: int
    ) -> None:
        V, D = weight.shape
        self.weight, self.bias, self.grad_weight, self.grad_bias = weight, bias, grad_weight, grad_bias
        dtype = compute_dtype(weight.dtype)
        budget = GPU_TILE_BYTES if weight.is_cuda else CPU_TILE_BYTES
        self.rows = max(1, min(tokens, MAX_TILE_ROWS, budget // (V * dtype.itemsize)))
        self.tile = torch.empty(self.rows, V, dtype=dtype, device=weight.device)
        columns = V
        if weight.dtype in HALVES:
            columns = max(1, WEIGHT_TILE_BYTES * (8 if weight.is_cuda else 1) // (D * dtype.itemsize))
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
