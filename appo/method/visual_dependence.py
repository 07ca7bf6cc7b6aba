"""The share of each token's attention that is on the video, and token weights made of it (docs/own_method.md).

Shapes: G responses of one prompt, N response tokens, F frames.
"""

import torch
from torch import Tensor

from appo.method.selection import check_mask
from appo.method.token_weights import mean_one
from appo_kernels import checks


def top_share(score: Tensor, mask: Tensor, *, share: float) -> Tensor:
    """True (G, N) at the ceil(share * valid tokens) valid tokens of each response with the largest score.

    Ties go to the earlier token. Raises ValueError for a share outside (0, 1], wrong shapes and dtypes.
    """
    op = "top_share"
    _check(op, score, mask)
    share = checks.number(op, "share", share, "a number in (0, 1]", "0.4 keeps two fifths.", above=0.0, most=1.0)
    # In double: 0.2 * 5 in single precision is a little more than 1.
    count = (mask.sum(1, keepdim=True).double() * share - 1e-9).ceil()
    order = score.detach().masked_fill(~mask, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    rank = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    chosen = torch.zeros_like(mask).scatter(1, order, rank < count)
    return chosen & mask


def filtered_weights(score: Tensor, mask: Tensor, *, share: float, floor: float) -> Tensor:
    """Weights (G, N) fp32 that keep the tokens of largest score, times a factor of the response (VPPO).

    With s_i the mean score of response i over its valid tokens, and u_i = (s_i - min s) / (max s - min s) over the
    responses of the group that have any: the factor is floor + u_i (1 - floor) / mean u, whose mean is 1; 1 for all
    where the s_i are equal.

    Args:
        score: (G, N) of at least 0, such as the sum of a token's mass over all frames.
        mask: (G, N) bool.
        share: of a response's tokens that are kept, in (0, 1].
        floor: the smallest factor, in [0, 1].

    Returns:
        (G, N) fp32, 0 at tokens that are left out and where masked. Detached.
    """
    op = "filtered_weights"
    _check(op, score, mask)
    floor = checks.number(op, "floor", floor, "a number in [0, 1]", "0.9 in VPPO's scripts.", least=0.0, most=1.0)
    score = score.detach().float().masked_fill(~mask, 0)
    kept = top_share(score, mask, share=share).float()
    some = mask.any(1)
    if not bool(some.any()):
        return kept
    mean = score.sum(1) / mask.sum(1).clamp(min=1)
    low, high = mean[some].min(), mean[some].max()
    if float(high - low) <= 1e-6 * float(high):
        return kept
    place = ((mean - low) / (high - low)).clamp(0, 1)
    factor = floor + place * (1 - floor) / place[some].mean()
    return kept * factor[:, None]


def gated_weights(score: Tensor, mask: Tensor, *, share: float, alpha: float, normalise: str | None) -> Tensor:
    """Weights (G, N) fp32: 1 + alpha u at the tokens of largest score, 1 at the others, of mean 1 if asked (PGPO).

    u is the score, brought to 0..1 over a response's valid tokens; ``share`` of them pass the gate. With
    ``normalise="mean"`` what these tokens gain the others lose: a response's weights sum up to its number of tokens.
    """
    op = "gated_weights"
    _check(op, score, mask)
    checks.number(op, "alpha", alpha, "a finite number of at least 0", "1.7 as in APPO.", least=0.0)
    score = score.detach().float()
    low = score.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = score.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    scaled = ((score - low) / (high - low + 1e-8)).where(top_share(score, mask, share=share), 0)
    weights = 1 + alpha * scaled
    return mean_one(weights, mask) if normalise == "mean" else weights


def _check(op: str, score: Tensor, mask: Tensor) -> None:
    """Raise ValueError for a score (G, N) or a mask that is none."""
    checks.rank(op, "score", score, 2, "(G, N)")
    checks.dtype(op, "score", score, checks.FLOATS)
    check_mask(op, mask, score.shape)
    checks.same_device(op, "score", score, mask=mask)
    if checks.values_enabled() and not bool((score.isfinite() & (score >= 0))[mask].all()):
        checks.fail(op, "score", "finite values of at least 0 at valid tokens", "others", "Look for NaN in the mass.")
