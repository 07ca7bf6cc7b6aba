"""frame_attention, backend "triton": one online-softmax pass, its finish, and the gradients."""

from torch import Tensor

from appo_kernels import triton_launch
from appo_kernels.attention import triton_passes as passes
from appo_kernels.attention.arguments import Layout
from appo_kernels.dispatch import Problem


def unsupported(problem: Problem) -> str | None:
    return triton_launch.unsupported(problem)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    out: Tensor,
    lse: Tensor,
    mass: Tensor,
) -> None:
    passes.attend(query, key, value, layout, out, lse, mass[:, None])


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_mass: Tensor | None,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
) -> None:
    passes.attend_backward(
        query, key, value, layout, out, lse, grad_out, grad_lse, None if grad_mass is None else grad_mass[:, None],
        grad_query, grad_key, grad_value,
    )  # fmt: skip
