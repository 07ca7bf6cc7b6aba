"""Instructions in which the lanes of a warp exchange registers. The scheduler sees to it that all lanes are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptxsim.instructions.table import opcode
from ptxsim.parser import Instruction, Pair
from ptxsim.values import Array

if TYPE_CHECKING:
    from ptxsim.machine import Machine

LANE = np.arange(32)


@opcode("shfl", "sync bfly idx up down b32")
def shfl(machine: Machine, ins: Instruction, active: Array) -> None:
    value = machine.read(ins.operands[1], "b32").reshape(-1, 32)
    amount = machine.read(ins.operands[2], "u32").reshape(-1, 32).astype(np.int64) & 31
    control = machine.read(ins.operands[3], "u32").reshape(-1, 32).astype(np.int64)
    clamp, segment = control & 31, control >> 8 & 31
    last = (LANE & segment) | (clamp & ~segment)
    if ins.has("up"):
        source, inside = LANE - amount, LANE - amount >= last
    elif ins.has("down"):
        source, inside = LANE + amount, LANE + amount <= last
    elif ins.has("bfly"):
        source, inside = LANE ^ amount, (LANE ^ amount) <= last
    else:
        source = (LANE & segment) | (amount & ~segment)
        inside = source <= last
    source = np.where(inside, source, LANE)
    result, target = np.take_along_axis(value, source, axis=1).reshape(-1), ins.operands[0]
    if isinstance(target, Pair):
        machine.write(target.second, inside.reshape(-1), "pred", active)
        target = target.first
    machine.write(target, result, "b32", active)


@opcode("vote", "sync ballot any all uni b32 pred")
def vote(machine: Machine, ins: Instruction, active: Array) -> None:
    value = (machine.read(ins.operands[1], "pred") & active).reshape(-1, 32)
    present = active.reshape(-1, 32)
    if ins.has("ballot"):
        ballot = (value * (np.uint64(1) << LANE.astype(np.uint64))).sum(1).astype(np.uint32)
        return machine.write(ins.operands[0], np.repeat(ballot, 32), "b32", active)
    if ins.has("uni"):
        raise NotImplementedError("vote.uni")
    result = value.any(1) if ins.has("any") else (value | ~present).all(1)
    machine.write(ins.operands[0], np.repeat(result, 32), "pred", active)


REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@opcode("redux", "sync add min max and or xor s32 u32 b32 f32 NaN")
def redux(machine: Machine, ins: Instruction, active: Array) -> None:
    value = machine.read(ins.operands[1], ins.type).reshape(-1, 32)
    function = next(REDUCTIONS[name] for name in REDUCTIONS if ins.has(name))
    if ins.type == "f32" and not ins.has("NaN"):
        function = np.fmin if ins.has("min") else np.fmax
    result = function.reduce(value, axis=1, dtype=value.dtype)
    machine.write(ins.operands[0], np.repeat(result, 32), ins.type, active)


@opcode("elect", "sync")
def elect(machine: Machine, ins: Instruction, active: Array) -> None:
    first = active.reshape(-1, 32).argmax(1)
    leader, target = np.repeat(first, 32), ins.operands[0]
    if not isinstance(target, Pair):
        raise NotImplementedError("elect.sync without two results")
    machine.write(target.first, leader.astype(np.uint32), "b32", active)
    machine.write(target.second, machine.specials["laneid"] == leader, "pred", active)


@opcode("bar", "warp sync")
def bar_warp(machine: Machine, ins: Instruction, active: Array) -> None:
    """bar.warp.sync: the scheduler has brought the warp together."""
