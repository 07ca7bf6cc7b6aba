"""Passes over a packed row of groups by our own kernels: one a group, with the visibility that the kernels know.

A row of a response sees its prompt as a prefix of the group's keys and its own response as an interval.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from appo_kernels.attention.arguments import AttentionLayout, Gradients, Upstream
from appo_kernels.attention.group_layout import Group, GroupLayout, bounds


def _visibility(group: Group, device: torch.device, scale: float) -> AttentionLayout:
    """Of a pass without frames."""
    seen = bounds(group, device)
    none = torch.full_like(seen.last_key, -1)
    return AttentionLayout(none, seen.first_key, seen.last_key, seen.prefix_keys, None, scale)


def forward(
    attend: Callable[..., None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: GroupLayout,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Write ``out`` (1, Hq, T, d) and ``lse`` (1, Hq, T) of a packed row, by ``attend`` of a backend's passes."""
    for group in layout.groups:
        operands = [x[:, :, group.whole] for x in (query, key, value)]
        found = (
            torch.empty_like(operands[0], memory_format=torch.contiguous_format),
            lse[:, :, group.whole].contiguous(),
        )
        no_mass = lse.new_zeros(1, 1, operands[0].shape[2], 0)
        attend(*operands, _visibility(group, query.device, scale), *found, no_mass, per_head=False)
        out[:, :, group.whole], lse[:, :, group.whole] = found


def backward(
    attend_backward: Callable[..., None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: GroupLayout,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Write the gradients (1, H, T, d), by ``attend_backward``; grad_out, grad_lse: None where nothing reached it."""
    for group in layout.groups:
        operands = [x[:, :, group.whole] for x in (query, key, value)]
        results = [x[:, :, group.whole].contiguous() for x in (out, lse)]
        grads = (None if x is None else x[:, :, group.whole].contiguous() for x in (grad_out, grad_lse))
        upstream = Upstream(next(grads), next(grads), None)
        found = [
            torch.empty_like(x[:, :, group.whole], memory_format=torch.contiguous_format) for x in (query, key, value)
        ]
        seen = _visibility(group, query.device, scale)
        attend_backward(*operands, seen, *results, upstream, Gradients(*found), per_head=False)
        for total, share in zip((grad_query, grad_key, grad_value), found, strict=True):
            total[:, :, group.whole] = share
