"""Inputs that the tests of the three surrogates share: B responses of T tokens, vocabulary V, hidden size D."""

from typing import Any

import torch
from backends import served
from torch import Tensor

SERVED = served("weighted_surrogate")
PER_TOKEN = ("old_logprobs", "token_weights", "ref_logprobs", "rollout_logprobs")


def per_token(B: int = 4, T: int = 9, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    """logprobs and everything beside them. Log-ratios of spread 0.5: about half the tokens lie outside the clip range.

    Lengths differ, one token inside the second response is masked, and the last response is masked entirely.
    """
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    mask = torch.arange(T) < torch.randint(T // 2, T + 1, (B, 1), generator=g)
    mask[1 % B, 1] = False
    if B > 1:
        mask[-1] = False

    def near(x: Tensor, spread: float) -> Tensor:
        return (x + spread * torch.randn(B, T, generator=g, dtype=torch.float64)).to(dtype)

    return {
        "logprobs": near(old, 0.5).requires_grad_(),
        "old_logprobs": old.to(dtype),
        "advantages": torch.randn(B, generator=g, dtype=torch.float64).to(dtype),
        "mask": mask,
        "token_weights": (1 + torch.rand(B, T, generator=g, dtype=torch.float64)).round(decimals=1).to(dtype),
        "ref_logprobs": near(old, 0.3),
        "rollout_logprobs": near(old, 0.5),
    }


def from_hidden(
    B: int = 4, T: int = 9, D: int = 16, V: int = 37, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Any]:
    """hidden, weight, bias and targets with old log-probabilities near those they give, and the rest."""
    g = torch.Generator().manual_seed(seed + 1)
    hidden = torch.randn(B, T, D, generator=g, dtype=torch.float64).to(dtype)
    weight = (2 * torch.randn(V, D, generator=g, dtype=torch.float64) / D**0.5).to(dtype)
    bias = torch.randn(V, generator=g, dtype=torch.float64).to(dtype)
    targets = torch.randint(V, (B, T), generator=g)
    logits = hidden.double() @ weight.double().t() + bias.double()
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    case = per_token(B, T, torch.float64, seed)
    base = case.pop("logprobs").detach()
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
        case[name] = (logprobs + (case[name] - base)).to(dtype)
    case["advantages"], case["token_weights"] = case["advantages"].to(dtype), case["token_weights"].to(dtype)
    for tensor in (hidden, weight, bias):
        tensor.requires_grad_()
    return {"hidden": hidden, "weight": weight, "bias": bias, "targets": targets, **case}


def cast(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same numbers in another dtype: leaves again, wanting gradients where they did. Mask and targets stay."""
    return {
        name: x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() and name != "mask" else x
        for name, x in case.items()
    }


def to(case: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: x.detach().to(device).requires_grad_(x.requires_grad) for name, x in case.items()}


def poisoned(case: dict[str, Any]) -> dict[str, Any]:
    """The same case with garbage at every masked token, of every kind that has been seen there."""
    off = ~case["mask"]
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])
    result = dict(case)
    for name in (*PER_TOKEN, "logprobs", "logits", "hidden"):
        if name in case:
            x = case[name].detach().clone()
            spots = x[off]
            x[off] = garbage.to(x.dtype).repeat(spots.numel() // 4 + 1)[: spots.numel()].view(spots.shape)
            result[name] = x.requires_grad_(case[name].requires_grad)
    if "targets" in case:
        result["targets"] = case["targets"].masked_fill(off, -100)
    return result
