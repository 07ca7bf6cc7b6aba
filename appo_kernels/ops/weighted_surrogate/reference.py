"""The definition: docs/method.md section 6, dense, in the dtype of the inputs, differentiated by ordinary autograd.

Arguments are those of the public functions. Masked tokens are cleared at the start, so that nothing else has to.
"""

from typing import Any

import torch
from torch import Tensor


def weighted_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    token_weights: Tensor | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    delta: float | None = None,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    rollout_logprobs: Tensor | None = None,
    rollout_cap: float = 2.0,
    level: str = "token",
    aggregation: str = "dapo",
    num_items: int | float | Tensor | None = None,
    max_length: int | None = None,
    kind: str = "clip",
    kl_ratio: bool = False,
    rollout_correction: str = "truncate",
    rollout_level: str = "token",
    rollout_floor: float = 0.0,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Everything (B, T); ``entropy`` (B, T) is what the other two functions know of their logits."""
    valid = mask != 0
    m = valid.to(logprobs.dtype)
    B = logprobs.shape[0]

    def clear(x: Tensor) -> Tensor:
        return x.to(logprobs.dtype).masked_fill(~valid, 0)

    def mean(x: Tensor, over: Tensor = valid) -> Tensor:
        return (x * over).sum() / over.sum().clamp(min=1)

    logprobs, old = clear(logprobs), clear(old_logprobs)
    A = clear(advantages if advantages.dim() == 2 else advantages[:, None].expand_as(m))
    W = m if token_weights is None else clear(token_weights)

    token_log_ratio = logprobs - old
    log_ratio = token_log_ratio
    if level == "sequence" or kind == "gspo_token":
        log_ratio = (token_log_ratio.sum(1) / m.sum(1).clamp(min=1))[:, None].expand_as(m)
    if kind == "gspo_token":
        log_ratio = log_ratio.detach() + logprobs - logprobs.detach()
    ratio = log_ratio.exp()
    objective = policy_objective(kind, logprobs, old, ratio, A, eps_low, eps_high, delta)
    importance = m
    if rollout_logprobs is not None:
        difference = (old - clear(rollout_logprobs)).nan_to_num(nan=0.0)
        if rollout_level == "sequence":
            difference = difference.sum(1, keepdim=True).expand_as(m)
        importance = difference.exp()
        if rollout_correction == "mask":
            importance = importance.masked_fill((importance < rollout_floor) | (importance > rollout_cap), 0)
        else:
            importance = importance.clamp(min=rollout_floor if rollout_correction == "clip" else None, max=rollout_cap)
    per_token = -W * importance * objective
    ref_kl = None
    if ref_logprobs is not None:
        difference = clear(ref_logprobs) - logprobs
        ref_kl = difference.exp() - difference - 1
        per_token = per_token + beta * (ratio * ref_kl if kl_ratio else ref_kl)
    if entropy is not None:
        entropy = clear(entropy)
        per_token = per_token - entropy_coef * entropy

    if aggregation == "grpo":
        loss = ((per_token * m).sum(1) / m.sum(1).clamp(min=1)).sum() / max(B, 1)
    elif aggregation == "dr_grpo":
        assert max_length is not None
        loss = (per_token * m).sum() / (max(B, 1) * max_length)
    elif aggregation == "bnpo" or num_items is None:
        loss = (per_token * m).sum() / m.sum().clamp(min=1)
    else:
        loss = (per_token * m).sum() / max(float(num_items), 1.0)

    low, high, moving = limits(kind, logprobs, old, ratio, A, eps_low, eps_high, delta)
    nan = m.new_full((), torch.nan)
    weight_above_one = valid & (W > 1)
    metrics = {
        "clip_low": mean(low),
        "clip_high": mean(high),
        "approx_kl": mean(token_log_ratio.exp() - 1 - token_log_ratio),
        "ref_kl": nan if ref_kl is None else mean(ref_kl),
        "entropy": nan if entropy is None else mean(entropy),
        "ratio_mean": mean(ratio),
        "ratio_max": (ratio * m).amax() if m.numel() else m.new_zeros(()),
        "clip_weighted": mean(low | high, weight_above_one),
        "weight_mean": mean(W),
        "effective_tokens": (valid & moving & (W * importance != 0)).sum(),
    }
    if rollout_logprobs is not None:
        metrics["rollout_missing"] = (valid & rollout_logprobs.isnan()).sum()
    return loss, {name: value.detach().float() for name, value in metrics.items()}


def policy_objective(
    kind: str, logprobs: Tensor, old: Tensor, ratio: Tensor, A: Tensor, eps_low: float, eps_high: float, delta: Any
) -> Tensor:
    """The objective per token, to be maximised, before weights; (B, T)."""
    if kind in ("clip", "gspo_token"):
        capped = ratio if delta is None else ratio.clamp(max=delta)
        return torch.minimum(capped * A, ratio.clamp(1 - eps_low, 1 + eps_high) * A)
    if kind == "cispo":
        return ratio.detach().clamp(max=1 + eps_high) * A * logprobs
    if kind == "sapo":
        tau = torch.where(A > 0, 1.0, 1.05)
        return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * A
    if kind == "dppo_tv":
        moved = (logprobs.exp() - old.exp()).detach()
        inside = torch.where(A > 0, moved <= eps_high, moved >= -eps_low)
        return ratio.detach().clamp(max=20.0 if delta is None else delta) * A * logprobs * inside
    return A * logprobs


def limits(
    kind: str, logprobs: Tensor, old: Tensor, ratio: Tensor, A: Tensor, eps_low: float, eps_high: float, delta: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens held at the lower and at the upper limit, and tokens whose policy gradient is not 0 (W aside); bool."""
    low, high = (ratio < 1 - eps_low) & (A < 0), (ratio > 1 + eps_high) & (A > 0)
    none, acting = torch.zeros_like(low), A != 0
    if kind in ("clip", "gspo_token"):
        return low, high, objective_moves(ratio, A, eps_low, eps_high, delta)
    if kind == "cispo":
        return none, high, acting
    if kind == "dppo_tv":
        moved = logprobs.exp() - old.exp()
        low, high = (A <= 0) & (moved < -eps_low), (A > 0) & (moved > eps_high)
        return low, high, acting & ~low & ~high
    return none, none, acting


def objective_moves(ratio: Tensor, A: Tensor, eps_low: float, eps_high: float, delta: float | None) -> Tensor:
    """True where d min(min(ratio, delta) A, clamp(ratio) A) / d ratio is not 0: the smaller moves with the ratio."""
    rewarded = (A > 0) & (ratio <= 1 + eps_high) & (ratio <= (torch.inf if delta is None else delta))
    inside = (ratio >= 1 - eps_low) & (ratio <= 1 + eps_high)
    punished = (A < 0) & (inside | ((ratio > 1 + eps_high) & (ratio <= (torch.inf if delta is None else delta))))
    return rewarded | punished


def logits_weighted_surrogate(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``logits`` (B, T, V), ``targets`` (B, T); ``options`` as for ``weighted_surrogate``."""
    valid = mask != 0
    logits = logits.masked_fill(~valid[..., None], 0)
    logp = (logits / temperature).log_softmax(-1)  # (B, T, V)
    chosen = logp.gather(-1, targets.long().masked_fill(~valid, 0)[..., None])[..., 0]
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)
    return weighted_surrogate(
        chosen, old_logprobs, advantages, mask, entropy=entropy, entropy_coef=entropy_coef, **options
    )


def linear_weighted_surrogate(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``hidden`` (B, T, D), ``weight`` (V, D), ``bias`` (V,); ``options`` as for ``logits_weighted_surrogate``."""
    logits = hidden.masked_fill((mask == 0)[..., None], 0) @ weight.t()
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits_weighted_surrogate(logits, targets, old_logprobs, advantages, mask, **options)
