"""group_attention, backend "triton": one attention pass a group."""

from functools import partial

from torch import Tensor

from appo_kernels import triton_launch
from appo_kernels.attention import by_group
from appo_kernels.attention import triton_passes as passes
from appo_kernels.attention.arguments import Layout
from appo_kernels.dispatch import Problem


def unsupported(problem: Problem) -> str | None:
    return triton_launch.unsupported(problem)


def _attend(query: Tensor, key: Tensor, value: Tensor, seen: Layout, out: Tensor, lse: Tensor, mass: Tensor) -> None:
    passes.attend(query, key, value, seen, out, lse, mass[:, None])


forward, backward = partial(by_group.forward, _attend), partial(by_group.backward, passes.attend_backward)
