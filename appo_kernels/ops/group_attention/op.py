"""group_attention: attention of a group of responses behind one prompt, exact, in memory linear in the tokens.

A backend has

    forward(query, key, value, layout, scale, out, lse)
        writes ``out`` and ``lse``
    backward(query, key, value, layout, scale, out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value)
        writes the last three, whatever was in the buffers before; grad_out or grad_lse is None where that result was
        not used

    query      (1, Hq, T, d), key and value (1, Hkv, T, d): one of fp32, fp16, bf16 (fp64: torch only); any strides,
               unit last one
    layout     `GroupLayout` of T tokens
    out        (1, Hq, T, d) like query, any strides; lse (1, Hq, T) fp32, natural log, contiguous
    grad_out, grad_lse: like the results, any strides; grad_query, grad_key, grad_value: like the inputs, contiguous

Gradients are exact when the backward of a part of the keys is given the out and lse of all keys, as in ring attention:
with P = exp(scores - lse), dS = P (grad_out . value - delta) and delta = grad_out . out - grad_lse, every part adds its
own keys' share, and the shares of one key from several parts are sums.
"""

import math
from typing import Any

import torch
from torch import Tensor

from appo_kernels import checks, dispatch
from appo_kernels.attention.arguments import unit_last_stride
from appo_kernels.attention.group_layout import GroupLayout
from appo_kernels.autograd import differentiable_once
from appo_kernels.dtypes import compute_dtype

OP = "group_attention"


def group_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: GroupLayout,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention in a packed row of groups: each token sees its prompt and its own response, up to itself.

    Work is that of P^2 / 2 + P sum(N_i) + sum(N_i^2) / 2 pairs a group, where separate sequences take
    sum((P + N_i)^2) / 2; memory grows with T. ``frame_attention`` and ``frame_mass`` with ``FramePlan.of_layout`` give
    the mass on frames beside it.

    Args:
        query: (1, Hq, T, d) fp32, fp16, bf16 or fp64: groups one after another, each its prompt, response 1 .. G.
        key, value: (1, Hkv, T, d), dtype of ``query``; Hq is any multiple of Hkv.
        layout: the lengths of prompts and responses; they add up to T.
        scale: of the scores; None: 1 / sqrt(d).
        backend: "auto", "torch" (the vendor's flash attention), "triton" or "cuda".

    Returns:
        out (1, Hq, T, d) of the dtype of query; lse (1, Hq, T) fp32, natural log (fp64 for fp64 inputs).
        Differentiable once with respect to query, key and value through both.

    Raises:
        ValueError: a wrong shape, dtype or device; a layout of another number of tokens.
    """
    _check(query, key, value, layout)
    head_dim = query.shape[-1]
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    backend = dispatch.resolve(OP, backend, query.device, query.dtype, head_dim, needs_grad)
    query, key, value = (unit_last_stride(t) for t in (query, key, value))
    scale = 1.0 / math.sqrt(dispatch.constant(head_dim)) if scale is None else scale
    scale = checks.number(OP, "scale", scale, "None or a finite number", "None stands for 1 / sqrt(d).")
    out, lse = _GroupAttention.apply(query, key, value, layout.lengths, scale, backend)
    return out, lse


def _check(query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout) -> None:
    checks.rank(OP, "query", query, 4, "(1, Hq, T, d)")
    checks.rank(OP, "key", key, 4, "(1, Hkv, T, d)")
    checks.dtype(OP, "query", query, checks.FLOATS)
    batch, query_heads, tokens, head_dim = query.shape
    if batch != 1:
        remedy = "Put the sequences of a batch one after another in one row; a GroupLayout says where each begins."
        checks.fail(OP, "query", "one packed row, shape (1, Hq, T, d)", f"shape {tuple(query.shape)}", remedy)
    key_heads = key.shape[1]
    remedy = "Tokens and head size are those of `query`."
    checks.shape(OP, "key", key, (1, key_heads, tokens, head_dim), "(1, Hkv, T, d)", remedy)
    checks.shape(OP, "value", value, key.shape, "(1, Hkv, T, d)", "Its shape is that of `key`.")
    for name, tensor in (("key", key), ("value", value)):
        checks.dtype(OP, name, tensor, (query.dtype,))
    if head_dim < 1 or key_heads < 1 or query_heads < 1 or query_heads % key_heads:
        remedy = "Pass the heads of the layer as they are; keys need not be repeated."
        got = f"Hq = {query_heads}, Hkv = {key_heads}, d = {head_dim}"
        checks.fail(OP, "query", "Hq a positive multiple of Hkv, d at least 1", got, remedy)
    checks.same_device(OP, "query", query, key=key, value=value)
    if not isinstance(layout, GroupLayout):
        remedy = "Make it of the lengths: GroupLayout(prompt_lengths, response_lengths)."
        checks.fail(OP, "layout", "a GroupLayout", type(layout).__name__, remedy)


class _GroupAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        """out (1, Hq, T, d), lse (1, Hq, T)."""
        ctx.set_materialize_grads(False)
        _, heads, tokens, head_dim = query.shape
        # Tokens before heads, as a model goes on with it, so that nothing is copied there
        out = query.new_empty(1, tokens, heads, head_dim).transpose(1, 2)
        lse = query.new_empty((1, heads, tokens), dtype=compute_dtype(query.dtype))
        forward_op(query, key, value, lengths, scale, out, lse, backend)
        ctx.save_for_backward(query, key, value, lengths, out, lse)
        ctx.settings = scale, backend
        return out, lse

    @staticmethod
    @differentiable_once(OP)
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, lengths, out, lse = ctx.saved_tensors
        scale, backend = ctx.settings
        grads = [t.new_empty(t.shape) for t in (query, key, value)]
        backward_op(query, key, value, lengths, scale, out, lse, grad_out, grad_lse, *grads, backend)
        return *grads, None, None, None


@dispatch.out_variant("group_attention_forward", mutates=("out", "lse"))
def forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    backend: str,
) -> None:
    """Writes ``out`` (1, Hq, T, d) and ``lse`` (1, Hq, T). lengths: (groups, 1 + G), those of a GroupLayout."""
    layout = GroupLayout.of_lengths(lengths)
    if layout.tokens != query.shape[2]:
        remedy = "Count every token of every prompt and response once, and no padding."
        expected = f"lengths that add up to the {query.shape[2]} tokens of `query`"
        checks.fail(OP, "layout", expected, f"{layout.tokens} tokens", remedy)
    dispatch.backend_module(OP, backend).forward(query, key, value, layout, scale, out, lse)


@dispatch.out_variant("group_attention_backward", mutates=("grad_query", "grad_key", "grad_value"))
def backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    backend: str,
) -> None:
    """Writes the gradients (1, H, T, d); grad_out and grad_lse are None where nothing reached them."""
    layout = GroupLayout.of_lengths(lengths)
    operands = (query, key, value, layout, scale, out, lse, grad_out, grad_lse)
    dispatch.backend_module(OP, backend).backward(*operands, grad_query, grad_key, grad_value)
