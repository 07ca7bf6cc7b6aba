"""tcgen05: products into tensor memory, its allocation, loads, stores and what waits for them (PTX ISA, 9.7.16).

D (M x N of float32): row r of 128 lies in lane r; row r of 64 in lane 32 (r / 16) + r % 16, or 16 lanes further. Column
n is n columns behind the address. A in tensor memory lies in the same lanes, two 16-bit values of K in a column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptxsim.instructions.memory import addresses
from ptxsim.instructions.shared_matrix import DEPTH, load, uniform, values_of
from ptxsim.instructions.table import opcode
from ptxsim.instructions.tensor import items
from ptxsim.parser import Address, Immediate, Instruction, Operand, Vector
from ptxsim.tensor_memory import Product, Region
from ptxsim.values import Array

if TYPE_CHECKING:
    from ptxsim.machine import Machine

KINDS = {"f16": ("f16", "bf16"), "tf32": (None, None, "tf32")}  # types of A and B by their code
COUNTS = frozenset(f"x{2**i}" for i in range(8))


@dataclass(frozen=True)
class Shape:
    """An instruction descriptor (9.7.16.4.2)."""

    m: int
    n: int
    types: tuple[str, str]  # of A and B
    signs: int
    transposed: tuple[bool, bool]

    @staticmethod
    def decode(bits: int, kind: str) -> Shape:
        """Bits: 4-5 type of D; 7-9, 10-12 of A, B; 13, 14 negate; 15, 16 transpose; 17-22 N / 8; 24-28 M / 16."""
        if bits & 0b1111 or bits >> 29 or bits >> 4 & 3 != 1:
            raise NotImplementedError(f"instruction descriptor {bits:#x}: sparse, saturating, shifted, or not into f32")
        types = [dict(enumerate(KINDS[kind])).get(bits >> shift & 7) for shift in (7, 10)]
        m, n = (bits >> 24 & 31) * 16, (bits >> 17 & 63) * 8
        if None in types or bits & (1 << 6 | 1 << 23) or m not in (64, 128) or not 8 <= n <= 256:
            raise ValueError(f"instruction descriptor {bits:#x} of kind {kind}: types {types}, M {m}, N {n}")
        signs = (-1) ** (bits >> 13 & 1) * (-1) ** (bits >> 14 & 1)
        return Shape(m, n, (str(types[0]), str(types[1])), signs, (bool(bits >> 15 & 1), bool(bits >> 16 & 1)))

    @property
    def number(self) -> int:
        return self.m << 16 | self.n

    def lanes(self, first: Array) -> Array:
        """(threads, M): lanes of the rows, from the lanes of the addresses."""
        row = np.arange(self.m)
        if (first % 16 if self.m == 64 else first).any() or (first > 16).any():
            raise ValueError(f"a result of {self.m} rows at lane {int(first.max())}")
        return first[:, None] + (row if self.m == 128 else row // 16 * 32 + row % 16)


@opcode(
    "tcgen05",
    "alloc dealloc relinquish_alloc_permit ld st wait mma commit cta_group 1 sync aligned shared cta cluster b32 b64 "
    "32x32b 16x32bx2 kind f16 tf32 mbarrier arrive one fence before_thread_sync after_thread_sync",
    COUNTS,
)
def tcgen05(machine: Machine, ins: Instruction, active: Array) -> None:
    name = ins.modifiers[0]
    if name == "fence":  # programs run in order here, and warps meet at barriers
        return
    run = {"mma": mma, "commit": commit, "wait": wait, "ld": transfer, "st": transfer}.get(name, manage)
    run(machine, ins, active)


def manage(machine: Machine, ins: Instruction, active: Array) -> None:
    """alloc, dealloc and relinquish_alloc_permit, by one warp for its block."""
    memory = machine.tensor_memory
    for warp in np.flatnonzero(active.reshape(-1, 32).any(1)):
        block, one = int(machine.proxies.block[warp]), np.array([warp])
        if ins.has("alloc"):
            first = memory.allocate(block, int(uniform(machine, ins.operands[1], "u32", one)[0]))
            thread = np.array([32 * warp])
            address = addresses(machine, ins.operands[0])[thread]
            machine.store_shared(thread, address, np.array([[first]], np.uint32))
        elif ins.has("dealloc"):
            address, columns = (int(uniform(machine, operand, "u32", one)[0]) for operand in ins.operands[:2])
            memory.deallocate(block, address, columns)
        else:
            memory.relinquished[block] = True


def wait(machine: Machine, ins: Instruction, active: Array) -> None:
    machine.tensor_memory.wait("ld" if ins.has("ld") else "st", np.flatnonzero(active.reshape(-1, 32).any(1)))


def _split(machine: Machine, operand: Operand) -> tuple[Array, Array]:
    """Lane and column of an address in tensor memory, of all threads."""
    address = addresses(machine, operand)
    return address >> 16 & 0xFFFF, address & 0xFFFF


def transfer(machine: Machine, ins: Instruction, active: Array) -> None:
    """ld or st, register i being the i-th column. 32x32b: thread l of warp w has lane 32 (w % 4) + l; 16x32bx2: the
    upper 16 threads have the lanes of the lower ones, so many columns further as the immediate says."""
    load = ins.modifiers[0] == "ld"
    registers, place = ins.operands[:2] if load else (ins.operands[-1], ins.operands[0])
    targets, count = items(registers), int(next(m for m in ins.modifiers if m in COUNTS)[1:])
    if len(targets) != count or not isinstance(registers, Vector):
        raise ValueError(f"{count} columns with {len(targets)} registers")
    warps, split = np.flatnonzero(active.reshape(-1, 32).any(1)), ins.has("16x32bx2")
    lane, column = (part.reshape(-1, 32)[warps] for part in _split(machine, place))
    if (lane != lane[:, :1]).any() or (column != column[:, :1]).any():
        raise RuntimeError("lanes of a warp disagree about an address in tensor memory")
    inside = lane[:, 0] - 32 * (machine.specials["warpid"][::32][warps] % 4)
    if not np.isin(inside, (0, 16) if split else (0,)).all():
        raise RuntimeError(f"warps reach for lanes from {sorted(set(lane[:, 0].tolist()))}: each has 32 of its own")
    within = np.arange(32) % 16 if split else np.arange(32)
    shift = np.arange(32) // 16 * _number(ins.operands[2 if load else 1]) if split else np.zeros(32, np.int64)
    region = machine.tensor_memory.region(
        warps, (lane + within)[:, :, None], (column + shift)[:, :, None] + np.arange(count)
    )
    if load:
        values = np.zeros((machine.threads // 32, 32, count), np.uint32)
        values[warps] = machine.tensor_memory.load(warps, region)
        for index, target in enumerate(targets):
            machine.write(target, values[:, :, index].reshape(-1), "b32", active)
    else:
        bits = np.stack([machine.read(source, "b32").reshape(-1, 32)[warps] for source in targets], axis=2)
        machine.tensor_memory.store(warps, region, bits)


def _number(operand: Operand) -> int:
    if not isinstance(operand, Immediate):
        raise NotImplementedError(f"tcgen05 with the immediate {operand}")
    return int(operand.text, 0)


def mma(machine: Machine, ins: Instruction, active: Array) -> None:
    """D = A B + D, or A B where the predicate is false; summed in float64 and rounded once. Each thread issues one."""
    kind = ins.modifiers[-1]
    if kind not in KINDS:
        raise NotImplementedError(f"tcgen05.mma of {kind}")
    threads = np.flatnonzero(active)
    shapes = machine.read(ins.operands[3], "u32")
    # Threads of one block one after the other (a kernel elects one), those of one shape together.
    rank = np.array([int((machine.block[threads[:i]] == machine.block[t]).sum()) for i, t in enumerate(threads)])
    for each, bits in sorted(set(zip(rank.tolist(), shapes[threads].tolist(), strict=True))):
        chosen = threads[(rank == each) & (shapes[threads] == bits)]
        _multiply(machine, ins, chosen, Shape.decode(bits, kind))


def _multiply(machine: Machine, ins: Instruction, threads: Array, shape: Shape) -> None:
    target, left, right = ins.operands[:3]
    disabled, enable, *scale = ins.operands[4:] if isinstance(ins.operands[4], Vector) else (None, *ins.operands[4:])
    memory, warps, block = machine.tensor_memory, threads // 32, machine.block[threads][:, None, None]
    lane, column = (part[threads] for part in _split(machine, target))
    rows = shape.lanes(lane)[:, :, None]
    result = memory.checked(Region(block, rows, column[:, None, None] + np.arange(shape.n)))

    places: list[Array] = []  # of operands in shared memory
    if isinstance(left, Address):
        lane, column = (part[threads] for part in _split(machine, left))
        if shape.transposed[0]:
            raise ValueError("A in tensor memory cannot be transposed")
        a_rows = shape.lanes(lane)[:, :, None]
        if (a_rows != rows).any():
            raise ValueError("A and D are in different lanes")
        place: Region | None = memory.checked(Region(block, a_rows, column[:, None, None] + np.arange(DEPTH // 4)))
        assert place is not None
        a = values_of(np.ascontiguousarray(memory.read_left(place)), shape.types[0])
    else:
        place = None
        a = _operand(machine, left, threads, shape.m, shape.types[0], shape.transposed[0], places)
    b = _operand(machine, right, threads, shape.n, shape.types[1], shape.transposed[1], places)
    chunks, clock = machine.proxies.read(warps, np.concatenate(places, axis=1))

    before = memory.accumulator(result, shape.number)
    product = shape.signs * (a.astype(np.float64) @ b.astype(np.float64).swapaxes(1, 2))
    keep = machine.read(enable, "pred")[threads][:, None, None]
    factor = 2.0 ** -_number(scale[0]) if scale else 1.0
    values = (product + np.where(keep, before * factor, 0)).astype(np.float32)
    if disabled is not None:  # bit l of the four words: lane l keeps what it has
        words = np.stack([machine.read(word, "u32")[threads] for word in items(disabled)], axis=1)
        off = np.take_along_axis(words, rows[:, :, 0] // 32, axis=1) >> (rows[:, :, 0] % 32).astype(np.uint32) & 1
        values = np.where(off[:, :, None] != 0, before, values)
    for i, thread in enumerate(threads):
        one = slice(i, i + 1)
        used = None if place is None else place.part(one)
        memory.issue(Product(int(thread), result.part(one), used, chunks[i], clock), values[one], shape.number)


def _operand(
    machine: Machine, operand: Operand, threads: Array, length: int, type: str, transposed: bool, places: list[Array]
) -> Array:
    bits = machine.read(operand, "b64")[threads]
    matrices, offsets = load(machine, bits, threads // 32, length, type, transposed=transposed, version=1)
    places.append(offsets)
    return matrices


def commit(machine: Machine, ins: Instruction, active: Array) -> None:
    """The mbarrier gets one arrival when all products that the thread has issued are complete."""
    address = addresses(machine, Address(ins.operands[0].base, ins.operands[0].offset))  # type: ignore[union-attr]
    for thread in np.flatnonzero(active):
        machine.phases.track(int(thread), int(address[thread]), machine.tensor_memory.tickets(int(thread)))
