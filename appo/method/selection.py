"""From frame mass to target frames, the key frames of a group, and perception slots, its tokens that look at them.

The path of one token: ``mass[i, t, f]`` is the attention of response token t to frame f; ``select_frames`` finds
the frames that matter for the group; ``perception_slots`` finds the tokens that look at them;
``token_weights`` turns how much those tokens disagree into W[i, t].

Shapes: G responses of one prompt, N response tokens, F frames, K target frames, J slots per frame.
Equations 6 to 10 of docs/method.md (arXiv 2602.23823, section 3).
"""

import torch
from torch import Tensor

from appo_kernels import checks

STRATEGIES = ("hard", "soft", "all", "contrast", "common", "peak", "released-hard", "released-soft")
SCORES = ("mass", "share")


def select_frames(
    mass: Tensor,
    mask: Tensor,
    rewards: Tensor,
    *,
    strategy: str = "hard",
    top_tokens: int = 15,
    top_frames: int = 3,
    threshold: float = 0.5,
) -> Tensor:
    """The target frames psi' of one group, ascending; may be empty, and then every weight is exactly 1.

    With A[i, f] the mean of the ``top_tokens`` (K1) largest ``mass[i, :, f]`` over valid tokens, psi(i) the
    ``top_frames`` (K2) frames with the largest A[i, :], S1 the responses whose reward reaches ``threshold`` (tau)
    and S2 the rest:

    ================  ==================================================================================
    "hard"            union of psi over S1, less the union over S2 (paper)
    "soft"            union over S1
    "all"             union over all responses
    "contrast"        the at most K2 frames with the largest positive (mean of A over S1 less that over S2)
    "common"          the K2 frames with the largest mean of A over all responses: rewards are not read
    "peak"            the same of A[i, f] / (mean of mass[i, t, f] over valid t): frames that a few tokens look
                      at many times more than their response usually does; K1 has to be few, 1 or 2
    "released-hard"   union over S1: the authors' code takes no difference
    "released-soft"   union over S1, or over all responses when S1 is empty
    ================  ==================================================================================

    Ties go to the lower frame index. A response with fewer than K1 valid tokens is averaged over those it has; one
    with none looks at nothing and takes part in no union and no mean. A frame to which no valid token of the group
    gives any mass (it holds no key: padding of a batch with clips of unequal length) is never a target.

    Args:
        mass: (G, N, F) floating point, non-negative; what stands at invalid tokens is ignored, NaN included.
        mask: (G, N) bool, True at valid response tokens.
        rewards: (G,) accuracy of each response: what divides right from wrong, not the weighted sum of all rewards.
        top_tokens: K1, of a response and frame; ``perception_slots`` has another, K3.

    Returns:
        (K,) int64 on the device of ``mass``.

    Raises:
        ValueError: wrong shape, dtype or device, unknown strategy, or mass that is negative or not finite at a
            valid token.
    """
    op = "select_frames"
    _check_mass(op, mass, mask)
    checks.shape(op, "rewards", rewards, mass.shape[:1], "(G,)", "Pass one accuracy reward per response.")
    checks.same_device(op, "mass", mass, rewards=rewards)
    if strategy not in STRATEGIES:
        checks.fail(op, "strategy", f"one of {', '.join(STRATEGIES)}", repr(strategy), "Pass one of these.")
    _check_positive(op, top_tokens=top_tokens, top_frames=top_frames)
    checks.number(op, "threshold", threshold, "a finite number", "The reward from which a response is right; 0.5.")
    if checks.values_enabled() and rewards.is_floating_point() and not bool(rewards.isfinite().all()):
        checks.fail(op, "rewards", "finite values", rewards.tolist(), "Give a response without a reward 0.")

    attention_GF, responds_G = _frame_attention(mass, mask, top_tokens), mask.any(dim=1)
    seen_F = (attention_GF > 0).any(dim=0)
    right_G = (rewards >= threshold) & responds_G
    wrong_G = ~(rewards >= threshold) & responds_G
    if strategy == "contrast":
        return _contrast(attention_GF, right_G, wrong_G, top_frames).nonzero().flatten()
    if strategy in ("common", "peak"):
        value_GF = attention_GF if strategy == "common" else _over_the_mean(attention_GF, mass, mask)
        mean_F = value_GF.masked_fill(~responds_G[:, None], 0).sum(dim=0)
        return (_top_columns(mean_F[None], top_frames)[0] & seen_F).nonzero().flatten()

    looked_GF = _top_columns(attention_GF, top_frames) & seen_F & responds_G[:, None]
    right_F = (looked_GF & right_G[:, None]).any(dim=0)
    if strategy == "hard":
        chosen_F = right_F & ~(looked_GF & wrong_G[:, None]).any(dim=0)
    elif strategy == "all":
        chosen_F = looked_GF.any(dim=0)
    elif strategy == "released-soft":
        chosen_F = torch.where(right_G.any(), right_F, looked_GF.any(dim=0))
    else:
        chosen_F = right_F
    return chosen_F.nonzero().flatten()


def perception_slots(
    mass: Tensor, mask: Tensor, frames: Tensor, *, top_tokens: int = 64, score: str = "mass"
) -> Tensor:
    """The tokens of each response that look most at each target frame, by position: slot (k, j) lines them up.

    ``slots[k, i, :]`` holds the ``top_tokens`` (K3) valid tokens of response i with the largest score at frame
    ``frames[k]``, ascending by position, then -1 where the response has fewer. Ties go to the earlier token.
    J = min(K3, N). The score of a token at frame f is

        score="mass" (paper):   mass[i, t, f]
        score="share" (ours):   mass[i, t, f] / sum over all frames of mass[i, t, :], 0 for a token that looks at none

    Tokens differ more in how much of the video they look at than in where they look: by mass the same few tokens fill
    the slots of every frame, by share each frame gets those that look at it rather than at others.

    Args:
        mass: (G, N, F) floating point; what stands at invalid tokens is ignored.
        mask: (G, N) bool.
        frames: (K,) int, from ``select_frames``; K may be 0.
        top_tokens: K3; ``select_frames`` has another, K1.

    Returns:
        (K, G, J) int64 on the device of ``mass``.

    Raises:
        ValueError: wrong shape, dtype or device, an unknown score, or a frame that ``mass`` does not have.
    """
    op = "perception_slots"
    _check_mass(op, mass, mask)
    checks.rank(op, "frames", frames, 1, "(K,)")
    checks.dtype(op, "frames", frames, checks.INTS)
    checks.same_device(op, "mass", mass, frames=frames)
    _check_positive(op, top_tokens=top_tokens)
    if score not in SCORES:
        checks.fail(op, "score", f"one of {', '.join(SCORES)}", repr(score), "Pass one of these.")
    N, F = mass.shape[1:]
    if checks.values_enabled() and bool(((frames < 0) | (frames >= F)).any()):
        checks.fail(op, "frames", f"indices in 0..{F - 1}", frames.tolist(), "Pass what select_frames returned.")
    if checks.values_enabled() and len(set(frames.tolist())) < len(frames):
        checks.fail(op, "frames", "each frame once", frames.tolist(), "Pass what select_frames returned.")

    looked_KGN = mass.detach()[:, :, frames.long()].permute(2, 0, 1)
    if score == "share":
        # In at least fp32: the sum of many frames' masses would round in half precision.
        total_GN = mass.detach().to(torch.promote_types(mass.dtype, torch.float32)).sum(dim=-1)
        looked_KGN = torch.where(total_GN > 0, looked_KGN / total_GN, 0)
    looked_KGN = looked_KGN.masked_fill(~mask, -torch.inf)
    # A stable sort, because topk leaves the order of ties open.
    best_KGJ = looked_KGN.sort(dim=-1, descending=True, stable=True).indices[..., :top_tokens]
    rank_J = torch.arange(best_KGJ.shape[-1], device=mass.device)
    missing_GJ = rank_J >= mask.sum(dim=1, keepdim=True)
    slots_KGJ = best_KGJ.masked_fill(missing_GJ, N).sort(dim=-1).values
    return slots_KGJ.masked_fill(slots_KGJ == N, -1)


def position_slots(mask: Tensor) -> Tensor:
    """Slots (1, G, N) that line responses up by position, -1 where a response has ended (TW-GRPO)."""
    op = "position_slots"
    checks.rank(op, "mask", mask, 2, "(G, N)")
    checks.dtype(op, "mask", mask, checks.BOOLS)
    places = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    return places.masked_fill(~mask, -1)[None]


def _frame_attention(mass_GNF: Tensor, mask_GN: Tensor, top_tokens: int) -> Tensor:
    """A (G, F): the mean of the K1 largest masses over valid tokens; 0 for a response without valid tokens."""
    mass_GNF = mass_GNF.detach()
    if mass_GNF.dtype in (torch.float16, torch.bfloat16):
        mass_GNF = mass_GNF.float()
    largest_GKF = (
        mass_GNF.masked_fill(~mask_GN[..., None], -torch.inf).topk(min(top_tokens, mass_GNF.shape[1]), dim=1).values
    )
    count_G1 = mask_GN.sum(dim=1, keepdim=True).clamp(1, top_tokens)
    return largest_GKF.masked_fill(largest_GKF == -torch.inf, 0).sum(dim=1) / count_G1


def _over_the_mean(attention_GF: Tensor, mass_GNF: Tensor, mask_GN: Tensor) -> Tensor:
    """A (G, F) in units of the response's mean mass on the frame over valid tokens; 0 where that is 0."""
    valid_GNF = mass_GNF.detach().to(attention_GF.dtype).masked_fill(~mask_GN[..., None], 0)
    mean_GF = valid_GNF.sum(dim=1) / mask_GN.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(mean_GF > 0, attention_GF / mean_GF, 0)


def _top_columns(values: Tensor, count: int) -> Tensor:
    """True at each row's ``count`` largest entries, same shape; ties go to the lower index."""
    best = values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, best, True)


def _contrast(attention_GF: Tensor, right_G: Tensor, wrong_G: Tensor, top_frames: int) -> Tensor:
    """(F,) bool: the frames that right responses look at more than wrong ones; none when either side is empty."""

    def mean(rows_G: Tensor) -> Tensor:
        return attention_GF.masked_fill(~rows_G[:, None], 0).sum(dim=0) / rows_G.sum().clamp(min=1)

    gain_F = mean(right_G) - mean(wrong_G)
    return _top_columns(gain_F, top_frames) & (gain_F > 0) & right_G.any() & wrong_G.any()


def _check_mass(op: str, mass: Tensor, mask: Tensor) -> None:
    checks.rank(op, "mass", mass, 3, "(G, N, F)")
    checks.dtype(op, "mass", mass, checks.FLOATS)
    check_mask(op, mask, mass.shape[:2])
    checks.same_device(op, "mass", mass, mask=mask)
    if min(mass.shape) == 0:
        checks.fail(
            op,
            "mass",
            "at least one response, token and frame",
            f"shape {tuple(mass.shape)}",
            "Skip empty groups.",
        )
    if checks.values_enabled():
        valid = mass.detach().masked_fill(~mask[..., None], 0)
        if not bool((valid.isfinite() & (valid >= 0)).all()):
            checks.fail(
                op,
                "mass",
                "finite values of at least 0 at valid tokens",
                "others",
                "Pass what frame_mass returned.",
            )


def check_mask(op: str, mask: Tensor, expected: torch.Size) -> None:
    """``mask`` must be a (G, N) bool tensor of the shape ``expected``."""
    checks.shape(op, "mask", mask, expected, "(G, N)", "Pass one entry per response token.")
    checks.dtype(op, "mask", mask, checks.BOOLS)


def _check_positive(op: str, **counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            checks.fail(op, name, "a whole number of at least 1", repr(value), "Choose how many to take.")
