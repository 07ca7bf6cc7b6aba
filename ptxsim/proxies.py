"""The two proxies of shared memory: ordinary instructions write through one, the tensor cores read through the other.

What st or cp.async wrote is seen by a product (wgmma, tcgen05.mma) only behind a fence.proxy.async: of the writer
before the barrier that both pass, or of a reader behind it. Reading without one is an error here, and so is writing
what a product in flight reads. Events are ordered by a clock that ticks with every write, fence and barrier.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptxsim.parser import Program
from ptxsim.values import Array

if TYPE_CHECKING:
    from ptxsim.machine import Machine

CHUNK = 16  # bytes: what a matrix descriptor can address


class Proxies:
    """Per chunk of shared memory when it was last written, and by which warp; per warp what its fences cover."""

    def __init__(self, machine: Machine) -> None:
        warps = machine.threads // 32
        self.clock = 0
        self.block = machine.block[::32]  # of each warp
        self.tracked = has_products(machine.program)
        chunks = machine.shared.bytes.size // CHUNK if self.tracked else 0
        self.write_clock, self.writer = np.zeros(chunks, np.int64), np.zeros(chunks, np.int64)
        # Up to when writes are seen through the async proxy: by the warp's own fence those of its own, those before its
        # last barrier, and what fences before a barrier covered.
        self.own, self.shared_own, self.cover, self.barrier_clock = np.zeros((4, warps), np.int64)

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def wrote(self, threads: Array, offsets: Array, size: int) -> None:
        """``threads`` wrote ``size`` bytes at each of ``offsets`` in the bytes of all blocks."""
        if not self.tracked:
            return
        now = self.tick()
        for part in range(0, max(size, CHUNK), CHUNK):
            chunk = (offsets + part) // CHUNK
            self.write_clock[chunk], self.writer[chunk] = now, threads // 32

    def fence(self, active: Array) -> None:
        warps, now = active.reshape(-1, 32).any(1), self.tick()
        self.own[warps] = now
        self.cover[warps] = np.maximum(self.cover[warps], self.barrier_clock[warps])

    def barrier(self, threads: Array) -> None:
        """``threads`` (a mask) go on from a barrier of their block: what each warp fenced is fenced for all."""
        if not self.tracked:
            return
        warps, now = threads.reshape(-1, 32).any(1), self.tick()
        for block in np.unique(self.block[warps]):
            here = warps & (self.block == block)
            self.shared_own[here], self.barrier_clock[here] = self.own[here], now
            self.cover[here] = self.cover[here].max()

    def read(self, warps: Array, offsets: Array) -> tuple[Array, int]:
        """Products of ``warps`` read the 16-byte chunks at (warps, chunks) offsets: their numbers, and the clock."""
        chunks = offsets // CHUNK
        time, writer = self.write_clock[chunks], self.writer[chunks]
        seen = (time <= self.cover[warps, None]) | (time <= self.shared_own[writer])
        seen |= (writer == warps[:, None]) & (time <= self.own[warps, None])
        if not seen.all():
            raise RuntimeError("shared memory written by the generic proxy is read without a fence.proxy.async")
        return chunks, self.tick()

    def check_unwritten(self, chunks: Array, since: int) -> None:
        """At the completion of products that read ``chunks`` at the clock ``since``."""
        if (self.write_clock[chunks] > since).any():
            raise RuntimeError("shared memory was written while a product in flight reads it")


def has_products(program: Program) -> bool:
    """Whether ``program`` has products that read shared memory through the async proxy."""
    return any(ins.opcode in ("wgmma", "tcgen05") and ins.has("mma_async", "mma") for ins in program.instructions)
