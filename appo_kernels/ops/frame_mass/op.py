"""frame_mass: how much attention each query row spends on each frame, without an attention matrix.

A backend has

    forward(query, key, layout, lse, mass, new_lse, per_head)
        adds to ``mass``; exactly one of ``lse`` (given) and ``new_lse`` (to be written) is a tensor
    backward(query, key, layout, lse, grad_mass, gradients, per_head)
        writes those of ``gradients`` that are not None, whatever was in the buffers before

    query, key     (B, Hq, R, d) and (B, Hkv, S, d): one of fp32, fp16, bf16 (fp64: torch only); any strides, unit last
    layout         frames and visibility: ``attention.arguments.AttentionLayout``
    lse, new_lse   (B, Hq, R) fp32, natural log; lse -inf (also +inf) only in rows that see no key
    mass           (B, H, R, F) fp32, any strides; H = Hq when ``per_head``, else 1, the mean over heads
    grad_mass      like mass, any strides
    gradients      ``attention.arguments.Gradients``, without a value

With P_h the softmax of head h over all visible keys, w the frame weights, c = 1/Hq (1 when per_head), f(j) the frame
of key j and g the incoming gradient: mass[r,f] = c w_f sum_h sum_{j in f} P_h[r,j], and

    dS_h[r,j] = P_h[r,j] (c w_f(j) g[r,f(j)] - delta_h[r]),    delta_h[r] = sum_j P_h[r,j] c w_f(j) g[r,f(j)]

with g = 0 on keys of no frame: dS is not zero there, because they share the row's normaliser.
"""

from typing import Any

import torch
from torch import Tensor

from appo_kernels import checks, dispatch
from appo_kernels.attention import arguments
from appo_kernels.attention.arguments import AttentionLayout, Gradients, Upstream
from appo_kernels.attention.frame_plan import FramePlan, GroupRows, planned
from appo_kernels.attention.torch_passes import FEW_KEYS
from appo_kernels.autograd import differentiable_once
from appo_kernels.dtypes import compute_dtype

OP = "frame_mass"


def frame_mass(
    query: Tensor,
    key: Tensor,
    frame_ids: Tensor | None = None,
    *,
    num_frames: int | None = None,
    lse: Tensor | None = None,
    first_key: Tensor | None = None,
    last_key: Tensor | None = None,
    prefix_keys: Tensor | None = None,
    scale: float | None = None,
    reduction: str = "sum",
    per_head: bool = False,
    out: Tensor | None = None,
    plan: FramePlan | None = None,
    backend: str = "auto",
) -> Tensor:
    """Frame attention mass M[b,r,f] = mean_h sum_{v in f} softmax_v(scale query_h,r . key_v) (docs/method.md eq. 2).

    Args:
        query: (B, Hq, R, d) fp32, fp16, bf16 or fp64.
        key: (B, Hkv, S, d), dtype of ``query``; Hq is any multiple of Hkv.
        frame_ids: (B, S) int32 or int64, the frame of each key in [0, num_frames), -1 for none, in any order.
        num_frames: F. A frame may have no key.
        lse: (B, Hq, R) fp32 (fp64 for fp64 inputs): natural-log log-sum-exp of scale * query . key over **all**
            keys that the row sees, as attention kernels return it. With it only the keys of frames are read, but on a
            CPU in small groups of a plan's layout, where it is computed anew. None: computed here.
        first_key, last_key: (B, R) int. Row r sees keys first..last inclusive; None: 0 and S - 1. first > last: none of
            them. A negative first_key is as 0 (a window that starts before the sequence).
        prefix_keys: (B, R) int in [0, S]: keys 0..prefix-1 are seen as well; a key in both counts once. None: 0.
        scale: of the scores; None: 1 / sqrt(d).
        reduction: "sum" over the keys of a frame (a probability), or "mean" (the paper's Attn).
        per_head: no mean over heads.
        out: (B, R, F), or (B, Hq, R, F), of the dtype of the result: the mass is added to it and ``out`` returned, so
            that layers sum up in one buffer. Where a gradient is wanted the mass is computed aside and added by
            ``out.add_``, under autograd's ordinary rules.
        plan: a `FramePlan` in place of frame_ids, num_frames and the bounds, so that what depends on these alone is
            worked out once for all layers. Of a `GroupLayout`: every group on its own frames.
        backend: "auto", "torch", "triton" or "cuda".

    Returns:
        (B, R, F) fp32 (fp64 for fp64 inputs), mean over query heads; (B, Hq, R, F) when ``per_head``. A row that sees
        no key, and a frame without keys, have exactly 0. Differentiable once with respect to query and key. A given
        ``lse`` counts as what it is, the log-sum-exp of these very scores: the gradient is that of the true mass and
        reaches all visible keys, and ``lse`` itself gets none.

    Raises:
        ValueError: a wrong type, shape, dtype or device; an ``out`` that overlaps itself or another argument, or is a
            leaf that requires a gradient; a frame id outside [-1, num_frames), a last_key beyond S - 1,
            prefix_keys outside [0, S], an lse that is NaN, or +inf in a row that sees keys.
    """
    frame_ids, num_frames, bounds = planned(OP, plan, frame_ids, num_frames, (first_key, last_key, prefix_keys))
    if plan is not None and plan.groups:
        plan.check_call(OP, query, key)
        _check_lse(query, lse)

        def lse_of(group: GroupRows) -> Tensor | None:
            """None where the sum of these very products costs next to nothing (on a GPU: launches): with another
            pass's lse their errors, and 2 |lse| roundings, do not cancel in a probability."""
            few = query.device.type == "cpu" and group.keys.stop - group.keys.start <= FEW_KEYS
            return None if lse is None or few else lse[:, :, group.rows]

        parts = [
            frame_mass(
                query[:, :, group.rows], key[:, :, group.keys], lse=lse_of(group), scale=scale, reduction=reduction,
                per_head=per_head, plan=group.plan, backend=backend,
            )
            for group in plan.groups
        ]  # fmt: skip
        total = plan.joined(parts, -2)
        return total if out is None else out.add_(total)
    first_key, last_key, prefix_keys = bounds
    layout = arguments.prepare(
        OP, query, key, frame_ids, num_frames=num_frames, first_key=first_key, last_key=last_key,
        prefix_keys=prefix_keys, scale=scale, reduction=reduction,
    )  # fmt: skip
    checks.flag(OP, "per_head", per_head)
    batch, heads, rows, head_dim = query.shape
    dtype = compute_dtype(query.dtype)
    _check_lse(query, lse)
    lse = None if lse is None else lse.detach()
    shape = (batch, heads, rows, num_frames) if per_head else (batch, rows, num_frames)
    if out is not None:
        legend = "(B, Hq, R, F)" if per_head else "(B, R, F)"
        checks.shape(OP, "out", out, shape, legend, "Start with torch.zeros of that shape.")
        checks.dtype(OP, "out", out, (dtype,))
    checks.same_device(OP, "query", query, lse=lse, out=out)
    wants_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if out is not None:
        given = {"query": query, "key": key, "frame_ids": frame_ids, "lse": lse, "first_key": first_key}
        _check_out(out, **given, last_key=last_key, prefix_keys=prefix_keys)
    size = dispatch.scores(query, key)
    backend = dispatch.resolve(OP, backend, query.device, query.dtype, head_dim, wants_grad, scores=size)

    query, key = arguments.unit_last_stride(query), arguments.unit_last_stride(key)
    operands = (layout.frame_ids, lse, *layout[1:], per_head)
    if wants_grad or (out is not None and out.requires_grad and torch.is_grad_enabled()):
        mass = _FrameMass.apply(query, key, *operands, num_frames, backend)
        return mass if out is None else out.add_(mass)
    mass = query.new_zeros(shape, dtype=dtype) if out is None else out
    new_lse = query.new_empty((batch, heads, rows), dtype=dtype) if lse is None else None
    forward_op(query, key, *operands, mass, new_lse, backend)
    return mass


def _check_lse(query: Tensor, lse: Tensor | None) -> None:
    if lse is not None:
        rows = tuple(query.shape[:3])
        checks.shape(OP, "lse", lse, rows, "(B, Hq, R)", "Pass the lse of exactly the rows of `query`.")
        checks.dtype(OP, "lse", lse, (compute_dtype(query.dtype),))


def _check_out(out: Tensor, **others: Tensor | None) -> None:
    """``out`` is added to in place: it must be memory of its own, and no parameter."""
    if out.is_leaf and out.requires_grad and torch.is_grad_enabled():
        remedy = "Start with torch.zeros, which requires none."
        checks.fail(OP, "out", "a buffer that may be changed in place", "a leaf that requires a gradient", remedy)
    if torch.compiler.is_compiling():
        return  # compilers replace buffers by results and plan memory themselves
    if checks.overlaps_itself(out):
        got = f"strides {out.stride()} of shape {tuple(out.shape)}"
        checks.fail(OP, "out", "memory of its own for each element", got, "Start with torch.zeros of that shape.")
    for name, other in others.items():
        if other is not None and checks.share_memory(out, other):
            checks.fail(OP, "out", "memory of its own", f"memory of `{name}`", "Start with torch.zeros of that shape.")


class _FrameMass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        frame_ids: Tensor,
        lse: Tensor | None,
        first_key: Tensor | None,
        last_key: Tensor | None,
        prefix_keys: Tensor | None,
        frame_weights: Tensor | None,
        scale: float,
        per_head: bool,
        num_frames: int,
        backend: str,
    ) -> Tensor:
        """mass (B, R, F), or per head (B, Hq, R, F); the layout's tensors are those of ``AttentionLayout``."""
        batch, heads, rows, _ = query.shape
        shape = (batch, heads, rows, num_frames) if per_head else (batch, rows, num_frames)
        dtype = compute_dtype(query.dtype)
        mass = query.new_zeros(shape, dtype=dtype)
        new_lse = query.new_empty((batch, heads, rows), dtype=dtype) if lse is None else None
        others = (first_key, last_key, prefix_keys, frame_weights)
        forward_op(query, key, frame_ids, lse, *others, scale, per_head, mass, new_lse, backend)
        ctx.save_for_backward(query, key, frame_ids, new_lse if lse is None else lse, *others)
        ctx.settings = scale, per_head, backend
        return mass

    @staticmethod
    @differentiable_once(OP)
    def backward(ctx: Any, grad_mass: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query and key, from that of the mass."""
        query, key, *others = ctx.saved_tensors
        scale, per_head, backend = ctx.settings
        grad_query = query.new_empty(query.shape) if ctx.needs_input_grad[0] else None
        grad_key = key.new_empty(key.shape) if ctx.needs_input_grad[1] else None
        backward_op(query, key, *others, scale, per_head, grad_mass, grad_query, grad_key, backend)
        return grad_query, grad_key, *(None,) * 10


@dispatch.out_variant("frame_mass_forward", mutates=("mass", "new_lse"))
def forward_op(
    query: Tensor,
    key: Tensor,
    frame_ids: Tensor,
    lse: Tensor | None,
    first_key: Tensor | None,
    last_key: Tensor | None,
    prefix_keys: Tensor | None,
    frame_weights: Tensor | None,
    scale: float,
    per_head: bool,
    mass: Tensor,
    new_lse: Tensor | None,
    backend: str,
) -> None:
    """Adds to ``mass``, (B, R, F) or per head (B, Hq, R, F), and writes ``new_lse`` where there is no ``lse``."""
    layout = AttentionLayout(frame_ids, first_key, last_key, prefix_keys, frame_weights, scale)
    if checks.values_enabled():
        arguments.check_values(OP, key.shape[2], mass.shape[-1], layout, lse)
    mass_BHRF = mass if per_head else mass[:, None]
    dispatch.backend_module(OP, backend).forward(query, key, layout, lse, mass_BHRF, new_lse, per_head)


@dispatch.out_variant("frame_mass_backward", mutates=("grad_query", "grad_key"))
def backward_op(
    query: Tensor,
    key: Tensor,
    frame_ids: Tensor,
    lse: Tensor,
    first_key: Tensor | None,
    last_key: Tensor | None,
    prefix_keys: Tensor | None,
    frame_weights: Tensor | None,
    scale: float,
    per_head: bool,
    grad_mass: Tensor,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    backend: str,
) -> None:
    """Writes the gradients that are not None; ``grad_mass`` is like the mass."""
    layout = AttentionLayout(frame_ids, first_key, last_key, prefix_keys, frame_weights, scale)
    gradients = Gradients(grad_query, grad_key, None)
    upstream = Upstream(None, None, grad_mass if per_head else grad_mass[:, None])
    dispatch.backend_module(OP, backend).backward(query, key, None, layout, None, lse, upstream, gradients, per_head)
