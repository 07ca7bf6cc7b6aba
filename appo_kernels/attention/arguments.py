"""Frames and visibility: the arguments that the operators on attention share, and their checks.

Shapes: B sequences, Hq/Hkv query/key heads, R query rows, S keys, d head size, F frames.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from appo_kernels import checks

REDUCTIONS = ("sum", "mean")


def check_attention(
    op: str,
    query: Tensor,
    key: Tensor,
    frame_ids: Tensor,
    num_frames: int,
    first_key: Tensor | None,
    last_key: Tensor | None,
    prefix_keys: Tensor | None,
    reduction: str,
) -> None:
    """Shapes, dtypes and devices of the arguments that both operators have."""
    checks.rank(op, "query", query, 4, "(B, Hq, R, d)")
    checks.rank(op, "key", key, 4, "(B, Hkv, S, d)")
    checks.dtype(op, "query", query, checks.FLOATS)
    checks.dtype(op, "key", key, (query.dtype,))
    batch, query_heads, rows, head_dim = query.shape
    key_heads, keys = key.shape[1:3]
    expected = (batch, key_heads, keys, head_dim)
    checks.shape(op, "key", key, expected, "(B, Hkv, S, d)", "Batch and head size are those of `query`.")
    if head_dim < 1 or key_heads < 1 or query_heads < 1 or query_heads % key_heads:
        remedy = "Pass the heads of the layer as they are; keys need not be repeated."
        got = f"Hq = {query_heads}, Hkv = {key_heads}, d = {head_dim}"
        checks.fail(op, "query", "Hq a positive multiple of Hkv, d at least 1", got, remedy)
    if num_frames < 0:
        checks.fail(op, "num_frames", "a number of frames, at least 0", num_frames, "Count the frames of the video.")
    if reduction not in REDUCTIONS:
        checks.fail(op, "reduction", '"sum" or "mean"', repr(reduction), "Pass one of these.")
    remedy = "Pass one frame per key, -1 for keys of no frame."
    checks.shape(op, "frame_ids", frame_ids, (batch, keys), "(B, S)", remedy)
    checks.dtype(op, "frame_ids", frame_ids, checks.INTS)
    for name, bound in (("first_key", first_key), ("last_key", last_key), ("prefix_keys", prefix_keys)):
        if bound is not None:
            checks.shape(op, name, bound, (batch, rows), "(B, R)", "Pass one number per query row; expand if shared.")
            checks.dtype(op, name, bound, checks.INTS)
    checks.same_device(
        op, "query", query,
        key=key, frame_ids=frame_ids, first_key=first_key, last_key=last_key, prefix_keys=prefix_keys,
    )  # fmt: skip


class Layout(NamedTuple):
    """What the backends of both operators are told of keys and rows, checked and in the dtypes they read.

    frame_ids (B, S) int32, -1 for none. first_key, last_key, prefix_keys (B, R) int32, or None for 0, S - 1 and 0;
    first_key may be negative. frame_weights (B, F), what multiplies each frame's sum, or None for ones. scale: of the
    scores. Tensors may have any strides.
    """

    frame_ids: Tensor
    first_key: Tensor | None
    last_key: Tensor | None
    prefix_keys: Tensor | None
    frame_weights: Tensor | None
    scale: float

    @property
    def bounds(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.first_key, self.last_key, self.prefix_keys


def unit_last_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def check_values(
    op: str,
    keys: int,
    frame_ids: Tensor,
    num_frames: int,
    last_key: Tensor | None,
    prefix_keys: Tensor | None,
) -> None:
    """Numbers in range. ``first_key`` needs none: below 0 is as 0, beyond ``last_key`` is an empty interval."""
    bounds = (
        ("frame_ids", frame_ids, -1, num_frames - 1, "Raise `num_frames`, or mark keys of no frame with -1."),
        ("last_key", last_key, None, keys - 1, "last_key is inclusive: the last key is S - 1."),
        ("prefix_keys", prefix_keys, 0, keys, "Pass the number of keys at the start that the row sees."),
    )
    for name, tensor, least, most, remedy in bounds:
        if tensor is None or not tensor.numel():
            continue
        low, high = (int(x) for x in tensor.aminmax())
        if high > most or (least is not None and low < least):
            expected = f"numbers up to {most}" if least is None else f"numbers in [{least}, {most}]"
            checks.fail(op, name, expected, f"numbers from {low} to {high}", remedy)


def sees_any(keys: int, first_key: Tensor | None, last_key: Tensor | None, prefix_keys: Tensor | None) -> Tensor | bool:
    """(B, R) bool: rows that see at least one of ``keys`` keys; a plain bool where that is the same for all rows."""
    low = 0 if first_key is None else first_key.clamp(min=0)
    high = keys - 1 if last_key is None else last_key
    seen = low <= high
    return seen if prefix_keys is None else seen | (prefix_keys > 0)


def frame_weights(frame_ids: Tensor, num_frames: int, reduction: str, dtype: torch.dtype) -> Tensor | None:
    """(B, F): what a frame's sum is multiplied by: 1 / its keys for "mean", 0 where it has none; None for "sum"."""
    if reduction == "sum":
        return None
    # An id out of range is an error that the custom operator reports; here it only must not index out of bounds.
    ids = torch.where((frame_ids < 0) | (frame_ids >= num_frames), num_frames, frame_ids).long()
    sizes = torch.zeros(len(frame_ids), num_frames + 1, dtype=torch.int32, device=frame_ids.device)
    sizes = sizes.scatter_add(1, ids, torch.ones_like(ids, dtype=torch.int32))[:, :num_frames]
    return torch.where(sizes > 0, 1.0 / sizes.to(dtype).clamp(min=1), 0.0)
