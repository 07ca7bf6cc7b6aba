"""Token weights of 0 and 1: which tokens of a batch take part in the policy gradient at all.

Multiply them into the token weights of a surrogate. Shapes: B responses, T tokens.
"""

import torch
from torch import Tensor
from torch import distributed as dist

from appo_kernels import checks


def off_policy_sequences(
    logprobs: Tensor, sampled_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, threshold: float
) -> Tensor:
    """Weights (B, T) that drop responses with A < 0 that the policy has moved away from (DeepSeek-V3.2).

    A response goes where the mean over its tokens of log pi_sampled - log pi exceeds ``threshold``. A NaN in
    ``sampled_logprobs``, of a token that the engine could not score, counts as a difference of 0.

    Args:
        logprobs, sampled_logprobs: (B, T) under the policy now, and under the one that sampled.
        advantages: (B,), or (B, T) to drop tokens by the sign of their own.
        mask: (B, T) bool.
        threshold: a finite number.

    Returns:
        (B, T) fp32, 0 where dropped or masked. Detached.

    Raises:
        ValueError: wrong type, shape, dtype or device.
    """
    op = "off_policy_sequences"
    checks.rank(op, "logprobs", logprobs, 2, "(B, T)")
    B, T = logprobs.shape
    remedy = "Pass one value for each token."
    for name, tensor in (("sampled_logprobs", sampled_logprobs), ("mask", mask)):
        checks.shape(op, name, tensor, (B, T), "(B, T)", remedy)
    for name, tensor in (("logprobs", logprobs), ("sampled_logprobs", sampled_logprobs), ("advantages", advantages)):
        checks.dtype(op, name, tensor, checks.FLOATS)
    checks.dtype(op, "mask", mask, checks.BOOLS)
    if tuple(advantages.shape) not in ((B,), (B, T)):
        checks.fail(op, "advantages", f"shape {(B,)} or {(B, T)}", f"shape {tuple(advantages.shape)}", remedy)
    checks.same_device(
        op, "logprobs", logprobs, sampled_logprobs=sampled_logprobs, advantages=advantages, mask=mask
    )  # fmt: skip
    threshold = checks.number(op, "threshold", threshold, "a finite number", "It is a mean log-ratio per token.")
    moved = torch.where(mask, sampled_logprobs.detach().float() - logprobs.detach().float(), 0.0).nan_to_num(nan=0.0)
    mean = moved.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    kept = ((advantages if advantages.dim() == 2 else advantages[:, None]) >= 0) | (mean <= threshold)
    return (kept & mask).float()


def top_entropy_tokens(
    entropy: Tensor, mask: Tensor, *, share: float, group: "dist.ProcessGroup | None" = None
) -> Tensor:
    """Weights (B, T) that keep the valid tokens of highest entropy ("80/20", arXiv 2506.01939).

    Kept is what reaches the (1 - share) quantile of all valid tokens of the batch, of all processes of ``group`` where
    torch.distributed runs. Ties are kept.

    Args:
        entropy: (B, T) in nats, from ``token_logprobs``; anything where masked.
        mask: (B, T) bool.
        share: in (0, 1]; 0.2 in the paper.

    Returns:
        (B, T) fp32. Detached.

    Raises:
        ValueError: wrong type, shape, dtype or device; a share outside (0, 1].
    """
    op = "top_entropy_tokens"
    checks.rank(op, "entropy", entropy, 2, "(B, T)")
    checks.dtype(op, "entropy", entropy, checks.FLOATS)
    checks.shape(op, "mask", mask, entropy.shape, "(B, T)", "Pass one value for each token.")
    checks.dtype(op, "mask", mask, checks.BOOLS)
    checks.same_device(op, "entropy", entropy, mask=mask)
    share = checks.number(op, "share", share, "a number in (0, 1]", "0.2 keeps a fifth.", above=0.0, most=1.0)
    entropy = entropy.detach().float()
    valid = entropy[mask]
    if dist.is_available() and dist.is_initialized():
        parts: list[Tensor | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, valid.cpu(), group=group)
        valid = torch.cat([part for part in parts if part is not None]).to(entropy.device)
    if not valid.numel():
        return torch.zeros_like(entropy)
    ordered = valid.double().sort().values  # torch.quantile takes 2^24 numbers at most
    place = (1.0 - share) * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    limit = ordered[below] + (ordered[above] - ordered[below]) * (place - below)
    return (mask & (entropy.double() >= limit)).float()
