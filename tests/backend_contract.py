"""What a backend may refuse, written down a second time, so that one that refuses more fails instead of skipping."""

import os

import torch

from appo_kernels.dispatch import Problem

ATTENTION = ("frame_mass", "frame_attention", "group_attention")
CUDA_HEAD_DIMS, CUDA_GRAD_HEAD_DIMS = (64, 80, 96, 128, 256), (64, 128)
TRITON_LARGEST_HEAD_DIM = 256


def may_refuse(problem: Problem, backend: str) -> bool:
    """Whether the documentation says that ``backend`` does not serve ``problem`` on a device that it serves at all."""
    if backend == "torch":
        return False
    if problem.dtype == torch.float64:
        return True
    if backend == "triton":
        if os.environ.get("TRITON_INTERPRET") == "1" and problem.op in ATTENTION and problem.dtype == torch.bfloat16:
            return True
        return problem.head_dim > TRITON_LARGEST_HEAD_DIM
    if problem.op == "token_logprobs":
        return True
    if problem.op in ATTENTION:
        head_dims = CUDA_GRAD_HEAD_DIMS if problem.needs_grad else CUDA_HEAD_DIMS
        return problem.dtype == torch.float32 or problem.head_dim not in head_dims
    return False
