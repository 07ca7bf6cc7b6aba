"""The loss of docs/method.md section 6 per token, its closed-form gradient, its aggregation and its metrics.

Everything a token needs besides its log-probability travels in one table, (7, B, T) in the compute dtype, so that every
backend reads the same thing. Its rows, all 0 where the mask is 0, whatever garbage the arguments held there:

    MASK        1 for a valid token
    OLD         log-probability under the policy that sampled it
    ADVANTAGE   A
    WEIGHT      token weight W (1 without one)
    IMPORTANCE  correction for another engine's sampling, 1 without rollout log-probabilities
    REF         log-probability under the reference policy; NaN without one, and so is the metric made of it
    SHARE       the factor of the token's loss in the sum that is the loss: the aggregation

W, the importance and the shares are constants, so d loss / d logprob is known as soon as logprob is: that is what lets
the streaming backends form every gradient in the forward pass.
"""

import torch
from torch import Tensor

from appo_kernels.checks import LARGEST_COUNT
from appo_kernels.ops.weighted_surrogate.kinds import (
    MASK,
    OLD,
    REF,
    SHARE,
    WEIGHT,
    Options,
    Terms,
    policy_terms,
)

CORRECTIONS = ("truncate", "clip", "mask")
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


def shares(
    mask: Tensor, aggregation: str, num_items: int | float | Tensor | None, max_length: int | float | None
) -> Tensor:
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
        # A negative or infinite count must not pass: NaN is what the check of values looks for.
        possible = (count >= 0) & (count <= LARGEST_COUNT)
        return mask / torch.where(possible, count.clamp(min=1), torch.nan)
    return mask / max(num_items, 1)


def importance(
    old: Tensor, rollout: Tensor, valid: Tensor, *, correction: str, level: str, floor: float, cap: float
) -> Tensor:
    """Truncated importance weights (B, T) of tokens that another engine sampled; 1 where its log-probability is NaN.

    The ratio is exp(old - rollout), at level "sequence" exp of the sum of these differences over the response.
    correction "truncate": at most ``cap``; "clip": held in [floor, cap]; "mask": 0 outside of it.
    old and rollout: (B, T), 0 where not ``valid``.
    """
    difference = torch.where(rollout.isnan(), 0.0, old - rollout)
    if level == "sequence":
        difference = difference.sum(1, keepdim=True).expand_as(difference)
    ratio = difference.exp()
    if correction == "mask":
        weight = torch.where((ratio < floor) | (ratio > cap), 0.0, ratio)
    else:
        weight = ratio.clamp(min=floor if correction == "clip" else None, max=cap)
    # No engine reports a log-probability of +inf: NaN is what the check of values looks for.
    return torch.where(valid & ~torch.isposinf(rollout), weight, torch.where(valid, torch.nan, 0.0))


def pack(
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    token_weights: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    share: Tensor,
    *,
    correction: str,
    level: str,
    floor: float,
    cap: float,
) -> Tensor:
    """The table (7, B, T), in the dtype of ``share`` (B, T); other arguments as in ``weighted_surrogate``."""
    valid = mask != 0

    def kept(values: Tensor) -> Tensor:
        return torch.where(valid, values.detach().to(share.dtype), 0.0)

    old, weights = kept(old_logprobs), valid.to(share.dtype)
    if rollout_logprobs is not None:
        weights = importance(
            old, kept(rollout_logprobs), valid, correction=correction, level=level, floor=floor, cap=cap
        )
    ones = valid.to(share.dtype)
    return torch.stack(
        [
            mask.to(share.dtype),
            old,
            kept(advantages if advantages.dim() == 2 else advantages[:, None]),
            ones if token_weights is None else kept(token_weights),
            weights,
            torch.where(valid, torch.nan, ones) if ref_logprobs is None else kept(ref_logprobs),
            share,
        ]
    )


def token_slope(logprobs: Tensor, table: Tensor, o: Options) -> Tensor:
    """d loss / d logprob of tokens whose ratio is their own; any shape, ``table`` (7, that shape)."""
    ratio = (logprobs - table[OLD]).exp()
    slope = policy_terms(logprobs, ratio, table, o).slope
    if o.beta != 0.0:
        slope = slope + o.beta * _ref_slope(table[REF] - logprobs, ratio, o)
    return slope * table[SHARE]


def _ref_slope(to_ref: Tensor, ratio: Tensor, o: Options) -> Tensor:
    """d k3 / d log pi, with ``kl_ratio`` of ratio times k3 through both."""
    if not o.kl_ratio:
        return -torch.expm1(to_ref)
    return ratio * (-torch.expm1(to_ref) + _k3(to_ref))


def _k3(to_ref: Tensor) -> Tensor:
    """The k3 estimate of KL(pi || reference): exp(x) - 1 - x, x = log reference - log pi."""
    return torch.expm1(to_ref) - to_ref


def evaluate(
    logprobs: Tensor, table: Tensor, o: Options, entropy: Tensor | None = None
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
    if o.sequence_ratio:
        level_log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(log_ratio)
    ratio = level_log_ratio.exp()
    terms = policy_terms(logprobs, ratio, table, o)

    def over_response(slope_by_ratio: Tensor) -> Tensor:
        """One ratio for all: each token's log-probability moves it by 1 / length, and with it every token's loss."""
        return (slope_by_ratio * table[SHARE]).sum(1, keepdim=True) / lengths * table[MASK]

    slope = over_response(terms.slope) if o.couples_tokens else terms.slope * table[SHARE]
    to_ref = table[REF] - logprobs
    ref_kl = _k3(to_ref)
    per_token = terms.loss
    if o.beta != 0.0:
        per_token = per_token + o.beta * (ratio * ref_kl if o.kl_ratio else ref_kl)
        if o.kl_ratio and o.level == "sequence" and o.kind != "gspo_token":
            slope = slope - o.beta * ratio * torch.expm1(to_ref) * table[SHARE] + over_response(o.beta * ratio * ref_kl)
        else:
            slope = slope + o.beta * _ref_slope(to_ref, ratio, o) * table[SHARE]
    if entropy is not None:
        entropy = torch.where(valid, entropy.to(table.dtype), 0.0)
        if o.entropy_coef != 0.0:
            per_token = per_token - o.entropy_coef * entropy
    loss = (per_token * table[SHARE]).sum()
    metrics = _metrics(valid, log_ratio, ratio, terms, ref_kl, entropy, table)
    return loss, slope.to(dtype), metrics


def _metrics(
    valid: Tensor,
    log_ratio: Tensor,
    ratio: Tensor,
    terms: Terms,
    ref_kl: Tensor,
    entropy: Tensor | None,
    table: Tensor,
) -> Tensor:
    """The metrics (10,); all operands but the ratio and the flags are 0 where the mask is 0."""
    count = valid.sum().clamp(min=1)
    low, high = terms.low & valid, terms.high & valid
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
        (terms.slope != 0).sum(),
    ]
    return torch.stack([value.to(torch.float32) for value in values])
