"""The loss of docs/method.md section 6 per token, its closed-form gradient, its aggregation and its metrics.

Everything a token needs besides its log-probability travels in one table, (7, B, T) in the compute dtype, so that every
backend reads the same thing. Its rows, all 0 where the mask is 0, whatever garbage the arguments held there:

    MASK        1 for a valid token
    OLD         log-probability under the policy that sampled it
    ADVANTAGE   A
    WEIGHT      token weight W (1 without one)
    IMPORTANCE  min(exp(old - rollout), rollout_cap), 1 without rollout log-probabilities
    REF         log-probability under the reference policy; NaN without one, and so is the metric made of it
    SHARE       what the token's loss is multiplied with in the sum that is the loss: the aggregation

W, the importance and the shares are constants, so d loss / d logprob is known as soon as logprob is: that is what lets
the streaming backends form every gradient in the forward pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MASK, OLD, ADVANTAGE, WEIGHT, IMPORTANCE, REF, SHARE = range(7)
METRICS = (
    "clip_low",
    "clip_high",
    "approx_kl",
    "ref_kl",
    "entropy",
    "ratio_mean",
    "ratio_max",
    "clip_weighted",
    "weight_mean",
    "effective_tokens",
)


class Settings(NamedTuple):
    """The plain numbers of a call, in the order in which the custom operators take them."""

    eps_low: float
    eps_high: float
    delta: float | None
    beta: float
    level: str
    temperature: float = 1.0
    softcap: float | None = None
    entropy_coef: float = 0.0


def shares(mask: Tensor, aggregation: str, num_items: int | float | Tensor | None, max_length: int | None) -> Tensor:
    """(B, T): the factor of each token's loss in the total. ``mask`` (B, T) is 0 or 1 in the compute dtype.

    Counts of zero divide as one, so that an empty response, batch or global batch gives exactly 0.
    """
    if aggregation == "grpo":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / max(mask.shape[0], 1)
    if aggregation == "dr_grpo":
        assert max_length is not None
        return mask / (max(mask.shape[0], 1) * max_length)
    if aggregation == "bnpo" or num_items is None:
        return mask / mask.sum().clamp(min=1)
    if isinstance(num_items, Tensor):
        count = num_items.detach().to(mask)
        # A negative count must not pass for 1: NaN is what the check of values looks for.
        return mask / torch.where(count >= 0, count.clamp(min=1), torch.nan)
    return mask / max(num_items, 1)


def pack(
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    token_weights: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    share: Tensor,
    *,
    rollout_cap: float,
) -> Tensor:
    """The table (7, B, T), in the dtype of ``share`` (B, T); other arguments as in ``weighted_surrogate``."""
    valid = mask != 0

    def kept(values: Tensor) -> Tensor:
        return torch.where(valid, values.detach().to(share.dtype), 0.0)

    old, ones = kept(old_logprobs), valid.to(share.dtype)
    importance = ones
    if rollout_logprobs is not None:
        importance = kept((old - kept(rollout_logprobs)).exp().clamp(max=rollout_cap))
    return torch.stack(
        [
            mask.to(share.dtype),
            old,
            kept(advantages if advantages.dim() == 2 else advantages[:, None]),
            ones if token_weights is None else kept(token_weights),
            importance,
            torch.where(valid, torch.nan, ones) if ref_logprobs is None else kept(ref_logprobs),
            share,
        ]
    )


def policy_terms(ratio: Tensor, table: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    """Each token's clipped policy loss and its derivative by log(ratio); any shape, ``table`` (7, that shape).

    With two-sided clipping the unclipped branch is min(ratio, delta) A. The derivative is that of the branch that min()
    took: zero exactly where a clamp holds the ratio.
    """
    factor = table[WEIGHT] * table[IMPORTANCE] * -table[ADVANTAGE]
    clipped = ratio.clamp(1 - s.eps_low, 1 + s.eps_high)
    free = ratio if s.delta is None else ratio.clamp(max=s.delta)
    branch = torch.where(factor * free >= factor * clipped, free, clipped)
    loss = factor * branch
    return loss, torch.where(branch == ratio, loss, 0.0)


def token_slope(logprobs: Tensor, table: Tensor, s: Settings) -> Tensor:
    """d loss / d logprob of tokens at level "token"; any shape, ``table`` (7, that shape)."""
    slope = policy_terms((logprobs - table[OLD]).exp(), table, s)[1]
    if s.beta != 0.0:
        slope = slope - s.beta * torch.expm1(table[REF] - logprobs)
    return slope * table[SHARE]


def evaluate(
    logprobs: Tensor, table: Tensor, s: Settings, entropy: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss () fp64, d loss / d logprob (B, T) like ``table``, and the metrics (10,) fp32 in the order of METRICS.

    ``logprobs`` and ``entropy`` (B, T): anything where the mask is 0. In fp64, which costs nothing beside the logits:
    the loss is a sum of terms that cancel.
    """
    dtype, table = table.dtype, table.double()
    valid = table[MASK] != 0
    logprobs = torch.where(valid, logprobs.to(table.dtype), 0.0)
    log_ratio = logprobs - table[OLD]
    lengths = table[MASK].sum(1, keepdim=True).clamp(min=1)
    level_log_ratio = log_ratio
    if s.level == "sequence":
        level_log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(log_ratio)
    ratio = level_log_ratio.exp()
    policy, policy_slope = policy_terms(ratio, table, s)

    if s.level == "sequence":
        # One ratio for all: each token's log-probability moves it by 1 / length, and with it every token's loss.
        slope = (policy_slope * table[SHARE]).sum(1, keepdim=True) / lengths * table[MASK]
    else:
        slope = policy_slope * table[SHARE]
    to_ref = table[REF] - logprobs
    ref_kl = torch.expm1(to_ref) - to_ref
    per_token = policy
    if s.beta != 0.0:
        per_token = per_token + s.beta * ref_kl
        slope = slope - s.beta * torch.expm1(to_ref) * table[SHARE]
    if entropy is not None:
        entropy = torch.where(valid, entropy.to(table.dtype), 0.0)
        if s.entropy_coef != 0.0:
            per_token = per_token - s.entropy_coef * entropy
    loss = (per_token * table[SHARE]).sum()
    metrics = _metrics(valid, log_ratio, ratio, policy_slope, ref_kl, entropy, table, s)
    return loss, slope.to(dtype), metrics


def _metrics(
    valid: Tensor,
    log_ratio: Tensor,
    ratio: Tensor,
    policy_slope: Tensor,
    ref_kl: Tensor,
    entropy: Tensor | None,
    table: Tensor,
    s: Settings,
) -> Tensor:
    """All but the ratio are 0 where the mask is 0."""
    count = valid.sum().clamp(min=1)
    low = (ratio < 1 - s.eps_low) & (table[ADVANTAGE] < 0)
    high = (ratio > 1 + s.eps_high) & (table[ADVANTAGE] > 0)
    weighted = table[WEIGHT] > 1
    ratio = torch.where(valid, ratio, 0.0)
    values = [
        low.sum() / count,
        high.sum() / count,
        (torch.expm1(log_ratio) - log_ratio).sum() / count,
        ref_kl.sum() / count,
        table.new_full((), torch.nan) if entropy is None else entropy.sum() / count,
        ratio.sum() / count,
        ratio.amax() if ratio.numel() else table.new_zeros(()),
        (weighted & (low | high)).sum() / weighted.sum().clamp(min=1),
        table[WEIGHT].sum() / count,
        (policy_slope != 0).sum(),
    ]
    return torch.stack([value.to(torch.float32) for value in values])
