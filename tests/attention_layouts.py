"""Where frames and visible keys lie in the tests of attention: the layouts that kernels get wrong first."""

from dataclasses import dataclass

import torch
from torch import Tensor

from appo_kernels.attention import arguments

FRAMES = 6
LAYOUTS = ("equal", "unequal", "interleaved", "shuffled", "scattered", "none")
VISIBILITIES = ("all", "causal", "left padding", "packed", "shared prefix", "blind rows")


def frames(layout: str, batch: int, keys: int) -> Tensor:
    """(B, S) frame ids below FRAMES; frame 2 has no key in "unequal" and "scattered"."""
    generator = torch.Generator().manual_seed(len(layout))
    ids = torch.full((batch, keys), -1)
    if layout == "equal":  # as Qwen2.5-VL: one run, text around it
        length = (keys - 4) // FRAMES
        ids[:, 2 : 2 + FRAMES * length] = torch.arange(FRAMES).repeat_interleave(length)
    elif layout == "unequal":  # another start in each sequence
        for b in range(batch):
            lengths = [3, 1, 0, 17, 2, 9]
            run = torch.repeat_interleave(torch.arange(FRAMES), torch.tensor(lengths))[: keys - b]
            ids[b, b : b + len(run)] = run
    elif layout == "interleaved":  # as Qwen3-VL: timestamps between frames
        place = torch.arange(keys)
        ids[:] = torch.where(place % 9 < 6, place // 9, -1)
        ids[ids >= FRAMES] = -1
    elif layout == "shuffled":  # frame numbers not in key order, no text at all
        ids[:] = torch.randperm(FRAMES, generator=generator).repeat_interleave(-(-keys // FRAMES))[:keys]
    elif layout == "scattered":
        ids = torch.randint(-1, FRAMES, (batch, keys), generator=generator)
        ids[ids == 2] = -1
    return ids


def bounds(kind: str, batch: int, rows: int, keys: int) -> dict[str, Tensor]:
    """Visibility of the last ``rows`` positions (of all keys, repeated, where there are more rows than keys)."""
    generator = torch.Generator().manual_seed(len(kind))
    place = (torch.arange(rows) + max(0, keys - rows)).clamp(max=keys - 1).expand(batch, -1)
    if kind == "all":
        return {}
    if kind == "causal":
        return {"last_key": place}
    if kind == "left padding":
        padding = torch.arange(batch)[:, None] * 5 - 3  # negative: starts before the sequence, as a window does
        return {"first_key": padding.expand_as(place), "last_key": place}
    if kind == "packed":
        return {"first_key": place // 7 * 7, "last_key": place}
    if kind == "shared prefix":  # responses behind one prompt; some intervals overlap it
        prefix = torch.randint(0, keys + 1, (batch, rows), generator=generator)
        return {"first_key": place // 7 * 7, "last_key": place, "prefix_keys": prefix}
    first = torch.randint(0, keys, (batch, rows), generator=generator)
    last = torch.randint(-1, keys, (batch, rows), generator=generator)
    last[:, ::3] = -1  # every third row sees nothing, and others where first > last
    return {"first_key": first, "last_key": last}


@dataclass(frozen=True)
class LayoutCase:
    frame_ids: torch.Tensor  # (B, S) int32
    num_frames: int
    first_key: torch.Tensor | None  # (B, R) int32
    last_key: torch.Tensor | None
    prefix_keys: torch.Tensor | None
    rows: int

    @property
    def bounds(self):
        return self.first_key, self.last_key, self.prefix_keys

    def operands(self, scale: float, weights: torch.Tensor | None = None) -> arguments.AttentionLayout:
        """As backends take it."""
        return arguments.AttentionLayout(self.frame_ids, *self.bounds, weights, scale)


def runs(keys: int, *spans: tuple[int, int, int]) -> torch.Tensor:
    """(keys,) ids: -1 but for (frame, start, length) spans."""
    ids = torch.full((keys,), -1, dtype=torch.int32)
    for frame, start, length in spans:
        ids[start : start + length] = frame
    return ids


def ints(*rows: list[int] | torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.as_tensor(row) for row in rows]).int()


def hostile() -> LayoutCase:
    """Two sequences with different layouts, 41 rows.

    First: a frame of exactly one tile, one that leaves a remainder, one split in two by text, three small ones that
    share a tile, one with no key; left padding; causal rows at the end, the last of them empty (first > last).
    Second: interleaved and single-key frames; rows that see a shared prefix and a window of their own.
    """
    S, R = 203, 41
    first = runs(S, (0, 15, 64), (1, 80, 33), (1, 120, 20), (2, 113, 5), (4, 145, 3), (5, 150, 9))
    second = runs(S, (3, 0, 1), (0, 199, 4))
    second[10:130] = torch.arange(120, dtype=torch.int32) % 3
    rows = torch.arange(R)
    causal = rows + S - R
    first_key = ints(torch.full((R,), 9), 150 + rows // 2)
    last_key = ints(causal.clone(), causal)
    first_key[0, -1], last_key[0, -1] = 5, 4
    last_key[0, 0] = 12  # sees keys, but none of a frame
    prefix = ints(torch.zeros(R), torch.full((R,), 77))
    prefix[1, 5], first_key[1, 5], last_key[1, 5] = 0, 1, 0
    prefix[1, 6], first_key[1, 6], last_key[1, 6] = 160, 140, 202  # prefix and interval overlap
    return LayoutCase(torch.stack([first, second]), 6, first_key, last_key, prefix, R)


def everything_visible() -> LayoutCase:
    """No bounds at all: rows see every key, and there is a frame for every key."""
    S = 130
    return LayoutCase(runs(S, (0, 0, 70), (1, 70, 60))[None], 2, None, None, None, 19)
