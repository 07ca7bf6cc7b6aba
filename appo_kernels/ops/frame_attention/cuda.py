"""frame_attention, backend "cuda": csrc/attention_forward, csrc/attention_backward."""

import math

from torch import Tensor

from appo_kernels.attention import cuda_passes as passes
from appo_kernels.attention.arguments import Layout
from appo_kernels.dispatch import Problem

OP = "frame_attention"


def unsupported(problem: Problem) -> str | None:
    return passes.unsupported(problem)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    out: Tensor,
    lse: Tensor,
    mass: Tensor,
) -> None:
    """Arguments as of ``streaming.forward``."""
    if not lse.numel():
        return
    if not key.shape[2]:
        out.zero_()
        lse.fill_(-math.inf)
        return
    common, values = passes.operands(query, key, layout, mass.shape[-1]), passes.aligned(value)
    passes.attend(OP, "appo_frame_attention_forward", common, values, layout.frame_weights, out, lse, mass, False)


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
    """Arguments as of ``streaming.backward``."""
    head_mass = None
    if grad_mass is not None:
        head_mass = (
            grad_mass / query.shape[1]
            if layout.frame_weights is None
            else grad_mass * (layout.frame_weights[:, None] / query.shape[1])
        )
        head_mass = head_mass[:, None]
    if grad_value is not None and grad_out is None:
        grad_value.zero_()
    passes.attend_backward(
        OP, query, key, value if grad_out is not None else None, layout, out, lse, grad_out, grad_lse, head_mass,
        grad_query, grad_key, grad_value,
    )  # fmt: skip
