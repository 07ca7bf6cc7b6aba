"""ldmatrix, stmatrix and mma: how the fragments of a matrix are spread over the lanes of a warp (PTX ISA, 9.7.14)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from ptxsim.instructions.memory import addresses
from ptxsim.instructions.table import opcode
from ptxsim.parser import Instruction, Operand, Vector
from ptxsim.values import Array, decode

if TYPE_CHECKING:
    from ptxsim.machine import Machine


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
    machine.store_shared(threads, address, values)


def _spread(machine: Machine, values: Array, active: Array) -> Array:
    """Values of the active warps' lanes, placed among those of all threads."""
    result = np.zeros(machine.threads, values.dtype)
    result.reshape(-1, 32)[active.reshape(-1, 32).any(1)] = values.reshape(-1, 32)
    return result


SHAPES = {"m16n8k16": 16, "m16n8k8": 8, "m16n8k4": 4}


@functools.cache
def fragment_places(matrix: str, k: int, packed: bool) -> Array:
    """Places of a fragment's values in its matrix: flat indices in the order (register, lane, half).

    A is 16 x k, B k x 8, C and D 16 x 8. Every other register of A is 8 rows lower. 16-bit types (``packed``) hold two
    neighbours along the inner dimension in a register, tf32 one.
    """
    registers = {"a": (2 * k // 8 if packed else k // 2), "b": (k // 8 if packed else k // 4), "c": 4}[matrix]
    places = []
    for register in range(registers):
        for lane in range(32):
            group, member = divmod(lane, 4)
            for half in range(2 if packed and matrix != "c" else 1):
                if matrix == "c":
                    places.append((group + 8 * (register // 2)) * 8 + 2 * member + register % 2)
                    continue
                index = register // 2 if matrix == "a" else register
                inner = 2 * member + half + 8 * index if packed else member + 4 * index
                places.append((group + 8 * (register % 2)) * k + inner if matrix == "a" else inner * 8 + group)
    return np.array(places)


@opcode("mma", "sync aligned row col f32 f16 bf16 tf32", frozenset(SHAPES))
def mma(machine: Machine, ins: Instruction, active: Array) -> None:
    """D (16 x 8) = A (16 x k) B (k x 8) + C, summed in float64 and rounded once.

    Sums of the products of half-precision numbers are exact there, so a row's bits do not depend on its place.
    """
    k = next(SHAPES[shape] for shape in SHAPES if ins.has(shape))
    result_type, a_type, b_type, c_type = ins.modifiers[-4:]
    if a_type != b_type or (result_type, c_type) != ("f32", "f32"):
        raise NotImplementedError(f"mma of {a_type} and {b_type} into {result_type}")
    warps = np.asarray(active.reshape(-1, 32).any(1))
    packed = a_type != "tf32"
    a = fragment_matrix(machine, ins.operands[1], a_type, warps, fragment_places("a", k, packed)).reshape(-1, 16, k)
    b = fragment_matrix(machine, ins.operands[2], a_type, warps, fragment_places("b", k, packed)).reshape(-1, k, 8)
    places = fragment_places("c", k, packed)
    c = fragment_matrix(machine, ins.operands[3], "f32", warps, places).reshape(-1, 16, 8)
    d = (c + a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)
    d = d.reshape(-1, 128)[:, places].reshape(-1, 4, 32)
    for index, operand in enumerate(items(ins.operands[0])):
        machine.write(operand, _spread(machine, d[:, index], active), "f32", active)


def fragment_matrix(machine: Machine, operand: Operand, type: str, warps: Array, places: Array) -> Array:
    """(active warps, elements) float32: the matrix whose fragment the registers of ``operand`` hold."""
    registers = [machine.read(register, "b32").reshape(-1, 32)[warps] for register in items(operand)]
    bits = np.stack(registers, axis=1)  # (warps, registers, 32)
    if type in ("tf32", "f32"):  # the tensor core ignores the low 13 bits of tf32
        values = (bits & np.uint32(0xFFFFE000) if type == "tf32" else bits).view(np.float32)
    else:
        values = decode(bits, type + "x2").astype(np.float32, copy=False)
    matrix = np.empty((bits.shape[0], places.size), np.float32)
    matrix[:, places] = values.reshape(bits.shape[0], -1)
    return matrix
