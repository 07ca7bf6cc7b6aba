"""group_attention, backend "triton": one attention pass a group."""

from functools import partial

from appo_kernels import triton_launch
from appo_kernels.attention import by_group
from appo_kernels.attention import triton_passes as passes
from appo_kernels.dispatch import Problem


def unsupported(problem: Problem) -> str | None:
    return triton_launch.unsupported(problem)


forward, backward = partial(by_group.forward, passes.attend), partial(by_group.backward, passes.attend_backward)
