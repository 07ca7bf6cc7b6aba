"""Checks of the arguments that the operators on logits share.

Shapes: V vocabulary, D hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from appo_kernels import checks


def check_projection(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    *,
    bias_dtypes: Sequence[torch.dtype] = checks.FLOATS,
) -> tuple[float, float | None]:
    """``temperature`` and ``softcap`` as floats, if these arguments make logits together.

    Raises:
        ValueError: unless hidden (..., D) and weight (V, D) have one dtype, V and D are at least 1, bias is (V,) in one
            of ``bias_dtypes``, all lie on one device, and temperature and softcap are positive and finite.
    """
    checks.dtype(op, "hidden", hidden, checks.FLOATS)
    checks.rank(op, "weight", weight, 2, "(V, D)")
    checks.dtype(op, "weight", weight, (hidden.dtype,))
    if weight.shape[1] != hidden.shape[-1] or min(weight.shape) < 1:
        expected = f"shape (V, D) with D = {hidden.shape[-1]}, the last of `hidden`, and neither 0"
        checks.fail(op, "weight", expected, f"shape {tuple(weight.shape)}", "Pass the output embedding as it is.")
    if bias is not None:
        checks.shape(op, "bias", bias, weight.shape[:1], "(V,)", "Pass one number per row of `weight`.")
        checks.dtype(op, "bias", bias, bias_dtypes)
    checks.same_device(op, "hidden", hidden, weight=weight, bias=bias)
    if softcap is not None:
        remedy = "Pass the model's final logit soft cap, or None."
        softcap = checks.number(op, "softcap", softcap, "a positive finite number (> 0) or None", remedy, above=0.0)
    return check_temperature(op, temperature), softcap


def check_temperature(op: str, temperature: float) -> float:
    remedy = "Pass the temperature that the responses were sampled with."
    return checks.number(op, "temperature", temperature, "a positive finite number (> 0)", remedy, above=0.0)


def check_targets(op: str, first: str, like: Tensor, targets: Tensor) -> None:
    """``targets`` (B, T) must be token ids for the rows of ``like`` (B, T, ...), the argument named ``first``."""
    checks.shape(op, "targets", targets, like.shape[:2], "(B, T)", f"Pass one token id for each row of `{first}`.")
    checks.dtype(op, "targets", targets, checks.INTS)
    checks.same_device(op, first, like, targets=targets)
