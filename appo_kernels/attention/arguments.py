"""Frames and visibility: the arguments that the operators on attention share, and their checks.

Shapes: B sequences, Hq/Hkv query/key heads, R query rows, S keys, d head size, F frames.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from appo_kernels import checks, dispatch
from appo_kernels.attention.frame_plan import is_kept, kept
from appo_kernels.dtypes import compute_dtype

REDUCTIONS = ("sum", "mean")


class AttentionLayout(NamedTuple):
    """Frames, visibility and scale as the attention backends take them: validated; whole numbers are int32 or int64.

    Tensors may have any strides. None stands for the default of a bound (0, S - 1, 0) and for weights of 1.
    """

    frame_ids: Tensor  # (B, S): frame of each key, -1 for none
    first_key: Tensor | None  # (B, R), may be negative
    last_key: Tensor | None  # (B, R)
    prefix_keys: Tensor | None  # (B, R)
    frame_weights: Tensor | None  # (B, F): factor of each frame's sum
    scale: float  # of the scores

    @property
    def bounds(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.first_key, self.last_key, self.prefix_keys

    def narrowed(self) -> "AttentionLayout":
        """With whole numbers as int32, for backends that compute with them."""
        first, last, prefix = (None if bound is None else checks.narrowed(bound) for bound in self.bounds)
        return AttentionLayout(checks.narrowed(self.frame_ids), first, last, prefix, self.frame_weights, self.scale)


class Upstream(NamedTuple):
    """Gradients of the results of an attention pass, any strides; None where a result was not used."""

    out: Tensor | None  # (B, Hq, R, d)
    lse: Tensor | None  # (B, Hq, R)
    mass: Tensor | None  # (B, Hq, R, F) where the mass was per head, else (B, 1, R, F)


class Gradients(NamedTuple):
    """Buffers for the gradients of the inputs, contiguous and like these; None where none is wanted."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None


def prepare(
    op: str,
    query: Tensor,
    key: Tensor,
    frame_ids: Tensor,
    *,
    num_frames: int,
    first_key: Tensor | None,
    last_key: Tensor | None,
    prefix_keys: Tensor | None,
    scale: float | None,
    reduction: str,
) -> AttentionLayout:
    """The ``AttentionLayout`` of the arguments that all operators on attention have, after their checks.

    Raises:
        ValueError: a wrong type, shape, dtype or device, a number out of its range. Values of tensors are left to
            ``check_values``, in the custom operators.
    """
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
    num_frames = checks.count(
        op, "num_frames", num_frames, "a number of frames, at least 0", "Count the frames of the video."
    )
    checks.choice(op, "reduction", reduction, REDUCTIONS)
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
    if scale is None:
        scale = 1.0 / math.sqrt(dispatch.constant(head_dim))
    dtype = compute_dtype(query.dtype)
    return AttentionLayout(
        frame_ids,
        first_key,
        last_key,
        prefix_keys,
        kept(frame_ids, (reduction, dtype), lambda: frame_weights(frame_ids, num_frames, reduction, dtype)),
        checks.number(op, "scale", scale, "None or a finite number", "None stands for 1 / sqrt(d)."),
    )


def unit_last_stride(tensor: Tensor) -> Tensor:
    """``tensor`` itself where its last stride is 1, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def check_values(op: str, keys: int, num_frames: int, layout: AttentionLayout, lse: Tensor | None = None) -> None:
    """ValueError unless frame ids, ``last_key`` and ``prefix_keys`` are in range, and a given ``lse`` (B, Hq, R) is
    finite in rows that see keys; with one synchronisation.

    ``first_key`` needs no check: below 0 is as 0, beyond ``last_key`` is an empty interval. Those of a plan once.
    """
    ranges = [] if is_kept(layout.frame_ids, "values") else _ranges(keys, num_frames, layout)
    found = [extreme for _, tensor, *_ in ranges for extreme in tensor.aminmax()]
    wrong = None if lse is None or not lse.numel() else _wrong_lse(lse, sees_any(keys, layout))
    found += [] if wrong is None else [wrong.any()]
    numbers = checks.on_host(*found)
    for (name, _, least, most, remedy), low, high in zip(ranges, numbers[::2], numbers[1::2], strict=False):
        if high > most or (least is not None and low < least):
            expected = f"numbers up to {most}" if least is None else f"numbers in [{least}, {most}]"
            checks.fail(op, name, expected, checks.span(low, high), remedy)
    kept(layout.frame_ids, "values", lambda: True)
    if wrong is not None and lse is not None and numbers[-1]:
        sequence, head, row = wrong.nonzero()[0].tolist()
        value = float(lse[sequence, head, row])
        remedy = (
            "Pass the natural-log lse that the attention of these very scores returned, -inf for a row without keys."
        )
        checks.fail(op, "lse", "finite numbers in rows that see keys", f"{value} at {(sequence, head, row)}", remedy)


def _ranges(keys: int, num_frames: int, layout: AttentionLayout) -> list[tuple[str, Tensor, int | None, int, str]]:
    """(argument, its values, least, most, remedy) of those that are there."""
    ranges = (
        ("frame_ids", layout.frame_ids, -1, num_frames - 1, "Raise `num_frames`, or mark keys of no frame with -1."),
        ("last_key", layout.last_key, None, keys - 1, "last_key is inclusive: the last key is S - 1."),
        ("prefix_keys", layout.prefix_keys, 0, keys, "Pass the number of keys at the start that the row sees."),
    )
    return [
        (name, tensor, least, most, remedy)
        for name, tensor, least, most, remedy in ranges
        if tensor is not None and tensor.numel()
    ]


def _wrong_lse(lse: Tensor, sees: Tensor | bool) -> Tensor:
    """Some attention backends mark a row that sees no key by +inf, so there it is allowed."""
    wrong = torch.isnan(lse)
    if sees is not False:
        infinite = torch.isposinf(lse)
        wrong |= infinite if sees is True else infinite & torch.as_tensor(sees)[:, None, :]
    return wrong


def sees_any(keys: int, layout: AttentionLayout) -> Tensor | bool:
    """Rows (B, R) that see at least one of ``keys`` keys; a plain bool where that is the same for all rows."""
    low = 0 if layout.first_key is None else layout.first_key.clamp(min=0)
    high = keys - 1 if layout.last_key is None else layout.last_key
    seen = low <= high
    return seen if layout.prefix_keys is None else seen | (layout.prefix_keys > 0)


def frame_weights(frame_ids: Tensor, num_frames: int, reduction: str, dtype: torch.dtype) -> Tensor | None:
    """Factors (B, F) of the frames' sums: for "mean" 1 / keys of the frame; None for "sum"."""
    if reduction == "sum":
        return None
    # -1 becomes F. An id out of range is an error that the custom operator reports; here it only must not index out of
    # bounds. A frame without keys keeps the size 1: a larger factor of its gradient, which counts for nothing, would
    # still decide to what power of two the gradients of all are scaled in fp16.
    ids = torch.empty(frame_ids.shape, dtype=torch.int64, device=frame_ids.device)
    torch.remainder(frame_ids, num_frames + 1, out=ids)
    sizes = torch.ones(len(frame_ids), num_frames + 1, dtype=dtype, device=frame_ids.device)
    ones = torch.ones(1, dtype=dtype, device=ids.device).expand(ids.shape)
    sizes = sizes.scatter_reduce_(1, ids, ones, "sum", include_self=False)
    return sizes[:, :num_frames].reciprocal()
