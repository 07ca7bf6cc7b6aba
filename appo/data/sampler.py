"""The order of training records: a seeded shuffle per epoch, split over processes, that can go on where it stopped."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from appo.data.records import Record


class RecordSampler:
    """Endless records of one process, each with its position in the order of all processes together.

    The order depends on the seed alone: not on how many are taken at a time, nor on the number of processes. Process r
    of W takes the positions r, r + W, r + 2 W, ... A state may be loaded by any number of processes: records that
    were passed over because processes had taken unequally many (with dynamic sampling) then come first.
    """

    def __init__(self, records: Sequence[Record], *, seed: int, rank: int = 0, world: int = 1) -> None:
        if len(records) < world:
            raise ValueError(f"`dataset`: expected at least one record per process ({world}), got {len(records)}.")
        self.records, self.seed, self.rank, self.world = records, seed, rank, world
        self.taken = 0
        self._left: list[int] = []  # positions that come before those from _start on
        self._start = 0
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def take(self, count: int) -> list[tuple[int, Record]]:
        """The next positions and their records."""
        found = self.peek(count)
        self.taken += count
        return found

    def peek(self, count: int) -> list[tuple[int, Record]]:
        """The records that ``take`` would give next."""
        return [(place, self._record(place)) for place in map(self._place, range(self.taken, self.taken + count))]

    def state_dict(self) -> dict[str, Any]:
        """This process's part of the state of a run; `load_state_dict` takes those of all processes."""
        return {"taken": self.taken, "left": self._left, "start": self._start}

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the states of all processes, in their order; from the beginning where there are none."""
        self.taken, self._left, self._start = 0, [], 0
        if not states:
            return
        self._left, self._start = states[0]["left"], states[0]["start"]
        if len(states) == self.world:
            self.taken = states[self.rank]["taken"]
            return
        world, rounds = len(states), max(state["taken"] for state in states)
        passed = [
            self._place_of(number * world + rank)
            for number in range(rounds)
            for rank, state in enumerate(states)
            if number >= state["taken"]
        ]
        total = rounds * world
        self._left, self._start = passed + self._left[total:], self._start + max(0, total - len(self._left))

    def _place(self, number: int) -> int:
        return self._place_of(number * self.world + self.rank)

    def _place_of(self, index: int) -> int:
        return self._left[index] if index < len(self._left) else self._start + index - len(self._left)

    def _record(self, place: int) -> Record:
        epoch, within = divmod(place, len(self.records))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.records))
        return self.records[int(self._order[within])]
