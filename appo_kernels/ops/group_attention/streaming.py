"""group_attention out of the vendor's flash attention: a cascade of calls, merged by log-sum-exp.

Every prompt and every response on itself, causal; then the responses of each group on their prompt, full. The backward
of each call is given the merged out and lse. Which flash attention that is, `vendor` says.
"""

import torch
from torch import Tensor

from appo_kernels.attention.group_layout import GroupLayout
from appo_kernels.attention.merge import merge_attention
from appo_kernels.ops.group_attention import vendor
from appo_kernels.ops.group_attention.vendor import unsupported as unsupported


def forward(
    query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Writes ``out`` (1, Hq, T, d) and ``lse`` (1, Hq, T) from query (1, Hq, T, d), key and value (1, Hkv, T, d)."""
    flash = vendor.flash(query.device)
    query, key, value = flash.prepared(query, key, value)
    groups = layout.groups
    own_out, own_lse = flash.causal(query, key, value, _pieces(layout), scale)
    for group in groups:
        prompt, answers = group.prompt, group.answers
        out[:, :, prompt], lse[:, :, prompt] = own_out[:, :, prompt], own_lse[:, :, prompt]
        if group.responses:
            across = flash.full(query[:, :, answers], key[:, :, prompt], value[:, :, prompt], scale)
            merged = merge_attention([(own_out[:, :, answers], own_lse[:, :, answers]), across])
            out[:, :, answers], lse[:, :, answers] = merged.out, merged.lse


def backward(
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
    """Writes the gradients (1, H, T, d) from those of out and lse, None where nothing reached them."""
    flash, head_dim = vendor.flash(query.device), query.shape[-1]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    query, key, value, out, grad_out = flash.prepared(query, key, value, out, grad_out)
    if grad_lse is not None:
        query, key, value, out, grad_out = _with_lse_column(query, key, value, out, grad_out, grad_lse, flash.COLUMNS)
    wanted = grad_query, grad_key, grad_value
    # Gradients are added up where they are wanted, but where those are narrower than what is computed
    direct = grad_lse is None and query.dtype == grad_query.dtype
    totals = wanted if direct else tuple(torch.empty_like(x) for x in (query, key, value))
    flash.causal_backward(grad_out, query, key, value, out, lse, _pieces(layout), scale, totals)
    for group in layout.groups:
        if group.responses:
            prompt, answers = group.prompt, group.answers
            rows = (x[:, :, answers] for x in (grad_out, query))
            keys = (x[:, :, prompt] for x in (key, value))
            merged = (x[:, :, answers] for x in (out, lse))
            places = zip(totals, (answers, prompt, prompt), strict=True)
            flash.full_backward(*rows, *keys, *merged, scale, [total[:, :, place] for total, place in places])
    if not direct:
        for gradient, total in zip(wanted, totals, strict=True):
            gradient.copy_(total[..., :head_dim])


def _pieces(layout: GroupLayout) -> list[slice]:
    return [piece for group in layout.groups for piece in (group.prompt, *group.responses)]


def _with_lse_column(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, grad_out: Tensor, grad_lse: Tensor, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Flash attention's backward knows no gradient of lse: one more column, in which value is 0, out is -grad_lse and
    its gradient 1, makes its rowsum(grad_out * out) the delta that is wanted. ``columns`` - 1 more are zeros."""
    query, key, value, grad_out = (torch.nn.functional.pad(x, (0, columns)) for x in (query, key, value, grad_out))
    out = torch.nn.functional.pad(out, (0, columns))
    grad_out[..., -1], out[..., -1] = 1.0, -grad_lse.to(out.dtype)
    return query, key, value, out, grad_out
