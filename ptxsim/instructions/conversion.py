"""mov, cvt and cvta."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptxsim.instructions.arithmetic import flush, round_to
from ptxsim.instructions.table import BITS, FLOATS, INTEGERS, opcode
from ptxsim.memory import SHARED_BASE
from ptxsim.parser import Instruction, Vector
from ptxsim.values import UNSIGNED, Array, dtype, is_float, width

if TYPE_CHECKING:
    from ptxsim.machine import Machine


@opcode("mov", BITS, INTEGERS, "f16 bf16 f32 f64 pred")
def mov(machine: Machine, ins: Instruction, active: Array) -> None:
    """Copy; with a vector on one side, pack its elements (the first lowest) or unpack them."""
    target, source = ins.operands
    if isinstance(target, Vector):
        part = width(ins.type) // len(target.items)
        bits = machine.read(source, f"b{width(ins.type)}")
        for index, item in enumerate(target.items):
            piece = (bits >> bits.dtype.type(index * part)).astype(UNSIGNED[part])
            machine.write(item, piece, f"b{part}", active)
    elif isinstance(source, Vector):
        part, whole = width(ins.type) // len(source.items), UNSIGNED[width(ins.type)]
        packed = np.zeros(machine.threads, whole)
        for index, item in enumerate(source.items):
            packed |= machine.read(item, f"b{part}").astype(whole) << whole(index * part)
        machine.write(target, packed, f"b{width(ins.type)}", active)
    elif ins.type == "pred":
        machine.write(target, machine.read(source, "pred"), "pred", active)
    else:  # bits, so that NaN payloads and subnormal numbers pass through
        bits_type = f"b{width(ins.type)}"
        machine.write(target, machine.read(source, bits_type), bits_type, active)
        machine.products.copied(target, source, active)


TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
ROUNDING = "rn rz rm rp rna rni rzi rmi rpi"


@opcode("cvt", INTEGERS, FLOATS, ROUNDING, "tf32 ftz sat relu satfinite")
def cvt(machine: Machine, ins: Instruction, active: Array) -> None:
    target, source = ins.modifiers[-2:]
    if target in ("f16x2", "bf16x2"):  # cvt d, a, b: a is the upper half
        high, low = (machine.read(operand, source) for operand in ins.operands[1:3])
        values = np.stack([low, high], axis=-1).astype(np.float64)
        return machine.write(ins.operands[0], round_to(values, ins, target), target, active)
    value = machine.read(ins.operands[1], source)
    if ins.has("ftz") and source == "f32":
        value = flush(value)
    if target == "tf32":
        return _cvt_tf32(machine, ins, active, value)
    if not is_float(target):
        result = _to_integer(value, ins, target) if is_float(source) else _between_integers(value, ins, target)
    else:
        exact = value.astype(np.float64)
        for name, function in TO_INTEGER.items():  # float to float, rounded to a whole number
            exact = function(exact) if ins.has(name) else exact
        result = round_to(exact, ins, target)
    machine.write(ins.operands[0], result, target, active)


def _cvt_tf32(machine: Machine, ins: Instruction, active: Array, value: Array) -> None:
    """Keep 10 bits of the mantissa, rounded to nearest (rn: ties to even, rna: ties away)."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    tie = np.uint32(0x1000) if ins.has("rna") else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    rounded = np.where(np.isfinite(value), (bits + tie) & np.uint32(0xFFFFE000), bits)
    machine.write(ins.operands[0], rounded, "b32", active)


def _to_integer(value: Array, ins: Instruction, target: str) -> Array:
    """Rounded, clamped to the range of the type; NaN becomes 0."""
    function = next((TO_INTEGER[name] for name in TO_INTEGER if ins.has(name)), None)
    if function is None:
        raise NotImplementedError("a conversion from float to integer without a rounding mode")
    limits = np.iinfo(dtype(target))
    whole = function(np.where(np.isnan(value), 0, value).astype(np.float64))
    high = whole >= float(limits.max)
    result = np.where(high, 0, np.maximum(whole, float(limits.min))).astype(dtype(target))
    return np.where(high, limits.max, result).astype(dtype(target))


def _between_integers(value: Array, ins: Instruction, target: str) -> Array:
    if ins.has("sat"):
        limits = np.iinfo(dtype(target))
        value = np.clip(value.astype(object), limits.min, limits.max)
    return value.astype(dtype(target))


@opcode("cvta", "to global shared local const cta u32 u64")
def cvta(machine: Machine, ins: Instruction, active: Array) -> None:
    """Between the address in a state space and the generic address; they differ for shared memory only."""
    address = machine.read(ins.operands[1], ins.type)
    if ins.has("shared"):
        base = address.dtype.type(SHARED_BASE)
        address = address - base if ins.has("to") else address + base
    elif not ins.has("global"):
        raise NotImplementedError("cvta of this state space")
    machine.write(ins.operands[0], address, ins.type, active)
