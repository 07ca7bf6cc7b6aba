"""Fused operators for attention statistics and policy optimisation: Triton, CUDA and a fast PyTorch path."""

from appo_kernels.ops.group_divergence import group_divergence, group_divergence_from_logits
from appo_kernels.ops.token_logprobs import TokenLogprobs, token_logprobs

__all__ = ["TokenLogprobs", "group_divergence", "group_divergence_from_logits", "token_logprobs"]

__version__ = "0.1.0"
