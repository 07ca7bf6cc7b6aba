"""Advantages of a group (docs/method.md eq. 16)."""

import torch
from torch import Tensor

from appo_kernels import checks

SCALES = ("group", "none")


def group_advantages(rewards: Tensor, *, scale: str = "group") -> Tensor:
    """Advantages (G,) of one prompt's responses: A = (r - mean r) / (std r + 1e-4), or r - mean r with scale="none".

    std divides by G - 1, as in GRPO's reference trainers; a group of one has advantage 0. Equal rewards give exactly 0.

    Args:
        rewards: (G,) any real dtype.

    Returns:
        (G,) fp32 (fp64 for fp64 rewards).

    Raises:
        ValueError: wrong shape, an empty group, a reward that is not finite, or an unknown scale.
    """
    op = "group_advantages"
    checks.rank(op, "rewards", rewards, 1, "(G,)")
    if rewards.numel() == 0 or rewards.is_complex():
        checks.fail(
            op,
            "rewards",
            "at least one real number",
            f"{rewards.dtype} {tuple(rewards.shape)}",
            "Skip empty groups.",
        )
    if scale not in SCALES:
        checks.fail(op, "scale", f"one of {', '.join(SCALES)}", repr(scale), "Pass one of these.")
    if checks.values_enabled() and not bool(rewards.isfinite().all()):
        checks.fail(op, "rewards", "finite values", rewards.tolist(), "Give a response without a reward 0.")
    dtype = rewards.dtype if rewards.dtype == torch.float64 else torch.float32
    # In units of the largest one, so that neither differences nor squares of huge rewards overflow.
    unit = rewards.detach().double().abs().max().clamp(min=1.0)
    scaled_G = rewards.detach().double() / unit
    # Differences from the first reward: equal ones are then exactly 0, whatever the rounding of their mean.
    difference_G = scaled_G - scaled_G[0]
    centred_G = difference_G - difference_G.mean()
    if scale == "none":
        advantages_G = (centred_G * unit).to(dtype)
    elif len(rewards) > 1:
        advantages_G = (centred_G / (centred_G.std() + 1e-4 / unit)).to(dtype)
    else:
        advantages_G = centred_G.to(dtype)
    if checks.values_enabled() and not bool(advantages_G.isfinite().all()):
        checks.fail(op, "rewards", f"differences within {dtype}", rewards.tolist(), "Scale rewards down.")
    return advantages_G
