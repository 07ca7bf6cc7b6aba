"""frame_attention, backend "cuda": csrc/attention_forward, csrc/attention_backward."""

from torch import Tensor

from appo_kernels.attention import cuda_passes as passes
from appo_kernels.attention.arguments import Gradients, Layout, Upstream
from appo_kernels.dispatch import Problem


def unsupported(problem: Problem) -> str | None:
    return passes.unsupported(problem)


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
