"""The order of training records: a seeded shuffle per epoch, split over processes, that can go on where it stopped."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from appo.data.records import Record


class RecordSampler:
    """Endless records of one process. The order depends on the seed alone, not on how many were taken at a time."""

    def __init__(self, records: Sequence[Record], *, seed: int, rank: int = 0, world: int = 1) -> None:
        if len(records) < world:
            raise ValueError(f"`dataset`: expected at least one record per process ({world}), got {len(records)}.")
        self.records, self.seed, self.rank, self.world = records, seed, rank, world
        self.taken = 0

    def take(self, count: int) -> list[Record]:
        found = self.peek(count)
        self.taken += count
        return found

    def peek(self, count: int) -> list[Record]:
        """The records that ``take`` would give next."""
        return [self._at(self.taken + i) for i in range(count)]

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self.taken = state["taken"] if state else 0

    def _at(self, index: int) -> Record:
        # Every epoch has the same number for each process; the rest of a shuffle that does not divide is left out.
        share = len(self.records) // self.world
        epoch, place = divmod(index, share)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.records))
        return self.records[order[place * self.world + self.rank]]
