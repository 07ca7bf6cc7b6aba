"""Frames and bounds of rows for the tests of the block mask."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

Bounds = tuple[Tensor | None, Tensor | None, Tensor | None]


class Example(NamedTuple):
    name: str  # of its bounds
    frame_ids: Tensor  # (B, S) int32
    frames: int
    rows: int
    given: Bounds

    @property
    def keys(self) -> int:
        return self.frame_ids.shape[1]

    def visible(self) -> Tensor:
        """(B, R, S) bool, by the rule of docs/method.md."""
        (B, S), key = self.frame_ids.shape, torch.arange(self.keys)
        first, last, prefix = (
            torch.full((B, self.rows), default) if bound is None else bound.long()
            for bound, default in zip(self.given, (0, S - 1, 0), strict=True)
        )
        return ((key >= first[..., None]) & (key <= last[..., None])) | (key < prefix[..., None])


FRAMES = {
    "none": lambda F, S, draw: torch.full((S,), -1),
    "one": lambda F, S, draw: torch.zeros(S),
    "runs": lambda F, S, draw: draw(-1, F, S).sort().values,
    "scattered": lambda F, S, draw: draw(-1, F, S),
    "unequal": lambda F, S, draw: draw(-1, F, S).clamp(max=1),  # frames without a key, and small ones beside large
}
# Every default and every given bound; rows that see nothing, negative starts, whole prefixes, the ends of int32.
BOUNDS = {
    "all": lambda S, R, draw: (None, None, None),
    "causal": lambda S, R, draw: (None, (torch.arange(R) + max(0, S - R)).clamp(max=S - 1), None),
    "window": lambda S, R, draw: (torch.arange(R) - 5, torch.arange(R).clamp(max=S - 1), None),
    "group": lambda S, R, draw: (draw(0, S, 2, R), draw(-1, S - 1, 2, R), torch.full((2, R), S // 2)),
    "random": lambda S, R, draw: (draw(-3, S + 3, 2, R), draw(-3, S - 1, 2, R), draw(0, S, 2, R)),
    "nothing": lambda S, R, draw: (torch.full((2, R), 2**31 - 1), torch.full((2, R), -(2**31)), torch.zeros(2, R)),
    "first alone": lambda S, R, draw: (draw(-(2**31), S + 1, 2, R), None, None),
    "prefix alone": lambda S, R, draw: (torch.full((2, R), S), torch.full((2, R), -1), draw(0, S, 2, R)),
}  # fmt: skip


def examples() -> list[Example]:
    """All frames with all bounds, sizes in turn: below, at and beyond multiples of the tiles."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    found, sizes = [], itertools.cycle([(37, 9), (64, 33), (8, 4), (71, 17), (1, 1), (50, 20), (40, 16)])
    for number, frames in enumerate(FRAMES.values()):
        for (name, bounds), (keys, rows) in zip(BOUNDS.items(), sizes, strict=False):
            F = (1, 3, 6)[(number + keys) % 3]
            ids = torch.stack([frames(F - 1, keys, draw) for _ in range(2)]).int()
            first, last, prefix = (None if b is None else b.expand(2, rows).int() for b in bounds(keys, rows, draw))
            found.append(Example(name, ids, F, rows, (first, last, prefix)))
    return found


def long() -> Example:
    """More keys, frames and rows than a block of the kernels: frames of one key, a multiple of a block's, and large
    ones. The last keys, of no frame, are seen by no row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((2, 1300), -1)
    ids[0, :1024], ids[0, 1024:1260] = torch.arange(1024).flip(0), 7
    ids[1, :1290] = torch.randint(-1, 1024, (1290,), generator=generator).sort(descending=True).values
    last = torch.randint(0, 1295, (2, 530), generator=generator).int()
    return Example("long", ids.int(), 1024, 530, (None, last, None))
