"""Loads, stores, reductions to global memory, cp.async, fences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptxsim.instructions.table import BITS, INTEGERS, opcode
from ptxsim.memory import SHARED_BASE
from ptxsim.parser import Address, Instruction, Operand, Register, Symbol, Vector
from ptxsim.values import UNSIGNED, Array, decode, encode, width

if TYPE_CHECKING:
    from ptxsim.machine import Machine

CACHE = (
    "ca cg cs lu cv wb wt nc L1 L2 evict_first evict_last evict_normal evict_unchanged no_allocate cache_hint "
    "64B 128B 256B weak relaxed acquire release volatile cta gpu sys cluster"
)
SPACES = "global shared param"
TYPES = "f16 bf16 f32 f64 v2 v4"


def addresses(machine: Machine, operand: Operand) -> Array:
    """The addresses an operand such as [%rd1+16] names, signed 64-bit."""
    if not isinstance(operand, Address):
        raise NotImplementedError(f"PTX address {operand}")
    base = operand.base
    if isinstance(base, Register):
        type = f"u{width(machine.program.registers[base.name])}"
        return machine.read(base, type).astype(np.int64) + operand.offset
    return machine.read(base, "u32").astype(np.int64) + operand.offset


def load(machine: Machine, ins: Instruction, address: Array, threads: Array, size: int, count: int) -> Array:
    """(threads, count) unsigned elements of ``size`` bytes from the state space the instruction names, or generic."""
    if _is_shared(ins, address):
        return machine.shared.load(machine.block[threads], _window(address), size, count)
    return machine.memory.load(address, size, count)


def store(machine: Machine, ins: Instruction, address: Array, threads: Array, values: Array) -> None:
    if _is_shared(ins, address):
        machine.store_shared(threads, _window(address), values)
    else:
        machine.memory.store(address, values)


def _is_shared(ins: Instruction, address: Array) -> bool:
    if ins.has("shared", "global"):
        return ins.has("shared")
    inside = address >= SHARED_BASE
    if inside.any() != inside.all():
        raise NotImplementedError("a generic access to both global and shared memory")
    return bool(inside.all())


def _window(address: Array) -> Array:
    return np.where(address >= SHARED_BASE, address - SHARED_BASE, address)


@opcode("ld", BITS, INTEGERS, SPACES, TYPES, CACHE)
def ld(machine: Machine, ins: Instruction, active: Array) -> None:
    target, source = ins.operands[:2]
    items = target.items if isinstance(target, Vector) else (target,)
    size = width(ins.type) // 8
    bits_type = f"b{8 * size}"
    if ins.has("param"):
        data = np.frombuffer(_parameter(machine, source, size * len(items)), UNSIGNED[8 * size])
        columns = [np.full(machine.threads, value) for value in data]
    else:
        threads = np.flatnonzero(active)
        loaded = load(machine, ins, addresses(machine, source)[threads], threads, size, len(items))
        columns = [np.zeros(machine.threads, loaded.dtype) for _ in items]
        for column, values in zip(columns, loaded.T, strict=True):
            column[threads] = values
    type = ins.type if ins.type[0] == "s" else bits_type  # ld.s8 into a wider register extends the sign
    for item, column in zip(items, columns, strict=True):
        machine.write(item, decode(column, type), type, active)


def _parameter(machine: Machine, source: Operand, size: int) -> bytes:
    if not isinstance(source, Address) or not isinstance(source.base, Symbol):
        raise NotImplementedError(f"PTX parameter address {source}")
    data = machine.parameters[source.base.name][source.offset : source.offset + size]
    if len(data) != size:
        raise IndexError(f"parameter {source.base.name} read past its end")
    return data


@opcode("st", BITS, INTEGERS, "global shared", TYPES, CACHE)
def st(machine: Machine, ins: Instruction, active: Array) -> None:
    source = ins.operands[1]
    items = source.items if isinstance(source, Vector) else (source,)
    bits_type = f"b{width(ins.type)}"
    threads = np.flatnonzero(active)
    values = np.stack([machine.read(item, bits_type)[threads] for item in items], axis=1)
    store(machine, ins, addresses(machine, ins.operands[0])[threads], threads, np.ascontiguousarray(values))


@opcode("red", "global add u32 s32 u64 f32 f64", CACHE)
def red(machine: Machine, ins: Instruction, active: Array) -> None:
    threads = np.flatnonzero(active)
    values = machine.read(ins.operands[1], ins.type)[threads]
    machine.memory.add(addresses(machine, ins.operands[0])[threads], values)


@opcode("atom", "global add u32 s32 u64 f32 f64", CACHE)
def atom(machine: Machine, ins: Instruction, active: Array) -> None:
    """Lane after lane, so that each gets the value that it found."""
    address, values = addresses(machine, ins.operands[1]), machine.read(ins.operands[2], ins.type)
    found = np.zeros_like(values)
    for thread in np.flatnonzero(active):
        one = slice(thread, thread + 1)
        bits = machine.memory.load(address[one], values.itemsize, 1)[:, 0]
        found[one] = decode(bits, ins.type)
        machine.memory.store(address[one], encode(found[one] + values[one], ins.type)[:, None])
    machine.write(ins.operands[0], found, ins.type, active)


@opcode("cp", "async ca cg shared global commit_group wait_group wait_all L2 128B 64B 256B cache_hint")
def cp_async(machine: Machine, ins: Instruction, active: Array) -> None:
    if ins.has("commit_group"):
        return machine.copies.commit(active)
    if ins.has("wait_group"):
        return machine.copies.wait(active, int(machine.read(ins.operands[0], "u32")[0]))
    if ins.has("wait_all"):
        return machine.copies.wait(active, None)
    threads = np.flatnonzero(active)
    destination, source = (addresses(machine, operand)[threads] for operand in ins.operands[:2])
    size = int(machine.read(ins.operands[2], "u32")[0])
    if len(ins.operands) > 3 and not ins.has("cache_hint"):
        sizes = machine.read(ins.operands[3], "u32")[threads]
    else:
        sizes = np.full(threads.size, size)
    machine.copies.issue(threads, destination, source, sizes, size)


@opcode("createpolicy", "fractional L2 evict_first evict_last evict_normal evict_unchanged b64")
def createpolicy(machine: Machine, ins: Instruction, active: Array) -> None:
    """Cache hints have no effect here."""
    machine.write(ins.operands[0], np.zeros(machine.threads, np.uint64), "b64", active)


@opcode(
    "membar fence prefetch griddepcontrol",
    "cta gl sys gpu sc acq_rel global L1 L2 wait launch_dependents proxy async shared",
    CACHE,
)
def ordering(machine: Machine, ins: Instruction, active: Array) -> None:
    """Memory is sequentially consistent here: only what the async proxy sees needs a fence."""
    if ins.has("proxy"):
        machine.proxies.fence(active)
