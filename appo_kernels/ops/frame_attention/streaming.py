"""frame_attention, backend "torch": an online softmax over tiles of keys sorted by frame, any device."""

from appo_kernels.attention import torch_passes as passes
from appo_kernels.dispatch import Problem


def unsupported(problem: Problem) -> str | None:
    return None


forward, backward = passes.attend, passes.attend_backward
