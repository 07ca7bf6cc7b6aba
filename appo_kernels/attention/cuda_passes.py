"""Attention passes by CUDA: csrc/attention_forward and csrc/attention_backward, and what their params structs share.

Shapes: B sequences, Hq/Hkv query/key heads, R rows, S keys, d head size, F frames, T tiles of keys.
"""

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from appo_kernels import checks, cuda_library
from appo_kernels.attention.arguments import AttentionLayout, Gradients, Upstream
from appo_kernels.cuda_constants import ELEMENTS, FRAME_TILE, GRAD_HEAD_DIMS, HEAD_DIMS, KEY_TILE, ROW_PADDING
from appo_kernels.dispatch import Problem
from appo_kernels.dtypes import HALVES

# Operator and launcher of the pass without and with a value.
FORWARD = (("frame_mass", "appo_frame_mass_one_pass"), ("frame_attention", "appo_frame_attention_forward"))


class Visibility(ctypes.Structure):
    _fields_ = (("first_key", ctypes.c_void_p), ("last_key", ctypes.c_void_p), ("prefix_keys", ctypes.c_void_p))


class FrameIds(ctypes.Structure):
    _fields_ = (("ids", ctypes.c_void_p), ("range", ctypes.c_void_p))


def strides(name: str, dimensions: str) -> list[tuple[str, type]]:
    return [(f"{name}_stride_{d}", ctypes.c_int64) for d in dimensions]


def counts(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int) for name in names]


SIZES = counts("batch", "query_heads", "key_heads", "rows", "keys", "frame_count", "tiles")


class AttentionForwardParams(cuda_library.Params):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "lse", "sums", "maxima")),
        ("visibility", Visibility),
        ("frames", FrameIds),
        *strides("query", "bhr"),
        *strides("key", "bhs"),
        *strides("value", "bhs"),
        *strides("out", "bhr"),
        *SIZES,
        ("scale_log2", ctypes.c_float),
        *counts("head_dim", "element"),
    )


class AttentionBackwardParams(cuda_library.Params):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out", "grad_out")),
        *((name, ctypes.c_void_p) for name in ("lse", "grad_lse", "grad_mass", "grad_scale", "row_stats", "row_views")),
        *((name, ctypes.c_void_p) for name in ("grad_query", "grad_key", "grad_value")),
        ("visibility", Visibility),
        ("frames", FrameIds),
        *strides("query", "bhr"),
        *strides("key", "bhs"),
        *strides("value", "bhs"),
        *strides("out", "bhr"),
        *strides("grad_out", "bhr"),
        *strides("grad_mass", "bh"),
        *SIZES,
        ("scale_log2", ctypes.c_float),
        ("scale", ctypes.c_float),
        *counts("head_dim", "element"),
    )


class HeadMeanParams(cuda_library.Params):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("per_head", "frame_weights", "mass")),
        *strides("mass", "bhrf"),
        *((name, ctypes.c_int64) for name in ("batch", "query_heads", "kept_heads", "rows", "frame_count")),
    )


def unsupported(problem: Problem) -> str | None:
    return cuda_library.why_not(problem, HALVES, HEAD_DIMS, GRAD_HEAD_DIMS)


def is_aligned(tensor: Tensor) -> bool:
    """Whether the rows of (.., .., .., d) are in one piece and start at multiples of 16 bytes."""
    return tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in tensor.stride()[:-1])


def aligned(tensor: Tensor) -> Tensor:
    """(.., .., .., d) as the kernels read it: a copy if it is not aligned."""
    return tensor if is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)


class Operands(NamedTuple):
    """Operands of all passes. It keeps the tensors alive that the params structs point to."""

    query: Tensor  # (B, Hq, R, d)
    key: Tensor  # (B, Hkv, S, d)
    bounds: tuple[Tensor | None, Tensor | None, Tensor | None]  # (B, R) int32 contiguous: first, last, prefix
    ids: Tensor  # (B, T, FRAME_TILE) int32
    range: Tensor  # (B, T, 2) int32
    frame_count: int
    scale: float  # positive

    def fields(self) -> dict[str, object]:
        """The fields that the params structs have in common."""
        query, key = self.query, self.key
        return {
            "query": query,
            "key": key,
            "visibility": Visibility(*(cuda_library.pointer(b) for b in self.bounds)),
            "frames": FrameIds(cuda_library.pointer(self.ids), cuda_library.pointer(self.range)),
            **stride_fields("query", "bhr", query),
            **stride_fields("key", "bhs", key),
            "batch": query.shape[0],
            "query_heads": query.shape[1],
            "key_heads": key.shape[1],
            "rows": query.shape[2],
            "keys": key.shape[2],
            "frame_count": self.frame_count,
            "tiles": self.range.shape[1],
            "scale_log2": self.scale / math.log(2.0),
            "head_dim": query.shape[3],
            "element": ELEMENTS[query.dtype],
        }


def stride_fields(name: str, dimensions: str, tensor: Tensor | None) -> dict[str, int]:
    """The fields ``NAME_stride_D`` of a params struct, one for each of ``dimensions``; 0 without a tensor."""
    values = [0] * len(dimensions) if tensor is None else tensor.stride()
    return {f"{name}_stride_{d}": s for d, s in zip(dimensions, values, strict=False)}


def operands(query: Tensor, key: Tensor, layout: AttentionLayout, frame_count: int) -> Operands:
    """Query and key (B, H, R or S, d) as the kernels load them, frames padded to whole tiles, and the range of each."""
    keys, scale = key.shape[2], layout.scale
    padding = -keys % KEY_TILE
    ids = checks.narrowed(layout.frame_ids)
    ids = torch.nn.functional.pad(ids, (0, padding), value=-1) if padding else ids
    tiles = ids.contiguous().view(len(ids), -1, FRAME_TILE)
    frame_range = ids.new_empty(*tiles.shape[:2], 2)
    torch.aminmax(tiles, dim=-1, out=(frame_range[..., 0], frame_range[..., 1]))
    given = [bound for bound in layout.bounds if bound is not None]
    narrow = iter(checks.narrowed(torch.stack(given)) if given else ())
    bounds = tuple(None if bound is None else next(narrow) for bound in layout.bounds)
    if scale <= 0.0:  # the kernels look for a row's largest score before they scale it
        query, scale = (-query, -scale) if scale < 0.0 else (torch.zeros_like(query), 1.0)
    return Operands(
        aligned(query),
        aligned(key),
        (bounds[0], bounds[1], bounds[2]),
        tiles,
        frame_range,
        frame_count,
        scale,
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    layout: AttentionLayout,
    out: Tensor | None,
    lse: Tensor,
    mass: Tensor,
    per_head: bool,
) -> None:
    """Arguments as of ``torch_passes.attend``; ``out`` and ``lse`` contiguous."""
    if not lse.numel():
        return
    if not key.shape[2]:
        lse.fill_(-math.inf)
        if out is not None:
            out.zero_()
        return
    op, launcher = FORWARD[value is not None]
    batch, heads, rows, _ = query.shape
    common = operands(query, key, layout, mass.shape[-1])
    value = None if value is None else aligned(value)
    row_sums = lse.new_empty(batch, heads, rows, common.frame_count)
    row_maxima = torch.empty_like(row_sums)
    params = AttentionForwardParams(
        **common.fields(),
        value=value,
        out=out,
        lse=lse,
        sums=row_sums,
        maxima=row_maxima,
        **stride_fields("value", "bhs", value),
        **stride_fields("out", "bhr", out),
    )
    cuda_library.call(op, launcher, params, lse.device)
    if common.frame_count:
        _add_heads(op, row_sums, layout.frame_weights, mass)


def _add_heads(op: str, head_mass: Tensor, frame_weights: Tensor | None, mass: Tensor) -> None:
    """mass (B, H, R, F) += frame_weights times head_mass (B, Hq, R, F), or its mean over heads where H is 1."""
    batch, heads, rows, frame_count = head_mass.shape
    params = HeadMeanParams(
        per_head=head_mass,
        frame_weights=None if frame_weights is None else frame_weights.contiguous(),
        mass=mass,
        **stride_fields("mass", "bhrf", mass),
        batch=batch,
        query_heads=heads,
        kept_heads=mass.shape[1],
        rows=rows,
        frame_count=frame_count,
    )
    cuda_library.call(op, "appo_head_mean", params, mass.device)


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    layout: AttentionLayout,
    out: Tensor | None,
    lse: Tensor,
    upstream: Upstream,
    gradients: Gradients,
    per_head: bool,
) -> None:
    """Arguments as of ``torch_passes.attend_backward``: two passes over rows and over keys."""
    batch, heads, rows, _ = query.shape
    if not (batch * rows and key.shape[2]):
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return
    op = FORWARD[value is not None][0]
    grad_out, grad_lse, grad_mass = upstream
    grad_value = gradients.value
    if grad_out is None:  # nothing reaches the values
        value = out = None
        if grad_value is not None:
            grad_value.zero_()
        grad_value = None
    frame_count = 0 if grad_mass is None else grad_mass.shape[-1]
    common = operands(query, key, layout, frame_count)
    padded = rows + -rows % ROW_PADDING
    mass_gradient = None
    if grad_mass is not None and frame_count:
        grad_mass = grad_mass if per_head else grad_mass / heads
        if layout.frame_weights is not None:
            grad_mass = grad_mass * layout.frame_weights[:, None, None]
        # Rows next to one another, padded: what two neighbouring lanes read is neighbouring too.
        mass_gradient = lse.new_zeros(batch, grad_mass.shape[1], frame_count, padded)
        mass_gradient[..., :rows] = grad_mass.transpose(2, 3)
    value, out, grad_out = (None if t is None else aligned(t) for t in (value, out, grad_out))
    grad_scale = score_grad_scale(query.dtype, grad_out, grad_lse, mass_gradient)
    stats = lse.new_empty(batch, heads, padded, 2)
    views = torch.empty(batch, padded, 4, dtype=torch.int32, device=lse.device)
    lse = lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    params = AttentionBackwardParams(
        **common.fields(),
        value=value,
        out=out,
        grad_out=grad_out,
        lse=lse,
        grad_lse=grad_lse,
        grad_mass=mass_gradient,
        grad_scale=grad_scale,
        row_stats=stats,
        row_views=views,
        grad_query=gradients.query,
        grad_key=gradients.key,
        grad_value=grad_value,
        **stride_fields("value", "bhs", value),
        **stride_fields("out", "bhr", out),
        **stride_fields("grad_out", "bhr", grad_out),
        grad_mass_stride_b=0 if mass_gradient is None else mass_gradient.stride(0),
        grad_mass_stride_h=0 if mass_gradient is None or mass_gradient.shape[1] == 1 else mass_gradient.stride(1),
        scale=common.scale,
    )
    cuda_library.call(op, "appo_attention_backward", params, lse.device)
    if layout.scale <= 0.0 and gradients.query is not None:
        gradients.query.mul_(-1.0 if layout.scale < 0.0 else 0.0)  # the kernels saw the query of `operands`


def score_grad_scale(dtype: torch.dtype, *gradients: Tensor | None) -> Tensor | None:
    """A power of 2, (1,) fp32: what brings gradients of scores into the range of fp16, where small ones would be lost.

    The largest incoming gradient becomes about 8: far from fp16's largest number, and far above its smallest.
    """
    if dtype != torch.float16:
        return None
    largest = torch.stack([g.abs().amax().float() for g in gradients if g is not None and g.numel()]).amax()
    exponent = 3.0 - torch.log2(largest).ceil()
    return torch.where(torch.isfinite(exponent), torch.exp2(exponent.clamp(-60.0, 60.0)), 1.0).view(1)
