"""From divergence to W[i, t], the factor on each token's policy-gradient term.

This is where a perception token's disagreement becomes its weight: equations 13 to 15 of docs/method.md.
"""

import torch
from torch import Tensor

from appo.method.selection import check_mask
from appo_kernels import checks

AVERAGES = ("frames", "member")


def token_weights(
    divergence: Tensor,
    slots: Tensor,
    mask: Tensor,
    *,
    alpha: float = 1.7,
    average: str = "frames",
    normalise: str | None = None,
) -> Tensor:
    """W (G, N): 1 everywhere, more at the perception tokens on which the responses of the group disagree. Detached.

    Per target frame, Dhat[k, :] = (D[k, :] - min) / (max - min + 1e-8) over the slots that have a member, or, where
    each member has a value of its own, over all members of all its slots. Then, for the slots (k, j) that contain
    token t of response i,

        average="frames" (paper):     W[i, t] = 1 + alpha * (1/K) * sum of Dhat[k, j]
        average="member" (released):  W[i, t] = 1 + alpha * mean of Dhat[k, j]

    and W = 1 where no slot contains t, where ``mask`` is False, and everywhere when K = 0. The ``max_weight`` of the
    authors' code is 1 + alpha: its 1.7 is ``alpha=0.7, average="member"``. With ``normalise="mean"`` each response's
    weights are divided by their mean over its valid tokens: they move its credit between tokens and add none.

    Args:
        divergence: (K, J) floating point, from ``group_divergence``, or (K, G, J), a value of each member, from
            ``slot_disagreement``; what stands at slots without a member, and at missing members, is ignored.
        slots: (K, G, J) int token positions, -1 = missing, from ``perception_slots``.
        mask: (G, N) bool, True at valid response tokens.

    Returns:
        (G, N) in the dtype of ``divergence``, at least fp32. Bitwise equal from run to run.

    Raises:
        ValueError: wrong shape, dtype or device, a slot outside the response, a divergence that is not finite, or an
            unknown average or normalisation.
    """
    op = "token_weights"
    checks.rank(op, "slots", slots, 3, "(K, G, J)")
    checks.dtype(op, "slots", slots, checks.INTS)
    K, G, J = slots.shape
    checks.tensor(op, "divergence", divergence)
    if divergence.ndim == 3:
        checks.shape(op, "divergence", divergence, (K, G, J), "(K, G, J)", "Pass slot_disagreement of the same slots.")
    else:
        checks.shape(op, "divergence", divergence, (K, J), "(K, J)", "Pass group_divergence of the same slots.")
    checks.dtype(op, "divergence", divergence, checks.FLOATS)
    checks.rank(op, "mask", mask, 2, "(G, N)")
    N = mask.shape[1]
    check_mask(op, mask, torch.Size((G, N)))
    checks.same_device(op, "divergence", divergence, slots=slots, mask=mask)
    checks.number(op, "alpha", alpha, "a finite number of at least 0", "The paper takes 1.7.", least=0.0)
    if average not in AVERAGES:
        checks.fail(op, "average", f"one of {', '.join(AVERAGES)}", repr(average), "Pass one of these.")
    if normalise is not None and normalise != "mean":
        checks.fail(op, "normalise", 'None or "mean"', repr(normalise), "Pass one of these.")
    values = divergence.detach().to(torch.promote_types(divergence.dtype, torch.float32))
    values_KGJ = values if values.ndim == 3 else values[:, None]  # (K, 1, J): the same for all members
    filled_KGJ = slots >= 0 if values.ndim == 3 else (slots >= 0).any(dim=1, keepdim=True)
    if checks.values_enabled():
        if bool(((slots < -1) | (slots >= N)).any()):
            checks.fail(
                op,
                "slots",
                f"positions in 0..{N - 1}, or -1",
                "others",
                "Pass what perception_slots returned.",
            )
        ordered = slots.sort(dim=2).values
        twice = (ordered.diff(dim=2) == 0) & (ordered[..., 1:] >= 0)
        if bool(twice.any()):
            k, i, j = twice.nonzero()[0].tolist()
            checks.fail(
                op,
                "slots",
                "each position at most once among the slots of a frame",
                f"position {int(ordered[k, i, j])} twice in slots[{k}, {i}]",
                "Pass what perception_slots returned.",
            )
        if not bool((values_KGJ.isfinite() | ~filled_KGJ).all()):
            checks.fail(
                op,
                "divergence",
                "finite values at slots with a member",
                "others",
                "Look for NaN in the logits.",
            )

    if K == 0 or J == 0:
        return torch.ones(G, N, dtype=values.dtype, device=divergence.device)
    # Column N takes what is missing. A frame's slots name a token at most once, so each cell of (K, G, N) receives one
    # addend and the atomics behind scatter_add_ cannot reorder a sum; the sum over frames has a fixed order.
    target_KGJ = slots.long().masked_fill(slots < 0, N)
    scaled_KGJ = _scaled(values_KGJ, filled_KGJ).expand(K, G, J)
    blank_KGN = torch.zeros(K, G, N + 1, dtype=values.dtype, device=divergence.device)
    total_GN = blank_KGN.scatter_add(2, target_KGJ, scaled_KGJ).sum(dim=0)[:, :N]
    if average == "frames":
        bonus_GN = total_GN / K
    else:
        count_GN = blank_KGN.scatter_add(2, target_KGJ, torch.ones_like(scaled_KGJ)).sum(dim=0)[:, :N]
        bonus_GN = total_GN / count_GN.clamp(min=1)
    weights_GN = 1 + alpha * bonus_GN.masked_fill(~mask, 0)
    return weights_GN if normalise is None else mean_one(weights_GN, mask)


def mean_one(weights: Tensor, mask: Tensor) -> Tensor:
    """``weights`` (G, N) of at least 0, divided by their mean over each response's valid tokens.

    1 at the others, and at all tokens of a response whose weights are all 0. In the dtype of ``weights``.
    """
    valid = weights.masked_fill(~mask, 0)
    total = valid.sum(dim=1, keepdim=True)
    scale = mask.sum(dim=1, keepdim=True) / torch.where(total > 0, total, 1)
    return torch.where(mask & (total > 0), valid * scale, 1)


def _scaled(values_KGJ: Tensor, filled_KGJ: Tensor) -> Tensor:
    """Dhat (K, 1 or G, J): each frame's values brought to 0..1 over its filled places; 0 at the others."""
    low_K11 = values_KGJ.masked_fill(~filled_KGJ, torch.inf).amin(dim=(1, 2), keepdim=True)
    high_K11 = values_KGJ.masked_fill(~filled_KGJ, -torch.inf).amax(dim=(1, 2), keepdim=True)
    return ((values_KGJ - low_K11) / (high_K11 - low_K11 + 1e-8)).masked_fill(~filled_KGJ, 0)
