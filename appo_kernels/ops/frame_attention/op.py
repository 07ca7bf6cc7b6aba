"""frame_attention: attention that also returns the log-sum-exp of each row and the mass on each frame.

A backend has

    forward(query, key, value, layout, out, lse, mass)
        writes ``out`` and ``lse`` and adds to ``mass``, which comes in as zeros
    backward(query, key, value, layout, out, lse, upstream, gradients)
        writes those of ``gradients`` that are not None, whatever was in the buffers before

    query      (B, Hq, R, d), key and value (B, Hkv, S, d): one of fp32, fp16, bf16 (fp64: torch only); any strides,
               unit last one
    layout     frames and visibility: ``attention.arguments.AttentionLayout``
    out        (B, Hq, R, d) like query; lse (B, Hq, R) fp32, natural log; both contiguous; mass (B, 1, R, F) fp32
    upstream, gradients    ``attention.arguments.Upstream`` and ``Gradients``

With P_h the softmax of head h, w the frame weights, f(j) the frame of key j, and g the gradient of the mass (0 on
keys of no frame):

    dP_h[r,j] = grad_out_h[r] . value_j + w_f(j) g[r,f(j)] / Hq
    dS_h[r,j] = P_h[r,j] (dP_h[r,j] - delta_h[r])
    delta_h[r] = grad_out_h[r] . out_h[r] + sum_f w_f g[r,f] M_h[r,f] / Hq - grad_lse_h[r]

where M_h is the frame sum of head h alone, not the mean over heads. The first term of delta is taken from the
``out`` that was returned.
"""

from typing import Any

import torch
from torch import Tensor

from appo_kernels import checks, dispatch
from appo_kernels.attention import arguments
from appo_kernels.attention.arguments import AttentionLayout, Gradients, Upstream
from appo_kernels.attention.frame_plan import FramePlan, planned
from appo_kernels.attention.merge import FrameAttentionOutput
from appo_kernels.autograd import differentiable_once
from appo_kernels.dtypes import compute_dtype

OP = "frame_attention"


def frame_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frame_ids: Tensor | None = None,
    *,
    num_frames: int | None = None,
    first_key: Tensor | None = None,
    last_key: Tensor | None = None,
    prefix_keys: Tensor | None = None,
    scale: float | None = None,
    reduction: str = "sum",
    plan: FramePlan | None = None,
    backend: str = "auto",
) -> FrameAttentionOutput:
    """Attention and its mass on every frame, mean_h sum_{v in f} softmax_v(...), in one pass (docs/method.md eq. 2).

    Args:
        query: (B, Hq, R, d) fp32, fp16, bf16 or fp64.
        key, value: (B, Hkv, S, d), dtype of ``query``; Hq is any multiple of Hkv.
        frame_ids: (B, S) int32 or int64, the frame of each key in [0, num_frames), -1 for none, in any order.
        num_frames: F. A frame may have no key.
        first_key, last_key: (B, R) int. Row r sees keys first..last inclusive; None: 0 and S - 1. first > last: none of
            them. A negative first_key is as 0 (a window that starts before the sequence).
        prefix_keys: (B, R) int in [0, S]: keys 0..prefix-1 are seen as well; a key in both counts once. None: 0.
        scale: of the scores; None: 1 / sqrt(d).
        reduction: "sum" over the keys of a frame (a probability), or "mean" (the paper's Attn).
        plan: a `FramePlan` in place of frame_ids, num_frames and the bounds, so that what depends on these alone is
            worked out once for all layers. Of a `GroupLayout`: every group on its own frames.
        backend: "auto", "torch", "triton" or "cuda".

    Returns:
        ``FrameAttentionOutput(out, lse, mass)``: (B, Hq, R, d) of the dtype of query; (B, Hq, R) fp32; (B, R, F) fp32
        (fp64 for fp64 inputs). A row that sees no key has out 0, lse -inf and mass 0, exactly, and no gradient.
        Differentiable once with respect to query, key and value through all three.

    Raises:
        ValueError: a wrong type, shape, dtype or device; a frame id outside [-1, num_frames), a last_key beyond S - 1,
            prefix_keys outside [0, S].
    """
    frame_ids, num_frames, bounds = planned(OP, plan, frame_ids, num_frames, (first_key, last_key, prefix_keys))
    if plan is not None and plan.groups:
        plan.check_call(OP, query, key)
        parts = [
            frame_attention(
                query[:, :, chosen], key[:, :, keys], value[:, :, keys], scale=scale, reduction=reduction, plan=own,
                backend=backend,
            )
            for chosen, keys, own in plan.groups
        ]  # fmt: skip
        return FrameAttentionOutput(
            *(plan.joined(x, d) for x, d in zip(zip(*parts, strict=True), (2, 2, 1), strict=True))
        )
    first_key, last_key, prefix_keys = bounds
    layout = arguments.prepare(
        OP, query, key, frame_ids, num_frames=num_frames, first_key=first_key, last_key=last_key,
        prefix_keys=prefix_keys, scale=scale, reduction=reduction,
    )  # fmt: skip
    checks.shape(OP, "value", value, key.shape, "(B, Hkv, S, d)", "Its shape is that of `key`.")
    checks.dtype(OP, "value", value, (query.dtype,))
    checks.same_device(OP, "query", query, value=value)
    wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    size = dispatch.scores(query, key)
    backend = dispatch.resolve(OP, backend, query.device, query.dtype, query.shape[-1], wants_grad, scores=size)
    query, key, value = (arguments.unit_last_stride(t) for t in (query, key, value))
    return FrameAttentionOutput(*_FrameAttention.apply(query, key, value, *layout, num_frames, backend))


class _FrameAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        frame_ids: Tensor,
        first_key: Tensor | None,
        last_key: Tensor | None,
        prefix_keys: Tensor | None,
        frame_weights: Tensor | None,
        scale: float,
        num_frames: int,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(out (B, Hq, R, d), lse (B, Hq, R), mass (B, R, F)); tensors of the layout: see ``AttentionLayout``."""
        ctx.set_materialize_grads(False)  # a result that was not used costs the backward nothing
        batch, heads, rows, _ = query.shape
        dtype = compute_dtype(query.dtype)
        out = query.new_empty(query.shape)
        lse = query.new_empty((batch, heads, rows), dtype=dtype)
        mass = query.new_zeros((batch, rows, num_frames), dtype=dtype)
        layout = (frame_ids, first_key, last_key, prefix_keys, frame_weights)
        forward_op(query, key, value, *layout, scale, out, lse, mass, backend)
        ctx.save_for_backward(query, key, value, *layout, out, lse)
        ctx.settings = scale, backend
        return out, lse, mass

    @staticmethod
    @differentiable_once(OP)
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_mass: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value, from those of the results that were used."""
        *inputs, out, lse = ctx.saved_tensors
        scale, backend = ctx.settings
        grads = [t.new_empty(t.shape) if needed else None for t, needed in zip(inputs, ctx.needs_input_grad[:3])]  # noqa: B905
        backward_op(*inputs, scale, out, lse, grad_out, grad_lse, grad_mass, *grads, backend)
        return *grads, *(None,) * 8


@dispatch.out_variant("frame_attention_forward", mutates=("out", "lse", "mass"))
def forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frame_ids: Tensor,
    first_key: Tensor | None,
    last_key: Tensor | None,
    prefix_keys: Tensor | None,
    frame_weights: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    mass: Tensor,
    backend: str,
) -> None:
    """Writes ``out`` and ``lse``, adds to ``mass`` (B, R, F)."""
    layout = AttentionLayout(frame_ids, first_key, last_key, prefix_keys, frame_weights, scale)
    if checks.values_enabled():
        arguments.check_values(OP, key.shape[2], mass.shape[-1], layout)
    dispatch.backend_module(OP, backend).forward(query, key, value, layout, out, lse, mass[:, None], per_head=False)


@dispatch.out_variant("frame_attention_backward", mutates=("grad_query", "grad_key", "grad_value"))
def backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frame_ids: Tensor,
    first_key: Tensor | None,
    last_key: Tensor | None,
    prefix_keys: Tensor | None,
    frame_weights: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_mass: Tensor | None,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    grad_value: Tensor | None,
    backend: str,
) -> None:
    """Writes the gradients that are not None; ``grad_mass`` (B, R, F)."""
    layout = AttentionLayout(frame_ids, first_key, last_key, prefix_keys, frame_weights, scale)
    upstream = Upstream(grad_out, grad_lse, None if grad_mass is None else grad_mass[:, None])
    gradients = Gradients(grad_query, grad_key, grad_value)
    module = dispatch.backend_module(OP, backend)
    module.backward(query, key, value, layout, out, lse, upstream, gradients, per_head=False)
