"""Tiles of query rows and of keys sorted by frame, for the torch backend.

Shapes: R query rows, S keys, n keys of a tile, F frames.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from appo_kernels.attention.frame_plan import kept


@dataclass(frozen=True)
class Rows:
    """Some query rows of one sequence and the keys they see; each bound (rows,) int32, or None for its default."""

    start: int
    stop: int
    first: Tensor | None
    last: Tensor | None
    prefix: Tensor | None

    def masked(self, tile: "KeyTile") -> bool | Tensor:
        """False: every row sees every key of the tile. True: none sees any. Else (rows, keys of the tile) int32, 1
        where a key is masked: comparisons are several times faster into integers than into bools."""
        if self.first is None and self.last is None:
            return False
        whole: Tensor | bool = True
        apart: Tensor | bool = False
        if self.first is not None:
            whole, apart = self.first <= tile.low, self.first > tile.high
        if self.last is not None:
            whole, apart = (self.last >= tile.high) & whole, (self.last < tile.low) | apart
        if self.prefix is not None:
            whole, apart = whole | (self.prefix > tile.high), apart & (self.prefix <= tile.low)
        if bool(torch.as_tensor(whole).all()):
            return False
        if bool(torch.as_tensor(apart).all()):
            return True
        keys = tile.positions
        masked = torch.zeros(self.stop - self.start, len(keys), dtype=torch.int32, device=keys.device)
        compared = torch.empty_like(masked)
        if self.first is not None:
            masked |= torch.lt(keys, self.first[:, None].int(), out=compared)
        if self.last is not None:
            masked |= torch.gt(keys, self.last[:, None].int(), out=compared)
        if self.prefix is not None:
            masked &= torch.ge(keys, self.prefix[:, None].int(), out=compared)
        return masked


def mask_(scores: Tensor, masked: Tensor) -> None:
    """Makes (..., rows, n) ``scores`` -inf where ``masked``, (rows, n) int32, is 1, whatever stood there, NaN included.

    On the bits, since masked_fill_ with a mask that is broadcast takes ten times as long on a CPU.
    """
    integers = {torch.float32: torch.int32, torch.float64: torch.int64}[scores.dtype]
    minus_infinity = torch.full((), -torch.inf, dtype=scores.dtype, device=scores.device).view(integers)
    bits, masked = scores.view(integers), masked.to(integers)
    bits &= masked - 1
    bits |= masked * minus_infinity


def row_tiles(
    sequence: int,
    rows: int,
    size: int,
    bounds: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Iterator[Rows]:
    """The rows of one sequence in tiles of at most ``size``, as equal as they can be."""
    tiles = -(-rows // size)
    for number in range(tiles):
        start, stop = number * rows // tiles, (number + 1) * rows // tiles
        yield Rows(start, stop, *(None if bound is None else bound[sequence, start:stop] for bound in bounds))


@dataclass(frozen=True)
class KeyTile:
    """Some keys of one sequence, sorted by frame; keys of no frame come last, as frame F."""

    positions: Tensor  # (n,) int32: which keys they are
    frames: Tensor  # (n,) int64: the frame of each
    low: int  # smallest and largest position
    high: int
    ascending: bool  # whether the positions count up by one, so that the keys are a slice
    runs: tuple[tuple[int, int, int, int], ...]  # (frame, count, start, length): `count` frames of `length` keys each

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, rows_SD: Tensor, dtype: torch.dtype) -> Tensor:
        """(n, D): the tile's rows of a (S, D) matrix; a view where it can be."""
        chosen = rows_SD[self.low : self.high + 1] if self.ascending else rows_SD.index_select(0, self.positions)
        return chosen.to(dtype)

    def add_to(self, rows_SD: Tensor, values_nD: Tensor) -> None:
        """Adds (n, D) to the tile's rows of a (S, D) matrix."""
        if self.ascending:
            rows_SD[self.low : self.high + 1] += values_nD
        else:
            rows_SD.index_add_(0, self.positions, values_nD)  # no key is twice in a tile: one addend each

    def add_frame_sums(self, weights: Tensor, sums: Tensor) -> None:
        """Adds the sums of (..., rows, n) ``weights`` over the keys of each frame to (..., rows, F + 1) ``sums``."""
        for frame, count, start, length in self.runs:
            block = weights[..., start : start + count * length].unflatten(-1, (count, length))
            sums[..., frame : frame + count] += block.sum(-1)


def key_tiles(frame_ids: Tensor, num_frames: int, size: int, *, frames_only: bool) -> list[KeyTile]:
    """Cuts the keys of one sequence, (S,) frame ids, into tiles of at most ``size``; only keys of frames if asked to.

    Sorting by frame makes the keys of every frame neighbours, so that a frame's mass is a sum over a slice, whatever
    the layout was: no atomics, and pairwise in fp32. No tile holds keys of no frame from before and from behind a
    video: rows that see all of it or none are spared the mask, or the tile.
    """
    ids = torch.where(frame_ids < 0, num_frames, frame_ids)
    ids, order = torch.sort(ids, stable=True)
    counts = torch.bincount(ids, minlength=num_frames + 1).tolist()
    of_frames = len(ids) - counts[num_frames]
    if frames_only:
        counts = counts[:num_frames]
    total = sum(counts)
    if total == 0:
        return []
    gaps = (order[of_frames:total].diff() > size).nonzero().flatten() + of_frames + 1
    cuts = [0, of_frames, *gaps.tolist(), total]
    starts = [
        first + number * (last - first) // tiles
        for first, last in itertools.pairwise(cuts)
        for tiles in [-(-(last - first) // size)]
        for number in range(tiles)
    ]
    pieces = [order[start:stop] for start, stop in itertools.pairwise([*starts, total])]
    # The extent of every tile in one copy to the host
    extents = torch.stack([torch.stack([p.min(), p.max(), (p.diff() == 1).all().long()]) for p in pieces]).tolist()
    runs = _runs(counts, starts)
    return [
        KeyTile(piece.int(), ids[start : start + len(piece)].long(), low, high, bool(ascending), tuple(runs[number]))
        for number, (start, piece, (low, high, ascending)) in enumerate(zip(starts, pieces, extents, strict=True))
    ]


def tiles_of(frame_ids: Tensor, sequence: int, num_frames: int, size: int, *, frames_only: bool) -> list[KeyTile]:
    """`key_tiles` of one sequence of (B, S) frame_ids, once for a plan; without frames all keys are of none."""

    def make() -> list[KeyTile]:
        ids = frame_ids[sequence] if num_frames else torch.full_like(frame_ids[sequence], -1)
        return key_tiles(ids, num_frames, size, frames_only=frames_only)

    return kept(frame_ids, ("tiles", sequence, num_frames, size, frames_only), make)


def _runs(counts: list[int], starts: list[int]) -> list[list[tuple[int, int, int, int]]]:
    """Of each tile of sorted keys, given where it starts, its neighbouring frames of equal length: `KeyTile.runs`."""
    tiles: list[list[tuple[int, int, int, int]]] = [[] for _ in starts]
    ends = [*starts[1:], sum(counts)]
    position, tile = 0, 0
    for frame, count in enumerate(counts):
        while count:
            if position == ends[tile]:
                tile += 1
            start, length = position - starts[tile], min(count, ends[tile] - position)
            runs = tiles[tile]
            if runs and runs[-1][0] + runs[-1][1] == frame and runs[-1][3] == length:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, runs[-1][2], length)
            else:
                runs.append((frame, 1, start, length))
            position, count = position + length, count - length
    return tiles
