"""group_attention, backend "cuda": csrc/attention_forward and csrc/attention_backward, one pass a group."""

from functools import partial

from torch import Tensor

from appo_kernels.attention import by_group
from appo_kernels.attention import cuda_passes as passes
from appo_kernels.attention.arguments import Layout
from appo_kernels.dispatch import Problem

OP = "group_attention"


def unsupported(problem: Problem) -> str | None:
    return passes.unsupported(problem)


def _attend(query: Tensor, key: Tensor, value: Tensor, seen: Layout, out: Tensor, lse: Tensor, mass: Tensor) -> None:
    common = passes.operands(query, key, seen, 0)
    passes.attend(OP, "appo_frame_attention_forward", common, passes.aligned(value), None, out, lse, mass, False)


def _attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Layout,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_mass: None,
    *grads: Tensor,
) -> None:
    if grad_out is None:
        grads[2].zero_()
    passes.attend_backward(
        OP, query, key, value if grad_out is not None else None, seen, out, lse, grad_out, grad_lse, grad_mass, *grads
    )


forward, backward = partial(by_group.forward, _attend), partial(by_group.backward, _attend_backward)
