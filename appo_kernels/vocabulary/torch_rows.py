"""The row-wise pass over a tile of logits: log-probabilities, entropies, and d loss / d logits written in its place.

It is all that lies between the matrix products of ``linear_weighted_surrogate``, and the whole of
``logits_weighted_surrogate``. Shapes: m rows of a tile, V vocabulary.

    dz = g (onehot - p) - h p (log p + H),   g = d loss / d logprob,   h = d loss / d entropy
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from appo_kernels.dtypes import LOG2_E, LOG_ZERO
from appo_kernels.vocabulary.torch_tiles import tiles

# Bytes of logits that a CPU takes at a time: they, and the probabilities beside them, stay in cache through all passes.
CPU_BLOCK_BYTES = 4 << 20

# (logprobs of some rows, which rows of the tile) -> g and h of them; h is None when the loss has no entropy term.
Coefficients = Callable[[Tensor, slice], tuple[Tensor, Tensor | None]]


class RowPass(NamedTuple):
    logprobs: Tensor  # (m,) of the targets
    entropy: Tensor  # (m,)
    # (k,) int64, ascending: the rows whose gradient is not zero; dz is in the first k rows of the tile.
    kept: Tensor | None


def block_rows(rows: int, vocabulary: int, device: torch.device) -> int:
    """Rows of logits to take at a time."""
    if device.type == "cuda":
        return max(rows, 1)
    return max(1, min(rows, CPU_BLOCK_BYTES // (vocabulary * 4)))


def row_pass(
    logits: Tensor,
    targets: Tensor,
    coefficients: Coefficients | None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> RowPass:
    """``logits`` (m, V) fp32 or fp64, before soft cap and temperature, is overwritten; ``targets`` (m,) int64.

    With ``coefficients``, its first k rows become d loss / d logits (before soft cap and temperature) of the rows whose
    g or h is not zero, packed together so that the products that follow read nothing else. Without, only the results.
    """
    m, vocabulary = logits.shape
    step = block_rows(m, vocabulary, logits.device)
    logprobs, entropy = logits.new_empty(m), logits.new_empty(m)
    probability_block = logits.new_empty(step, vocabulary)
    tanh_block = None if softcap is None else torch.empty_like(probability_block)
    kept: list[Tensor] = []
    used = 0
    for rows in tiles(m, step):
        z = logits[rows]
        p = probability_block[: z.shape[0]]
        tanh = None
        if softcap is not None and tanh_block is not None:
            tanh = torch.div(z, softcap, out=tanh_block[: z.shape[0]]).tanh_()
            torch.mul(tanh, softcap, out=z)
        if temperature != 1.0:
            z.div_(temperature)

        # One exponential, to base 2 as it takes half the time of base e. p is not divided by its sum until it is used.
        row_max = z.amax(1, keepdim=True)
        z.sub_(row_max)
        row_sum = torch.mul(z, LOG2_E, out=p).exp2_().sum(1)
        log_sum = row_sum.log()
        logprobs[rows] = z.gather(1, targets[rows, None])[:, 0] - log_sum
        block_entropy = log_sum - torch.linalg.vecdot(p, z) / row_sum
        if not bool(block_entropy.isfinite().all()):  # 0 * -inf of tokens that logits of -inf forbid
            z.clamp_(min=LOG_ZERO)
            block_entropy = log_sum - torch.linalg.vecdot(p, z) / row_sum
        entropy[rows] = block_entropy
        if coefficients is None:
            continue

        g, h = coefficients(logprobs[rows], rows)
        keep = (g != 0 if h is None else (g != 0) | (h != 0)).nonzero()[:, 0]
        k = keep.shape[0]
        if k == 0:
            continue
        target, logp = targets[rows], logprobs[rows]
        if k < z.shape[0]:
            p, target, logp, g, row_sum = p[keep], target[keep], logp[keep], g[keep], row_sum[keep]
            tanh = None if tanh is None else tanh[keep]
            if h is not None:
                z, h, log_sum, block_entropy = z[keep], h[keep], log_sum[keep], block_entropy[keep]
        dz = logits[used : used + k]
        at_target = -torch.expm1(logp) * g  # 1 - p without cancellation
        if h is None:
            torch.mul(p, (-g / (row_sum * temperature))[:, None], out=dz)
        else:
            z.add_((block_entropy - log_sum)[:, None]).mul_(h[:, None]).add_(g[:, None])  # h (log p + H) + g
            dz.copy_(p.mul_(z).div_((-temperature * row_sum)[:, None]))  # not straight into dz: it can overlap z
            at_target = at_target - h * torch.where(logp > LOG_ZERO, logp.exp() * (logp + block_entropy), 0.0)
        dz.scatter_(1, target[:, None], (at_target / temperature)[:, None])
        if tanh is not None:
            dz.addcmul_(dz, tanh.square_(), value=-1)
        kept.append(keep + rows.start)
        used += k
    if coefficients is None:
        return RowPass(logprobs, entropy, None)
    return RowPass(logprobs, entropy, torch.cat(kept) if kept else targets.new_empty(0))
