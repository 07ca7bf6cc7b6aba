"""Policy gradient on attention (reinforced attention learning, RAL): docs/own_method.md has the formula and its source.

What a token looks at is a distribution over the frames and the rest, and a response's advantage says whether to stay
with the distribution that it was sampled with, or to leave it.
"""

from typing import Any

import torch
from torch import Tensor

from appo_kernels import checks, weighted_surrogate

# Added to probabilities under a logarithm: a frame at which neither policy looks has divergence and gradient 0.
TINY = 1e-12


def attention_divergence(mass: Tensor, old_mass: Tensor) -> Tensor:
    """Jensen-Shannon divergence of what each token looks at from what it looked at, in nats: 0 to log 2.

    The distributions are over F frames and one more place, 1 - the sum over the frames: everything that is no frame.

    Args:
        mass: (B, N, F) floating point, "sum" mass of the policy; differentiable.
        old_mass: (B, N, F), of the policy that is compared with; a constant.

    Returns:
        (B, N) in the dtype of ``mass``, at least fp32. With equal masses both it and its gradient are 0.

    Raises:
        ValueError: wrong shape, dtype or device; masses that are no shares: negative, or of a sum above 1.
    """
    op = "attention_divergence"
    checks.rank(op, "mass", mass, 3, "(B, N, F)")
    checks.shape(op, "old_mass", old_mass, mass.shape, "(B, N, F)", "Pass the mass of the same tokens and frames.")
    for name, tensor in (("mass", mass), ("old_mass", old_mass)):
        checks.dtype(op, name, tensor, checks.FLOATS)
        if checks.values_enabled():
            total = tensor.detach().float().sum(-1)
            if not bool((tensor >= 0).all()) or not bool((total <= 1.01).all()):  # 1.01: half precision
                remedy = 'Record it with reduction="sum".'
                checks.fail(op, name, "shares of attention: at least 0, with a sum of at most 1", "others", remedy)
    checks.same_device(op, "mass", mass, old_mass=old_mass)
    now, old = (_with_the_rest(tensor) + TINY for tensor in (mass, old_mass.detach()))
    middle = (now + old) / 2
    return 0.5 * (now * (now / middle).log() + old * (old / middle).log()).sum(-1)


def attention_loss(
    mass: Tensor, old_mass: Tensor, advantages: Tensor, mask: Tensor, **aggregation: Any
) -> tuple[Tensor, Tensor]:
    """The mean over tokens of A times `attention_divergence`: attracts where A > 0, repels where A < 0.

    Args:
        mass, old_mass: (B, N, F), as of `attention_divergence`; what stands at invalid tokens is ignored.
        advantages: (B,), or (B, N).
        mask: (B, N) bool.
        aggregation: ``aggregation``, ``num_items`` and ``max_length``, as `appo_kernels.weighted_surrogate` takes them.

    Returns:
        The loss (), and the mean divergence over valid tokens (), detached.
    """
    valid = mask.bool()[..., None]
    divergence = attention_divergence(mass.masked_fill(~valid, 0), old_mass.masked_fill(~valid, 0))
    # -W A log pi of the kind "gpg", with -divergence in the place of log pi: the loss's own mean over tokens.
    terms = -divergence
    loss = weighted_surrogate(terms, terms.detach(), advantages, mask, kind="gpg", **aggregation).loss
    return loss, divergence.detach()[mask.bool()].sum() / mask.sum().clamp(min=1)


def _with_the_rest(mass: Tensor) -> Tensor:
    """(B, N, F) -> (B, N, F + 1): what no frame has comes last."""
    mass = mass.to(torch.promote_types(mass.dtype, torch.float32))
    return torch.cat([mass, (1 - mass.sum(-1, keepdim=True)).clamp(min=0)], dim=-1)
