"""mbarrier objects: what tcgen05.commit arrives at and what threads poll.

An object is in a phase until as many arrivals as it expects have come; the parity of the phase tells neighbours apart.
What arrives here are products, and nobody is told when: an arrival is held back until a thread polls for the phase that
it completes, so that whoever does not wait for it touches tensor memory or operands that are still in use. Errors:

- an object that is used before its init or behind its inval, or initialised twice;
- an ordinary store into an object;
- an object that ends with arrivals under way.

A thread whose poll has failed and which branches back gives way to the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ptxsim.values import Array

if TYPE_CHECKING:
    from ptxsim.machine import Machine

SIZE = 8  # bytes of an object
PATIENCE = 0.5  # how often, under a random schedule, a poll fails that could succeed: callers must look at the answer


@dataclass
class Phase:
    expected: int
    pending: int
    parity: int = 0  # of the phase under way
    arriving: list[Array] = field(default_factory=list)  # tickets of products, one array for each arrival held back


class Phases:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.objects: dict[tuple[int, int], Phase] = {}  # (block, address)
        self.occupied = np.zeros(machine.shared.bytes.size // SIZE, bool)
        self.failed = np.zeros(
            machine.threads, bool
        )  # the last poll of the thread failed, and it has not branched since
        self.waiting = np.zeros(machine.threads, bool)  # has branched back to poll again
        self.hopeless = False  # all wait, and nothing has happened since they were asked the last time

    def _places(self, threads: Array, addresses: Array) -> list[tuple[int, int]]:
        return list(zip(self.machine.block[threads].tolist(), addresses.tolist(), strict=True))

    def _object(self, place: tuple[int, int]) -> Phase:
        if place not in self.objects:
            raise RuntimeError(f"no mbarrier was initialised at shared address {place[1]}")
        return self.objects[place]

    def _occupy(self, threads: Array, addresses: Array, occupied: bool) -> None:
        offsets = self.machine.shared.offsets(self.machine.block[threads], addresses, SIZE)
        self.occupied[offsets // SIZE] = occupied

    def init(self, threads: Array, addresses: Array, counts: Array) -> None:
        self._occupy(threads, addresses, True)
        for place, count in zip(self._places(threads, addresses), counts.tolist(), strict=True):
            if place in self.objects:
                raise RuntimeError(f"the mbarrier at shared address {place[1]} is initialised twice")
            if not count:
                raise ValueError("an mbarrier that expects no arrivals")
            self.objects[place] = Phase(count, count)

    def invalidate(self, threads: Array, addresses: Array) -> None:
        self._occupy(threads, addresses, False)
        for place in self._places(threads, addresses):
            if self._object(place).arriving:
                raise RuntimeError(f"the mbarrier at shared address {place[1]} ends while products will arrive at it")
            del self.objects[place]

    def wrote(self, offsets: Array, size: int) -> None:
        """An ordinary store of ``size`` bytes at ``offsets`` in the bytes of all blocks."""
        if self.objects and any(
            self.occupied[(offsets + part) // SIZE].any() for part in range(0, max(size, SIZE), SIZE)
        ):
            raise RuntimeError("a store into an mbarrier")

    def track(self, thread: int, address: int, tickets: Array) -> None:
        """Let the products with ``tickets`` arrive once at an object when all of them are complete."""
        ((place),) = self._places(np.array([thread]), np.array([address]))
        self._object(place).arriving.append(tickets)
        self.progress()

    def poll(self, active: Array, addresses: Array, parities: Array) -> Array:
        """For each active thread whether the phase of the parity is complete (try_wait.parity, test_wait.parity)."""
        threads, random = np.flatnonzero(active), self.machine.random
        result = np.zeros(self.machine.threads, bool)
        impatient = random is not None and random.random() < PATIENCE
        for place, thread in zip(self._places(threads, addresses[threads]), threads, strict=True):
            phase, parity = self._object(place), int(parities[thread]) & 1
            while phase.parity == parity and phase.arriving and not impatient:
                self._arrive(phase)
            result[thread] = phase.parity != parity
        self.failed[active] = ~result[active] & (not impatient)
        return result

    def _arrive(self, phase: Phase) -> None:
        self.machine.tensor_memory.complete(phase.arriving.pop(0))
        phase.pending -= 1
        if not phase.pending:
            phase.pending, phase.parity = phase.expected, 1 - phase.parity
        self.progress()

    def progress(self) -> None:
        """Those who wait may find something new."""
        self.waiting[:] = False
        self.hopeless = False

    def branched(self, back: Array, active: Array) -> None:
        """Of the ``active`` threads, ``back`` branch to an earlier instruction."""
        self.waiting |= back & self.failed
        self.failed[active] = False

    def ask_again(self) -> bool:
        """Nobody else can go on: whether those who wait should poll once more."""
        if self.hopeless or not self.waiting.any():
            return False
        self.waiting[:] = False
        self.hopeless = True
        return True
