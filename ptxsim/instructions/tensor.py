"""ldmatrix, stmatrix and mma: how the fragments of a matrix are spread over the lanes of a warp (PTX ISA, 9.7.14)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptxsim.instructions.memory import addresses
from ptxsim.instructions.table import opcode
from ptxsim.parser import Instruction, Operand, Vector
from ptxsim.values import Array, decode

if TYPE_CHECKING:
    from ptxsim.machine import Machine

LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4


def items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _row_addresses(machine: Machine, operand: Operand, active: Array, count: int) -> tuple[Array, Array]:
    """Threads and addresses of the matrix rows: lane 8 i + j of a warp names row j of matrix i."""
    warps = np.flatnonzero(active.reshape(-1, 32).any(1))
    threads = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
    return threads, addresses(machine, operand)[threads]


@opcode("ldmatrix", "sync aligned m8n8 x1 x2 x4 trans shared cta b16")
def ldmatrix(machine: Machine, ins: Instruction, active: Array) -> None:
    targets = items(ins.operands[0])
    threads, address = _row_addresses(machine, ins.operands[1], active, len(targets))
    rows = machine.shared.load(machine.block[threads], address, 4, 4).view(np.uint16)
    matrices = rows.reshape(-1, len(targets), 8, 8)  # (warps, matrices, rows, columns)
    if ins.has("trans"):
        matrices = matrices.swapaxes(2, 3)
    for index, target in enumerate(targets):
        pairs = np.ascontiguousarray(matrices[:, index]).view(np.uint32)  # (warps, 8, 4)
        machine.write(target, _spread(machine, pairs.reshape(-1), active), "b32", active)


@opcode("stmatrix", "sync aligned m8n8 x1 x2 x4 trans shared cta b16")
def stmatrix(machine: Machine, ins: Instruction, active: Array) -> None:
    sources = items(ins.operands[1])
    threads, address = _row_addresses(machine, ins.operands[0], active, len(sources))
    lanes = active.reshape(-1, 32).any(1)
    pairs = [machine.read(source, "b32").reshape(-1, 8, 4)[lanes] for source in sources]
    matrices = np.stack(pairs, axis=1).view(np.uint16)  # (warps, matrices, 8, 8)
    if ins.has("trans"):
        matrices = matrices.swapaxes(2, 3)
    values = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, 4)
    machine.shared.store(machine.block[threads], address, values)


def _spread(machine: Machine, values: Array, active: Array) -> Array:
    """Values of the active warps' lanes, placed among those of all threads."""
    result = np.zeros(machine.threads, values.dtype)
    result.reshape(-1, 32)[active.reshape(-1, 32).any(1)] = values.reshape(-1, 32)
    return result


def _fragment(k: int, packed: bool, index: int, half: int) -> tuple[Array, Array]:
    """(group, inner) coordinates of one value of register ``index`` of an A or B fragment with inner length ``k``.

    The group is the row of A (add 8 for every other register) or the column of B. 16-bit types hold two neighbours
    along the inner dimension in a register (``half``), tf32 one.
    """
    if packed:
        return GROUP, MEMBER * 2 + half + 8 * index
    return GROUP, MEMBER + 4 * index


SHAPES = {"m16n8k16": 16, "m16n8k8": 8, "m16n8k4": 4}


@opcode("mma", "sync aligned row col f32 f16 bf16 tf32", frozenset(SHAPES))
def mma(machine: Machine, ins: Instruction, active: Array) -> None:
    """D (16 x 8) = A (16 x k) B (k x 8) + C, products summed in float32."""
    k = next(SHAPES[shape] for shape in SHAPES if ins.has(shape))
    result_type, a_type, b_type, c_type = ins.modifiers[-4:]
    if a_type != b_type or (result_type, c_type) != ("f32", "f32"):
        raise NotImplementedError(f"mma of {a_type} and {b_type} into {result_type}")
    warps: Array = active.reshape(-1, 32).any(1)
    a, b, c = (
        np.zeros(shape, np.float32) for shape in ((warps.sum(), 16, k), (warps.sum(), k, 8), (warps.sum(), 16, 8))
    )
    packed = a_type != "tf32"
    for index, operand in enumerate(items(ins.operands[1])):
        for half, values in enumerate(_halves(machine, operand, a_type, warps)):
            row, inner = _fragment(k, packed, index // 2, half)
            a[:, row + 8 * (index % 2), inner] = values
    for index, operand in enumerate(items(ins.operands[2])):
        for half, values in enumerate(_halves(machine, operand, b_type, warps)):
            column, inner = _fragment(k, packed, index, half)
            b[:, inner, column] = values
    for index, operand in enumerate(items(ins.operands[3])):
        c[:, GROUP + 8 * (index // 2), MEMBER * 2 + index % 2] = machine.read(operand, "f32").reshape(-1, 32)[warps]
    d = c + a @ b
    for index, operand in enumerate(items(ins.operands[0])):
        values = d[:, GROUP + 8 * (index // 2), MEMBER * 2 + index % 2]
        machine.write(operand, _spread(machine, values, active), "f32", active)


def _halves(machine: Machine, operand: Operand, type: str, warps: Array) -> list[Array]:
    """The values in one register of a fragment, each (active warps, 32)."""
    bits = machine.read(operand, "b32").reshape(-1, 32)[warps]
    if type == "tf32":  # the tensor core ignores the low 13 bits
        return [(bits & np.uint32(0xFFFFE000)).view(np.float32)]
    both = decode(bits, type + "x2").astype(np.float32)
    return [both[..., 0], both[..., 1]]
