"""Disagreement of the tokens of a slot, from which token weights are made: divergence or entropy (docs/method.md 5).

Shapes: K target frames, G responses of one prompt, J slots per frame, N response tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from appo_kernels import checks

DISAGREEMENTS = ("divergence", "entropy", "mixture")


def slot_disagreement(
    kind: str, slots: Tensor, divergence: Callable[[Tensor], Tensor], entropy: Tensor | None = None
) -> Tensor:
    """The values that `token_weights` scales, one for each slot, or for each member of each slot.

    With p_i the distribution that member i's token is drawn from, H its entropy, and pbar the mean of the members':

        kind="divergence" (paper):  D[k, j] of eq. (11) or (12): how much the p_i of a slot differ.
        kind="entropy" (ours):      H(p_i), of each member by itself.
        kind="mixture" (ours):      H(pbar) = D[k, j] + mean_i H(p_i), of the mean distribution; D is eq. (11).

    The divergence is small where all members are about to choose alike-distributed, and large where each repeats what
    it has chosen; the entropy is the other way round; the mixture's is large in both places.

    Args:
        slots: (K, G, J) int, from ``perception_slots``.
        divergence: (slots) -> (K, J) on the CPU; of the kind "kl" for "mixture".
        entropy: (G, N) of each token's distribution, in nats; not read for "divergence".

    Returns:
        (K, J), or (K, G, J) for "entropy", whose value at a missing member is 0.

    Raises:
        ValueError: an unknown kind, or no entropy of the right shape where it is needed.
    """
    op = "slot_disagreement"
    checks.choice(op, "kind", kind, DISAGREEMENTS, 'Pass "divergence" for the paper\'s.')
    if kind == "divergence":
        return divergence(slots)
    if entropy is None or entropy.ndim != 2 or entropy.shape[0] != slots.shape[1]:
        got = "none" if entropy is None else f"shape {tuple(entropy.shape)}"
        expected = f"shape (G, N) with G = {slots.shape[1]}, for kind = {kind}"
        checks.fail(op, "entropy", expected, got, "Pass the entropy of each response token, of token_logprobs.")
    entropy_KGN = entropy.detach().expand(slots.shape[0], -1, -1)
    present_KGJ = slots >= 0
    # A missing member reads token 0, if there is one, and is masked.
    own_KGJ = torch.zeros(slots.shape, dtype=entropy.dtype, device=entropy.device)
    if entropy.shape[1]:
        own_KGJ = entropy_KGN.gather(2, slots.clamp(min=0).long()).masked_fill(~present_KGJ, 0)
    if kind == "entropy":
        return own_KGJ
    return divergence(slots) + own_KGJ.sum(1) / present_KGJ.sum(1).clamp(min=1)
