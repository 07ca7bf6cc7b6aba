"""frame_attention, backend "triton": one online-softmax pass, its finish, and the gradients."""

from torch import Tensor

from appo_kernels import triton_launch
from appo_kernels.attention import triton_passes as passes
from appo_kernels.attention.arguments import Gradients, Layout, Upstream
from appo_kernels.dispatch import Problem


def unsupported(problem: Problem) -> str | None:
    return triton_launch.unsupported(problem)


def forward(query: Tensor, key: Tensor, value: Tensor, layout: Layout, out: Tensor, lse: Tensor, mass: Tensor) -> None:
    """Writes ``out`` and ``lse``, adds to ``mass`` (B, 1, R, F)."""
    passes.attend(query, key, value, layout, out, lse, mass, per_head=False)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    out: Tensor,
    lse: Tensor,
    upstream: Upstream,
    gradients: Gradients,
) -> None:
    """Writes ``gradients`` from ``upstream``, whose mass is (B, 1, R, F)."""
    passes.attend_backward(query, key, value, layout, out, lse, upstream, gradients, per_head=False)
