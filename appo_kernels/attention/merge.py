"""The result of attention with mass, and how results of parts of the keys become those of all keys."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from appo_kernels import checks
from appo_kernels.dtypes import compute_dtype

OP = "merge_attention"
LEGENDS = {"out": "(B, Hq, R, d)", "lse": "(B, Hq, R)", "mass": "(B, Hq, R, F)"}


class FrameAttentionOutput(NamedTuple):
    out: Tensor  # (B, Hq, R, d), dtype of query
    lse: Tensor  # (B, Hq, R) fp32, natural log, -inf for a row that sees no key
    mass: Tensor  # (B, R, F) fp32, mean over query heads


class _Part(NamedTuple):
    out: Tensor
    lse: Tensor
    mass: Tensor | None = None


def merge_attention(
    parts: Sequence[tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]],
) -> FrameAttentionOutput:
    """The out, lse and mass of all keys, from those of disjoint parts of the keys, as ring or split-key attention has.

    With l = logsumexp over parts of lse_i:  out = sum_i exp(lse_i - l) out_i, and the mass alike. Associative up to
    rounding, the order does not matter, and the result is a part again.

    Args:
        parts: of each part of the keys (out, lse) or (out, lse, mass): out (B, Hq, R, d); lse (B, Hq, R) fp32, natural
            log, -inf in rows that see no key of the part, where out and mass are 0; mass (B, Hq, R, F), per head, as
            ``frame_mass(..., per_head=True)`` gives it, or None. Either all parts have a mass or none; a part without
            keys of frames has one of zeros.

    Returns:
        ``FrameAttentionOutput(out, lse, mass)`` with the dtypes of the first part, the mass per head, or None where the
        parts have none. A row that sees no key in any part has out 0, lse -inf and mass 0. Differentiable through
        every argument.

    Raises:
        ValueError: no parts, shapes or devices that differ, a mass in some parts only.
    """
    remedy = "Pass a list of (out, lse) or (out, lse, mass), one for each part of the keys."
    if not isinstance(parts, Sequence) or isinstance(parts, str):
        checks.fail(OP, "parts", "a sequence of parts", type(parts).__name__, remedy)
    for number, part in enumerate(parts):
        if not isinstance(part, tuple | list) or len(part) not in (2, 3):
            got = f"{type(part).__name__} of {len(part)}" if isinstance(part, tuple | list) else type(part).__name__
            checks.fail(OP, f"parts[{number}]", "(out, lse) or (out, lse, mass)", got, remedy)
    whole = [_Part(*part) for part in parts]
    _check(whole)
    first = whole[0]
    dtype = compute_dtype(first.out.dtype)
    lses = [part.lse.to(dtype) for part in whole]
    highest = torch.stack([lse.detach() for lse in lses]).amax(0)
    highest = highest.masked_fill(torch.isneginf(highest), 0.0)
    weights = [torch.exp(lse - highest) for lse in lses]
    total = torch.stack(weights).sum(0)
    blind = total == 0  # no part sees a key: neither log nor quotient may meet the 0, or gradients are NaN
    total = total.masked_fill(blind, 1.0)
    lse = (highest + total.log()).masked_fill(blind, -torch.inf)

    def mean(tensors: Sequence[Tensor]) -> Tensor:
        """The mean of a result (..., x) of each part, weighted by what the part has of the softmax."""
        shares = [(weight / total)[..., None] for weight in weights]
        merged = tensors[0] * shares[0]
        for tensor, share in zip(tensors[1:], shares[1:], strict=True):
            merged.addcmul_(tensor, share)  # in place: a new large tensor for each part would take most of the time
        return merged.to(tensors[0].dtype)

    masses = [part.mass for part in whole if part.mass is not None]
    mass = cast(Tensor, mean(masses) if masses else None)
    return FrameAttentionOutput(mean([part.out for part in whole]), lse, mass)


def _check(parts: Sequence[_Part]) -> None:
    if not parts:
        checks.fail(OP, "parts", "at least one part", "none", "Rows without keys are a part with lse -inf.")
    first = parts[0]
    checks.rank(OP, "parts[0].out", first.out, 4, LEGENDS["out"])
    rows = tuple(first.out.shape[:3])
    given = [part.mass is not None for part in parts]
    if any(given) and not all(given):
        remedy = "A part without keys of frames has a mass of zeros."
        checks.fail(OP, "parts", "a mass in every part or in none", f"masses in {sum(given)} of {len(parts)}", remedy)
    frames = 0
    if first.mass is not None:
        checks.rank(OP, "parts[0].mass", first.mass, 4, LEGENDS["mass"])
        frames = first.mass.shape[-1]
    shapes = {"out": tuple(first.out.shape), "lse": rows, "mass": (*rows, frames)}
    for number, part in enumerate(parts):
        for name, tensor in zip(("out", "lse", "mass"), part, strict=True):
            if tensor is None and name == "mass":
                continue
            argument = f"parts[{number}].{name}"
            remedy = "All parts are of the same rows and heads; a mass is per head."
            value = cast(Tensor, tensor)  # no tensor is an error of its shape
            checks.shape(OP, argument, value, shapes[name], LEGENDS[name], remedy)
            checks.dtype(OP, argument, value, checks.FLOATS)
            checks.same_device(OP, "parts[0].out", first.out, **{argument: value})
