"""One batch, and what `benchmarks.peer_losses` asks of a peer: its loss of a setting, and that setting in our words."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Batch = dict[str, Tensor]
TEMPERATURE = 0.9


class Case(NamedTuple):
    """One setting of a peer."""

    loss: str  # as the peer calls it
    theirs: Callable[[Batch, Tensor, Tensor], Tensor]  # (batch, logprobs (B, T), entropy (B, T)) -> loss ()
    ours: Callable[[Batch], dict[str, Any]]  # batch -> arguments of a surrogate, with ``entropy_coef``
    scale: Callable[[Batch], float] = lambda batch: 1.0  # theirs / ours: what a peer divides or multiplies by besides
    slack: float = 0.0  # relative difference that the peer's own formula brings in


def batch_of(dtype: torch.dtype, seed: int = 0) -> Batch:
    """Six responses of up to 11 tokens, V 37, D 16, with ratios on both sides of every clip.

    One has one token, one tokens that a tool wrote, one a token whose log-probability the engine does not know, and
    from one the policy has moved away.
    """
    generator = torch.Generator().manual_seed(seed)
    B, T, V, D = 6, 11, 37, 16

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight = normal(B, T, D), normal(V, D) / 4
    targets = torch.randint(V, (B, T), generator=generator)
    logits = hidden @ weight.t() / TEMPERATURE
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    lengths = torch.tensor([T, 1, 7, 4, T, 9])
    mask = torch.arange(T) < lengths[:, None]
    mask[2, 3:5] = False
    old, rollout = logprobs + 0.3 * normal(B, T), logprobs + 0.3 * normal(B, T)
    old[3] += 0.4
    rollout[0, 2] = torch.nan
    advantages = torch.tensor([0.7, -1.3, 0.4, -0.6, -0.2, 1.1], dtype=dtype)
    return {
        "hidden": hidden, "weight": weight, "targets": targets, "old": old, "rollout": rollout,
        "ref": logprobs + 0.5 * normal(B, T), "mask": mask.to(dtype), "lengths": lengths,
        "entropy": -(logits.log_softmax(-1).exp() * logits.log_softmax(-1)).sum(-1), "logprobs": logprobs,
        "advantages": advantages,
        "token_weights": 1 + 1.7 * torch.rand(B, T, generator=generator, dtype=torch.float64).to(dtype),
    }  # fmt: skip


def weighted_advantages(batch: Batch, weighted: bool) -> Tensor:
    """Advantages as peers get them: (B,), or (B, T) with the token weights folded in."""
    return batch["advantages"][:, None] * batch["token_weights"] if weighted else batch["advantages"]
