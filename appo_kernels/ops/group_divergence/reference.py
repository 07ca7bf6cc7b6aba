"""Definition of group_divergence and group_divergence_from_logits: dense, in the dtype of their inputs."""

import math

import torch
from torch import Tensor

from appo_kernels.dtypes import K3_CLAMP


def group_divergence(
    hidden: Tensor,
    weight: Tensor,
    lse: Tensor,
    slots: Tensor,
    *,
    kind: str = "kl",
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """hidden (G, N, D), weight (V, D), lse (G, N), slots (K, G, J), bias (V,) -> (K, J)."""
    logits = hidden @ weight.t()  # (G, N, V)
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return group_divergence_from_logits(logits, lse, slots, kind=kind, temperature=temperature)


def group_divergence_from_logits(
    logits: Tensor, lse: Tensor, slots: Tensor, *, kind: str = "kl", temperature: float = 1.0
) -> Tensor:
    """logits (G, N, V), lse (G, N), slots (K, G, J) -> (K, J)."""
    log_p = logits / temperature - lse[..., None]
    K, _, J = slots.shape
    result = log_p.new_zeros(K, J)
    for k in range(K):
        for j in range(J):
            positions = slots[k, :, j].tolist()
            if kind == "kl":
                members = [log_p[i, t] for i, t in enumerate(positions) if t >= 0]
                result[k, j] = mean_divergence_from_mixture(torch.stack(members)) if len(members) > 1 else 0.0
            else:
                uniform = log_p.new_full((log_p.shape[-1],), -math.log(log_p.shape[-1]))
                result[k, j] = mean_clamped_k3(
                    torch.stack([log_p[i, t] if t >= 0 else uniform for i, t in enumerate(positions)])
                )
    return result


def mean_divergence_from_mixture(log_p: Tensor) -> Tensor:
    """Mean over members of KL(p_i || pbar), log_p (n, V); p log p = 0 where p = 0."""
    log_mixture = torch.logsumexp(log_p, dim=0) - math.log(len(log_p))
    terms = log_p.exp() * (log_p - log_mixture)
    return terms.masked_fill(log_p == float("-inf"), 0.0).sum() / len(log_p)


def mean_clamped_k3(log_p: Tensor) -> Tensor:
    """Mean over members of sum_v (exp(d_i) - d_i - 1), d_i = clamp(mean_i log p_i - log p_i, -11, 11), log_p (G, V).

    log p = -inf is the limit of log p = -x for x growing without bound, the same x for all members: d is 0 where no
    member can say the word, else 11 for the members that cannot and -11 for those that can.
    """
    impossible = log_p == float("-inf")
    d = (log_p.mean(dim=0) - log_p).clamp(-K3_CLAMP, K3_CLAMP)
    d = torch.where(impossible.any(dim=0), torch.where(impossible, K3_CLAMP, -K3_CLAMP), d)
    d = d.masked_fill(impossible.all(dim=0), 0.0)
    return (torch.expm1(d) - d).sum() / len(log_p)
