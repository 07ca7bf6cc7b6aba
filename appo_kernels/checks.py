"""Argument checks shared by the operators. Each raises ValueError naming argument, expected, got and remedy.

Types, shapes, dtypes and devices are checked in the public functions, where torch.compile can trace them. Checks of
*values* (slots in range, finite advantages) run inside the custom operators, which stay eager under torch.compile; on a
GPU they cost one synchronisation a call, and ``APPO_CHECK_VALUES=0`` leaves them out.
"""

import math
import numbers
import os
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from appo_kernels.dtypes import dtype_name

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTS = (torch.int32, torch.int64)
BOOLS = (torch.bool,)
INT32 = torch.iinfo(torch.int32)
LARGEST_COUNT = 1 << 53  # counts are divided by in floating point: fp64 holds whole numbers up to here
LARGEST = torch.finfo(torch.float32).max
SHOWN = 120  # characters of a wrong value that an error repeats


def fail(op: str, argument: str, expected: str, got: object, remedy: str) -> NoReturn:
    try:
        text = str(got)
    except ValueError:  # an int of thousands of digits
        text = f"a number of {got.bit_length()} bits" if isinstance(got, int) else type(got).__name__
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    raise ValueError(f"{op}: `{argument}`: expected {expected}, got {text}. {remedy}")


def tensor(op: str, argument: str, value: Any) -> None:
    """``value`` must be a dense torch.Tensor."""
    if not isinstance(value, Tensor):
        remedy = "Pass a tensor; torch.as_tensor makes one of a list or a NumPy array."
        got = "None" if value is None else f"{type(value).__module__}.{type(value).__qualname__}"
        fail(op, argument, "a torch.Tensor", got.removeprefix("builtins."), remedy)
    if value.layout != torch.strided:
        fail(op, argument, "a dense tensor", f"layout {value.layout}", "Convert it with .to_dense().")


def shape(op: str, argument: str, value: Tensor, expected: Sequence[int], legend: str, remedy: str) -> None:
    """``value`` must have exactly the shape ``expected``; ``legend`` is its symbolic form, such as "(B, R)"."""
    tensor(op, argument, value)
    if tuple(value.shape) != tuple(expected):
        fail(op, argument, f"shape {legend} = {tuple(expected)}", f"shape {tuple(value.shape)}", remedy)


def rank(op: str, argument: str, value: Tensor, expected: int, legend: str) -> None:
    tensor(op, argument, value)
    if value.dim() != expected:
        fail(op, argument, f"a tensor of {expected} dimensions {legend}", f"shape {tuple(value.shape)}", "Reshape it.")


def dtype(op: str, argument: str, value: Tensor, allowed: Sequence[torch.dtype]) -> None:
    tensor(op, argument, value)
    if value.dtype not in allowed:
        names = " or ".join(dtype_name(d) for d in allowed)
        fail(op, argument, f"dtype {names}", dtype_name(value.dtype), "Convert it with .to(dtype).")


def same_device(op: str, first: str, reference: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.device != reference.device:
            expected = f"the device of `{first}`, {reference.device}"
            fail(op, name, expected, str(other.device), f"Move it to {reference.device}.")


def is_number(value: Any) -> bool:
    """Whether ``value`` is a real number that a float can hold, NaN and infinities included; no bool, no tensor."""
    if isinstance(value, (float, torch.SymFloat)):
        return True
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Real)):
        return False
    real: Any = value
    return bool(-1e308 <= real <= 1e308)


def number(
    op: str,
    argument: str,
    value: Any,
    expected: str,
    remedy: str,
    *,
    least: float = -LARGEST,
    most: float = LARGEST,
    above: float = -math.inf,
) -> float:
    """``value`` as a float; it must be a number in [least, most] and greater than ``above``."""
    if not (is_number(value) and least <= value <= most and value > above):
        fail(op, argument, expected, repr(value), remedy)
    symbolic: Any = value  # under torch.compile
    return symbolic if isinstance(value, (float, torch.SymFloat)) else float(value)


def count(op: str, argument: str, value: Any, expected: str, remedy: str, *, least: int = 0) -> int:
    """``value`` as an int; it must be a whole number of at least ``least`` that fits 31 bits."""
    whole = isinstance(value, (int, torch.SymInt, numbers.Integral)) and not isinstance(value, bool)
    if not whole or not least <= value <= INT32.max:
        fail(op, argument, expected, repr(value), remedy)
    symbolic: Any = value  # under torch.compile
    return symbolic if isinstance(value, (int, torch.SymInt)) else int(value)


def flag(op: str, argument: str, value: Any) -> None:
    if not isinstance(value, bool):
        fail(op, argument, "True or False", repr(value), "Pass one of these.")


def choice(op: str, argument: str, value: Any, choices: Sequence[str], remedy: str = "Pass one of these.") -> None:
    if not isinstance(value, str) or value not in choices:
        fail(op, argument, f"one of {', '.join(choices)}", repr(value), remedy)


def narrowed(value: Tensor) -> Tensor:
    """Integers as int32. What does not fit is brought to the nearest that does, so that it stays out of any range."""
    return value if value.dtype == torch.int32 else value.clamp(INT32.min, INT32.max).int()


def span(low: int, high: int) -> str:
    """The smallest and largest of ``narrowed`` integers, for an error."""
    return (
        f"numbers from {low}{' or less' if low == INT32.min else ''} to {high}{' or more' if high == INT32.max else ''}"
    )


def overlaps_itself(value: Tensor) -> bool:
    """Whether two elements of ``value`` may lie at one address: windows, expanded tensors."""
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def share_memory(first: Tensor, second: Tensor) -> bool:
    """Whether the address ranges of two tensors meet."""
    if first.device != second.device or not (first.numel() and second.numel()):
        return False
    (start, stop), (other_start, other_stop) = _addresses(first), _addresses(second)
    return start < other_stop and other_start < stop


def _addresses(value: Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for stride, size in zip(value.stride(), value.shape, strict=True))
    return value.data_ptr(), value.data_ptr() + (reach + 1) * value.element_size()


def on_host(*numbers: Tensor) -> list[int]:
    """Whole numbers and flags, () each, brought to the host together: one synchronisation."""
    return torch.stack([number.long() for number in numbers]).tolist() if numbers else []


def values_enabled() -> bool:
    return os.environ.get("APPO_CHECK_VALUES", "1") != "0"
