"""cp.async: copies from global to shared memory that land when the issuing thread waits for them, and not before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptxsim.values import Array

if TYPE_CHECKING:
    from ptxsim.machine import Machine


@dataclass
class _Copy:
    thread: Array
    group: Array  # the commit group of each thread that it belongs to
    destination: Array  # shared address
    data: Array  # (threads, bytes)


class Copies:
    """The copies in flight. A destination holds 0xff bytes from the issue until the copy lands."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.pending: list[_Copy] = []
        self.group = np.zeros(machine.threads, np.int64)  # groups committed so far, per thread

    def issue(self, thread: Array, destination: Array, source: Array, sizes: Array, bytes: int) -> None:
        """Copy ``sizes`` (0 to ``bytes``) from ``source`` and fill up with zeros."""
        data = np.zeros((thread.size, bytes), np.uint8)
        for size in np.unique(sizes[sizes > 0]):
            lanes = sizes == size
            if size != bytes:
                raise NotImplementedError(f"a cp.async of {bytes} bytes that reads {size}")
            data[lanes] = self.machine.memory.load(source[lanes], 4, bytes // 4).view(np.uint8)
        poison = np.full((thread.size, bytes // 4), 0xFFFFFFFF, np.uint32)
        self.machine.store_shared(thread, destination, poison)
        self.pending.append(_Copy(thread, self.group[thread], destination, data))

    def commit(self, active: Array) -> None:
        self.group[active] += 1

    def wait(self, active: Array, newest: int | None) -> None:
        """Land all groups of the active threads but the ``newest`` ones; None: everything, committed or not."""
        remaining = []
        for copy in self.pending:
            lands = active[copy.thread]
            if newest is not None:
                lands = lands & (copy.group < self.group[copy.thread] - newest)
            if lands.any():
                thread = copy.thread[lands]
                words = np.ascontiguousarray(copy.data[lands]).view(np.uint32)
                self.machine.store_shared(thread, copy.destination[lands], words)
            if not lands.all():
                rest = ~lands
                remaining.append(_Copy(copy.thread[rest], copy.group[rest], copy.destination[rest], copy.data[rest]))
        self.pending = remaining
