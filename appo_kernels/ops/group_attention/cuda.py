"""group_attention, backend "cuda": one pass of frame_attention's kernels a group."""

from functools import partial

from appo_kernels.dispatch import Problem
from appo_kernels.ops.frame_attention import cuda as attention
from appo_kernels.ops.group_attention import by_group


def unsupported(problem: Problem) -> str | None:
    return attention.unsupported(problem)


forward, backward = partial(by_group.forward, attention), partial(by_group.backward, attention)
