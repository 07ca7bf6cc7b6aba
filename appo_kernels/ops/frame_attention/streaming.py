"""frame_attention, backend "torch": an online softmax over tiles of keys sorted by frame, any device."""

from torch import Tensor

from appo_kernels.attention import torch_passes as passes
from appo_kernels.attention.arguments import Layout
from appo_kernels.dispatch import Problem


def unsupported(problem: Problem) -> str | None:
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    out: Tensor,
    lse: Tensor,
    mass: Tensor,
) -> None:
    passes.attend(
        query,
        key,
        value,
        layout,
        out,
        lse,
        mass,
        per_head=False,
        max_keys=passes.MAX_KEYS,
        tile_scores=passes.TILE_SCORES,
    )


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
        query, key, value, layout, out, lse, grad_out, grad_lse, grad_mass, grad_query, grad_key, grad_value,
        per_head=False,
    )  # fmt: skip
