"""Fused operators for attention statistics and policy optimisation: Triton, CUDA and a fast PyTorch path."""

from appo_kernels.ops.token_logprobs import TokenLogprobs, token_logprobs

__all__ = ["TokenLogprobs", "token_logprobs"]

__version__ = "0.1.0"
