"""Logic, shifts, bit fields and byte permutations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptxsim.instructions.table import BITS, INTEGERS, opcode
from ptxsim.parser import Instruction
from ptxsim.values import Array, width

if TYPE_CHECKING:
    from ptxsim.machine import Machine


@opcode("and or xor", BITS, "pred")
def logic(machine: Machine, ins: Instruction, active: Array) -> None:
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[ins.opcode]
    a, b = (machine.read(operand, ins.type) for operand in ins.operands[1:3])
    machine.write(ins.operands[0], function(a, b), ins.type, active)


@opcode("not", BITS, "pred")
def invert(machine: Machine, ins: Instruction, active: Array) -> None:
    machine.write(ins.operands[0], ~machine.read(ins.operands[1], ins.type), ins.type, active)


@opcode("lop3", "b32")
def lop3(machine: Machine, ins: Instruction, active: Array) -> None:
    a, b, c = (machine.read(operand, "b32") for operand in ins.operands[1:4])
    table = int(machine.read(ins.operands[4], "u32")[0])
    result = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            result = result | ((a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c))
    machine.write(ins.operands[0], result, "b32", active)


@opcode("shl shr", BITS, INTEGERS)
def shift(machine: Machine, ins: Instruction, active: Array) -> None:
    value, amount = machine.read(ins.operands[1], ins.type), machine.read(ins.operands[2], "u32")
    bits = width(ins.type)
    inside = np.minimum(amount, bits - 1).astype(value.dtype)
    if ins.opcode == "shl":
        result = np.where(amount >= bits, 0, value << inside)
    else:  # beyond the width: the sign, or zero
        result = np.where(amount >= bits, value >> inside if ins.type[0] == "s" else 0, value >> inside)
    machine.write(ins.operands[0], result.astype(value.dtype), ins.type, active)


@opcode("shf", "l r wrap clamp b32")
def funnel_shift(machine: Machine, ins: Instruction, active: Array) -> None:
    low, high, amount = (machine.read(operand, "u32").astype(np.uint64) for operand in ins.operands[1:4])
    amount = amount & np.uint64(31) if ins.has("wrap") else np.minimum(amount, np.uint64(32))
    both = high << np.uint64(32) | low
    result = (both << amount) >> np.uint64(32) if ins.has("l") else both >> amount
    machine.write(ins.operands[0], (result & np.uint64(0xFFFFFFFF)).astype(np.uint32), "b32", active)


@opcode("bfe", "u32 s32 u64 s64")
def extract(machine: Machine, ins: Instruction, active: Array) -> None:
    bits, type = width(ins.type), ins.type
    value = machine.read(ins.operands[1], type)
    position, length = (machine.read(o, "u32").astype(np.int64) & 255 for o in ins.operands[2:4])
    shifted = value >> np.minimum(position, bits - 1).astype(value.dtype)
    shifted = np.where((position >= bits) & (type[0] == "u"), 0, shifted).astype(value.dtype)
    # Move the field to the top and back down: the shift right extends with the sign, or with zeros.
    drop = np.maximum(bits - np.maximum(length, 1), 0).astype(value.dtype)
    beyond = position + length > bits  # a field that reaches past the top has the shift's own extension
    result = np.where(beyond, shifted, (shifted << drop) >> drop)
    machine.write(ins.operands[0], np.where(length == 0, 0, result).astype(value.dtype), type, active)


@opcode("bfi", "b32 b64")
def insert(machine: Machine, ins: Instruction, active: Array) -> None:
    bits = width(ins.type)
    field, base = (machine.read(o, ins.type).astype(np.uint64) for o in ins.operands[1:3])
    position, length = (machine.read(o, "u32").astype(np.uint64) & np.uint64(255) for o in ins.operands[3:5])
    ones = np.where(length >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(length, np.uint64(63))) - np.uint64(1))
    place = np.minimum(position, np.uint64(63))
    mask = np.where(position >= bits, np.uint64(0), ones << place)
    result = (base & ~mask) | ((field << place) & mask)
    machine.write(ins.operands[0], result.astype(np.uint32 if bits == 32 else np.uint64), ins.type, active)


@opcode("prmt", "b32")
def permute(machine: Machine, ins: Instruction, active: Array) -> None:
    a, b, selector = (machine.read(operand, "b32").astype(np.uint64) for operand in ins.operands[1:4])
    both, result = b << np.uint64(32) | a, np.zeros(machine.threads, np.uint64)
    for byte in range(4):
        choice = selector >> np.uint64(4 * byte)
        value = both >> (choice & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(value & np.uint64(128), np.uint64(255), np.uint64(0))
        result |= np.where(choice & np.uint64(8), sign, value) << np.uint64(8 * byte)
    machine.write(ins.operands[0], result.astype(np.uint32), "b32", active)


@opcode("popc clz brev bfind", "b32 b64 u32 u64")
def count(machine: Machine, ins: Instruction, active: Array) -> None:
    bits = width(ins.type)
    value = machine.read(ins.operands[1], ins.type)
    places = (value[:, None] >> np.arange(bits, dtype=value.dtype)) & value.dtype.type(1)  # (threads, bits), low first
    if ins.opcode == "brev":
        weights = np.uint64(1) << np.arange(bits - 1, -1, -1, dtype=np.uint64)
        return machine.write(ins.operands[0], (places * weights).sum(1).astype(value.dtype), ins.type, active)
    top = np.where(value == 0, -1, bits - 1 - places[:, ::-1].argmax(1))
    result = {"popc": places.sum(1), "clz": bits - 1 - top, "bfind": top}[ins.opcode]
    machine.write(ins.operands[0], result.astype(np.int32), "s32", active)
