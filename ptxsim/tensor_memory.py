"""Tensor memory of sm_100: 128 lanes of 512 columns of 32 bits a block, and the operations in flight on it.

Results are written when an instruction is issued and may not be touched before what the ISA has to tell of their
completion has told it: tcgen05.wait of the warp for its loads and stores, the phase of an mbarrier that tcgen05.commit
arrives at for products. Errors, never guesses:

- a column that is not allocated, more columns than there are, tcgen05.alloc behind relinquish_alloc_permit, a
  deallocation of something else than was allocated, a block that ends without one;
- a warp that reaches for lanes of another;
- a load, a store or a product that reads what a store or a product in flight writes, or writes what one in flight reads
  or writes, but for a product that adds to the result of one of its own shape (they run in order);
- an operand in shared memory that was not fenced, or was written while in flight (``ptxsim.proxies``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptxsim.values import Array

if TYPE_CHECKING:
    from ptxsim.machine import Machine

LANES, COLUMNS, UNIT = 128, 512, 32  # UNIT: columns of the smallest allocation


@dataclass(frozen=True)
class Region:
    """Cells in each of some blocks: (blocks, lanes, columns) indices that broadcast together."""

    block: Array
    lane: Array
    column: Array

    @property
    def index(self) -> tuple[Array, Array, Array]:
        return self.block, self.lane, self.column

    def part(self, chosen: Array) -> Region:
        return Region(self.block[chosen], self.lane[chosen], self.column[chosen])


@dataclass
class _Transfer:
    """Loads or stores that their warps have not waited for."""

    warps: Array
    region: Region  # first axis: the warps


@dataclass
class Product:
    thread: int  # that issued it
    result: Region
    left: Region | None  # A, where it is in tensor memory
    chunks: Array  # of shared memory
    clock: int


class TensorMemory:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        used = any(ins.opcode == "tcgen05" for ins in machine.program.instructions)
        shape = (machine.blocks if used else 0, LANES, COLUMNS)
        self.cells = np.full(shape, 0xFFFFFFFF, np.uint32)
        self.owner = np.full((machine.blocks, COLUMNS), -1)  # first column of the allocation that a column belongs to
        self.sizes: dict[tuple[int, int], int] = {}  # (block, first column) -> columns
        self.relinquished = np.zeros(machine.blocks, bool)
        # Uses in flight: stores and products that write a cell, loads and products that read one.
        self.stored, self.loading, self.reading = (np.zeros(shape, np.int16) for _ in range(3))
        self.shape = np.zeros(shape, np.int32)  # of the products that write a cell, M N; 0: none
        self.writing = np.zeros(shape, np.int16)  # how many products
        self.transfers: dict[str, list[_Transfer]] = {"ld": [], "st": []}
        self.products: dict[int, Product] = {}  # by ticket
        self.issued = 0

    # -- allocation ----------------------------------------------------------------------------------------------------

    def allocate(self, block: int, columns: int) -> int:
        """The address of the highest columns that are free: a kernel that takes its memory to start at 0 is seen."""
        if columns not in (32, 64, 128, 256, 512):
            raise ValueError(f"tcgen05.alloc of {columns} columns: expected a power of two from 32 to 512")
        if self.relinquished[block]:
            raise RuntimeError("tcgen05.alloc behind tcgen05.relinquish_alloc_permit")
        for first in range(COLUMNS - columns, -1, -UNIT):
            if (self.owner[block, first : first + columns] < 0).all():
                self.owner[block, first : first + columns] = first
                self.sizes[block, first] = columns
                return first
        raise RuntimeError(f"tcgen05.alloc of {columns} columns would wait for ever: the block holds the others itself")

    def deallocate(self, block: int, address: int, columns: int) -> None:
        if self.sizes.get((block, address)) != columns:
            raise RuntimeError(
                f"tcgen05.dealloc of {columns} columns at {address:#x}, which were not allocated together"
            )
        place = Region(np.array(block), np.arange(LANES)[:, None], np.arange(address, address + columns))
        self._check_idle(place, "deallocated")
        self.owner[block, address : address + columns] = -1
        self.cells[place.index] = 0xFFFFFFFF
        del self.sizes[block, address]

    def finish(self) -> None:
        """The kernel has ended."""
        name = self.machine.program.name
        if self.sizes:
            raise RuntimeError(f"{name} ends without tcgen05.dealloc of its tensor memory")
        if self.products:
            raise RuntimeError(f"{name} ends with products in flight")

    # -- loads and stores ----------------------------------------------------------------------------------------------

    def region(self, warps: Array, lane: Array, column: Array) -> Region:
        """Cells by warp: lane and column are (warps, lanes, columns), or broadcast to it."""
        block = self.machine.proxies.block[warps][:, None, None]
        return self.checked(Region(*np.broadcast_arrays(block, lane, column)))

    def checked(self, region: Region) -> Region:
        beyond = (region.lane >= LANES) | (region.column >= COLUMNS) | (region.lane < 0) | (region.column < 0)
        if beyond.any():
            raise IndexError(f"tensor memory out of bounds: lane {region.lane.max()}, column {region.column.max()}")
        owner = self.owner[region.block, region.column]
        if (owner < 0).any():
            raise IndexError(f"column {int(region.column[owner < 0][0])} of tensor memory, which is not allocated")
        return region

    def load(self, warps: Array, region: Region) -> Array:
        self._check_written(region)
        for transfer in self._by_warpgroup(warps, region):
            self.loading[transfer.region.index] += 1
            self.transfers["ld"].append(transfer)
        cells: Array = self.cells[region.index]
        return cells

    def store(self, warps: Array, region: Region, values: Array) -> None:
        self._check_idle(region, "stored to")
        self.cells[region.index] = values
        for transfer in self._by_warpgroup(warps, region):
            self.stored[transfer.region.index] += 1
            self.transfers["st"].append(transfer)

    def _by_warpgroup(self, warps: Array, region: Region) -> list[_Transfer]:
        """Warps of one warpgroup have cells of their own, those of two may use the same."""
        group = self.machine.specials["warpid"][::32][warps] // 4
        return [_Transfer(warps[group == each], region.part(group == each)) for each in np.unique(group)]

    def wait(self, kind: str, warps: Array) -> None:
        """tcgen05.wait::ld or ::st of ``warps``."""
        counts = self.loading if kind == "ld" else self.stored
        remaining = []
        for transfer in self.transfers[kind]:
            here = np.isin(transfer.warps, warps)
            if here.any():
                counts[transfer.region.part(here).index] -= 1
            if not here.all():
                remaining.append(_Transfer(transfer.warps[~here], transfer.region.part(~here)))
        self.transfers[kind] = remaining

    # -- products ------------------------------------------------------------------------------------------------------

    def read_left(self, region: Region) -> Array:
        """A of a product."""
        self._check_written(region)
        cells: Array = self.cells[region.index]
        return cells

    def accumulator(self, region: Region, shape: int) -> Array:
        """The result of a product as it was before, float32; those of the same shape in flight come first."""
        self._check_transfers(region, "added to")
        if self.reading[region.index].any():
            raise RuntimeError("tensor memory that a product in flight reads is written by another")
        other = self.shape[region.index]
        if ((other != 0) & (other != shape)).any() or (other.any() and not other.all()):
            raise RuntimeError("a product writes where one of another shape is in flight")
        cells: Array = self.cells[region.index]
        return cells.view(np.float32)

    def issue(self, product: Product, values: Array, shape: int) -> None:
        self.cells[product.result.index] = values.view(np.uint32)
        self.shape[product.result.index] = shape
        self.writing[product.result.index] += 1
        if product.left is not None:
            self.reading[product.left.index] += 1
        self.issued += 1
        self.products[self.issued] = product

    def tickets(self, thread: int) -> Array:
        """Products of ``thread`` that are not complete."""
        return np.array([ticket for ticket, product in self.products.items() if product.thread == thread], np.int64)

    def complete(self, tickets: Array) -> None:
        for ticket in tickets.tolist():
            product = self.products.pop(ticket, None)
            if product is None:  # told by another mbarrier before
                continue
            self.machine.proxies.check_unwritten(product.chunks, product.clock)
            place = product.result.index
            self.writing[place] -= 1
            self.shape[place] = np.where(self.writing[place] > 0, self.shape[place], 0)
            if product.left is not None:
                self.reading[product.left.index] -= 1

    # -- what is in flight ---------------------------------------------------------------------------------------------

    def _check_written(self, region: Region) -> None:
        if self.stored[region.index].any():
            raise RuntimeError("tensor memory is read before the tcgen05.wait::st of what stores to it")
        if self.writing[region.index].any():
            raise RuntimeError("tensor memory is read while a product in flight writes it")

    def _check_transfers(self, region: Region, what: str) -> None:
        if self.stored[region.index].any():
            raise RuntimeError(f"tensor memory is {what} before the tcgen05.wait::st of what stores to it")
        if self.loading[region.index].any():
            raise RuntimeError(f"tensor memory is {what} before the tcgen05.wait::ld of what loads from it")

    def _check_idle(self, region: Region, what: str) -> None:
        self._check_transfers(region, what)
        if self.writing[region.index].any() or self.reading[region.index].any():
            raise RuntimeError(f"tensor memory is {what} while a product in flight uses it")
