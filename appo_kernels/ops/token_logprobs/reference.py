"""Definition of token_logprobs: dense, in the dtype of its inputs."""

import torch
from torch import Tensor

from appo_kernels.ops.token_logprobs.op import TokenLogprobs


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> TokenLogprobs:
    """hidden (M, D), weight (V, D), targets (M,), bias (V,) -> logprobs, entropy, lse, each (M,)."""
    logits = hidden @ weight.t()  # (M, V)
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    log_p = torch.log_softmax(logits, dim=-1)
    # A word of probability 0 adds nothing to the entropy: p log p -> 0.
    finite_log_p = log_p.masked_fill(log_p == float("-inf"), 0.0)
    return TokenLogprobs(
        logprobs=log_p.gather(1, targets[:, None].long()).squeeze(1),
        entropy=-(log_p.exp() * finite_log_p).sum(-1),
        lse=torch.logsumexp(logits, dim=-1),
    )
