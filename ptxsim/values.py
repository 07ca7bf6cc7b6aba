"""PTX types: their widths, and their values as numpy arrays.

A register holds unsigned bits. ``decode`` gives the values that an instruction of some type sees in them and
``encode`` the bits of a result. bf16 values are float32 arrays; packed types (f16x2, bf16x2) have a trailing axis of
two, low half first.
"""

import functools
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
WIDTHS = {"pred": 1, "bf16": 16, "f16x2": 32, "bf16x2": 32, "tf32": 32, "f32x2": 64}


@functools.cache
def width(type: str) -> int:
    """Bits of a PTX type such as "u32", "bf16x2" or "pred"."""
    if type in WIDTHS:
        return WIDTHS[type]
    match = re.fullmatch(r"[busf](8|16|32|64)", type)
    if not match:
        raise NotImplementedError(f"PTX type {type!r}")
    return int(match[1])


@functools.cache
def dtype(type: str) -> Any:
    """The numpy dtype of the values of ``type``; bit types are unsigned."""
    if type == "pred":
        return np.bool_
    if type in ("bf16", "bf16x2", "tf32", "f32x2"):
        return np.float32
    if type == "f16x2":
        return np.float16
    by_width: dict[int, Any] = {"b": UNSIGNED, "u": UNSIGNED, "s": SIGNED, "f": FLOAT}[type[0]]  # type: ignore[assignment]
    return by_width[width(type)]


def is_float(type: str) -> bool:
    return type[0] == "f" or type in ("bf16", "bf16x2", "tf32")


def bf16_to_float(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(values: Array) -> Array:
    """Round to nearest even, from float32 or float64; NaN becomes the canonical 0x7fff."""
    single = np.ascontiguousarray(values, np.float32)
    if values.dtype == np.float64:
        # Rounding twice is wrong for a double that is near a tie: make the intermediate odd where it is inexact.
        bits = single.view(np.uint32)
        toward_zero = np.where(np.abs(single) > np.abs(values), bits - np.uint32(1), bits)
        odd = np.where(single.astype(np.float64) == values, bits, toward_zero | np.uint32(1))
        single = odd.astype(np.uint32).view(np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(single), np.uint32(0x7FFF), rounded).astype(np.uint16)


def decode(bits: Array, type: str) -> Array:
    """The values of ``type`` in unsigned ``bits`` (as wide as the register, which may be wider than the type)."""
    if type == "pred":
        return bits
    if type in ("f16x2", "bf16x2"):
        halves = np.ascontiguousarray(bits.astype(np.uint32, copy=False)).view(np.uint16).reshape(*bits.shape, 2)
        return halves.view(np.float16) if type == "f16x2" else bf16_to_float(halves)
    if type == "f32x2":
        return np.ascontiguousarray(bits).view(np.float32).reshape(*bits.shape, 2)
    bits = bits.astype(UNSIGNED[width(type)], copy=False)
    return bf16_to_float(bits) if type == "bf16" else bits.view(dtype(type))


def encode(values: Array, type: str) -> Array:
    """The bits of ``values`` as ``type``: an unsigned array of its width (bool for predicates)."""
    if type == "pred":
        return values.astype(bool, copy=False)
    if type == "bf16":
        return float_to_bf16(values)
    if type in ("f16x2", "bf16x2"):
        halves = float_to_bf16(values) if type == "bf16x2" else values.astype(np.float16).view(np.uint16)
        return np.ascontiguousarray(halves).view(np.uint32)[..., 0]
    if type == "f32x2":
        return np.ascontiguousarray(values.astype(np.float32, copy=False)).view(np.uint64)[..., 0]
    return np.ascontiguousarray(values.astype(dtype(type), copy=False)).view(UNSIGNED[width(type)])


def resize(bits: Array, register_type: str, type: str) -> Array:
    """Bits of ``type`` as the bits of a register that may be wider: signed types extend their sign, others zeros."""
    target = width(register_type)
    if type == "pred" or bits.dtype.itemsize * 8 == target:
        return bits
    if type[0] == "s":
        return bits.view(SIGNED[width(type)]).astype(SIGNED[target]).view(UNSIGNED[target])
    return bits.astype(UNSIGNED[target])


def immediate(text: str, type: str) -> Array:
    """The value of a constant in PTX text, as an instruction of ``type`` reads it."""
    if text[:2].lower() == "0f" and len(text) == 10:
        return decode(np.array(int(text[2:], 16), np.uint32), type if width(type) == 32 else "f32")
    if text[:2].lower() == "0d" and len(text) == 18:
        return decode(np.array(int(text[2:], 16), np.uint64), type)
    if "." in text or (is_float(type) and "x" not in text.lower()):
        if not is_float(type):
            raise NotImplementedError(f"the constant {text!r} read as {type}")
        return np.array(float(text), dtype(type))
    number = int(text.rstrip("U"), 0)
    if type == "pred":
        return np.array(bool(number))
    return decode(np.array(number & ((1 << width(type)) - 1), UNSIGNED[width(type)]), type)
