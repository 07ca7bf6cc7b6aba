"""wgmma: products of a warpgroup (4 warps, 64 rows) with matrices in shared memory that descriptors name.

A warp computes its own 16 rows. D (64 x n): lane l of warp w holds in register i row 16 w + l / 4 + 8 (i / 2 % 2) and
column 8 (i / 4) + 2 (l % 4) + i % 2; A in registers is the A of mma.m16n8k16 (m16n8k8 for tf32) for those 16 rows.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from ptxsim.instructions.shared_matrix import DEPTH, load, uniform
from ptxsim.instructions.table import opcode
from ptxsim.instructions.tensor import fragment_matrix, fragment_places
from ptxsim.parser import Immediate, Instruction, Operand, Register, Vector
from ptxsim.values import Array

if TYPE_CHECKING:
    from ptxsim.machine import Machine

SHAPES = frozenset(f"m64n{n}k{k}" for n in range(8, 257, 8) for k in (8, 16))


def _number(operand: Operand) -> int:
    if not isinstance(operand, Immediate):
        raise NotImplementedError(f"wgmma with the flag {operand}")
    return int(operand.text, 0)


@opcode("wgmma", "mma_async fence commit_group wait_group sync aligned f32 bf16 f16 tf32", SHAPES)
def wgmma(machine: Machine, ins: Instruction, active: Array) -> None:
    if ins.has("fence"):
        return machine.products.fence(active)
    if ins.has("commit_group"):
        return machine.products.commit(active)
    if ins.has("wait_group"):
        return machine.products.wait(active, _number(ins.operands[0]))
    _multiply(machine, ins, active)


def _operand(machine: Machine, bits: Array, warps: Array, length: int, type: str, transposed: bool) -> Array:
    matrices, offsets = load(machine, bits, warps, length, type, transposed=transposed, version=0)
    machine.products.read_shared(warps, offsets)
    return matrices


def _multiply(machine: Machine, ins: Instruction, active: Array) -> None:
    """D = A B + D, or A B where the predicate scale-d is false; summed in float64 and rounded once."""
    target, a_operand, b_operand, scale = ins.operands[:4]
    flags = [_number(operand) for operand in ins.operands[4:]]  # signs of A and B, then what is transposed
    result_type, type, b_type = ins.modifiers[-3:]
    if (result_type, b_type) != ("f32", type) or not isinstance(target, Vector):
        raise NotImplementedError(f"wgmma of {type} and {b_type} into {result_type}")
    n, k = (int(text) for text in re.findall(r"n(\d+)k(\d+)", ".".join(ins.modifiers))[0])
    if k * (4 if type == "tf32" else 2) != DEPTH or len(target.items) != n // 2:
        raise ValueError(f"wgmma of {n} columns and depth {k} with {len(target.items)} registers")
    transposed = [bool(flag) for flag in flags[2:]] or [False]
    warps = np.flatnonzero(active.reshape(-1, 32).any(1))
    names = [item.name for item in target.items if isinstance(item, Register)]
    in_registers = a_operand.items if isinstance(a_operand, Vector) else ()
    fragments = [item.name for item in in_registers if isinstance(item, Register)]
    machine.products.check_fenced(warps, names + fragments)

    b_bits = uniform(machine, b_operand, "b64", warps)
    b = _operand(machine, b_bits, warps, n, type, transposed[-1])
    if in_registers:
        places = fragment_places("a", k, type != "tf32")
        present = np.asarray(active.reshape(-1, 32).any(1))
        a = fragment_matrix(machine, a_operand, type, present, places).reshape(-1, 16, k)
    else:
        a_bits = uniform(machine, a_operand, "b64", warps)
        whole = _operand(machine, a_bits, warps, 64, type, transposed[0])
        a = whole.reshape(-1, 4, 16, k)[np.arange(warps.size), machine.specials["warpid"][::32][warps] % 4]
    product = flags[0] * flags[1] * (a.astype(np.float64) @ b.astype(np.float64).swapaxes(1, 2))

    # (warps, 16, n) -> (warps, registers, lanes): rows are (half, lane / 4), columns (block, lane % 4, pair).
    spread = product.reshape(-1, 2, 8, n // 8, 4, 2).transpose(0, 3, 1, 5, 2, 4).reshape(warps.size, n // 2, 32)
    before = np.stack([machine.products.accumulator(name).reshape(-1, 32)[warps] for name in names], axis=1)
    keep = uniform(machine, scale, "pred", warps)[:, None, None]
    values = (spread + np.where(keep, before.view(np.float32), 0)).astype(np.float32).view(np.uint32)
    results = {}
    for index, name in enumerate(names):
        bits = np.zeros((machine.threads // 32, 32), np.uint32)
        bits[warps] = values[:, index]
        results[name] = bits.reshape(-1)
    machine.products.issue(active, results, fragments)
