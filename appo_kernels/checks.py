"""Argument checks shared by the operators. Each raises ValueError naming argument, expected, got and remedy.

Shapes, dtypes and devices are checked in the public functions, where torch.compile can trace them. Checks of *values*
(slots in range, finite advantages) run inside the custom operators, which stay eager under torch.compile; on a GPU they
cost one synchronisation a call, and ``APPO_CHECK_VALUES=0`` leaves them out.
"""

import os
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTS = (torch.int32, torch.int64)
BOOLS = (torch.bool,)


def fail(op: str, argument: str, expected: str, got: object, remedy: str) -> NoReturn:
    raise ValueError(f"{op}: `{argument}`: expected {expected}, got {got}. {remedy}")


def shape(op: str, argument: str, tensor: Tensor, expected: Sequence[int], legend: str, remedy: str) -> None:
    """``tensor`` must have exactly the shape ``expected``; ``legend`` is its symbolic form, such as "(B, R)"."""
    if tuple(tensor.shape) != tuple(expected):
        fail(op, argument, f"shape {legend} = {tuple(expected)}", f"shape {tuple(tensor.shape)}", remedy)


def rank(op: str, argument: str, tensor: Tensor, expected: int, legend: str) -> None:
    if tensor.dim() != expected:
        fail(op, argument, f"a tensor of {expected} dimensions {legend}", f"shape {tuple(tensor.shape)}", "Reshape it.")


def dtype(op: str, argument: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in allowed:
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        fail(op, argument, f"dtype {names}", str(tensor.dtype).removeprefix("torch."), "Convert it with .to(dtype).")


def same_device(op: str, first: str, tensor: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != tensor.device:
            fail(
                op, name, f"the device of `{first}`, {tensor.device}", str(other.device), f"Move it to {tensor.device}."
            )


def values_enabled() -> bool:
    return os.environ.get("APPO_CHECK_VALUES", "1") != "0"
