"""Slots: their members, the rows that they refer to, each once, and their divergence from the sums of a backend.

Shapes: K frames, G responses of ``positions`` tokens, J tokens of a frame; S = K J slots of G members, U unique rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Selection(NamedTuple):
    """The rows that slots refer to."""

    response: Tensor  # (U,) response of each unique row
    position: Tensor  # (U,) its token position
    members: Tensor  # (S, G) unique row of each member; U, one past the last, for a missing one
    present: Tensor  # (S,) members that are there


class Marked(NamedTuple):
    """Marks of the rows that slots refer to, before their number is known."""

    flat: Tensor  # (S, G) row of each member; G positions, one past the last, for a missing one
    place: Tensor  # (G positions + 1,) how many rows before this one are referred to
    used: Tensor  # (G positions + 1,) bool
    unique: Tensor  # () U


def by_slot(slots: Tensor) -> Tensor:
    """(K, G, J) -> (S, G)."""
    return slots.transpose(1, 2).reshape(-1, slots.shape[1])


def member_rows(slots: Tensor, positions: int) -> Tensor:
    """slots (K, G, J) -> (S, G) int64 rows of all ``G positions``; ``G positions``, one past the last, for a missing
    member."""
    G = slots.shape[1]
    response = torch.arange(G, device=slots.device)[None, :, None]
    return by_slot(torch.where(slots >= 0, response * positions + slots, G * positions))


def write_divergence(sums: Tensor, kind: str, divergence: Tensor, present: Tensor | None = None) -> None:
    """divergence (K, J) from the sums (S,) of the slots' terms.

    present: (S,) members that are there, where the sums of slots with fewer than two may be anything.
    """
    if kind == "kl":  # not negative; rounding may leave a trace of it where all members agree (k3's terms are positive)
        sums = sums.clamp_(min=0.0)
        if present is not None:
            sums = sums.masked_fill_(present < 2, 0.0)
    divergence.copy_(sums.view_as(divergence))


def mark(slots: Tensor, positions: int) -> Marked:
    """slots (K, G, J)."""
    missing = slots.shape[1] * positions
    flat = member_rows(slots, positions)
    used = torch.zeros(missing + 1, dtype=torch.bool, device=slots.device)
    used.index_fill_(0, flat.flatten().clamp(0, missing), True)
    used[-1:] = False
    place = used.cumsum(0)
    return Marked(flat, place - used.long(), used, place[-1])


def select(marked: Marked, positions: int, count: int) -> Selection:
    """The unique rows, ascending, and per slot which of them its members are. ``count``: U, on the host by now."""
    flat, place, used, _ = marked
    every = torch.arange(len(used), device=used.device)
    rows = every.new_empty(count + 1).scatter_(0, torch.where(used, place, count), every)[:count]
    return Selection(rows // positions, rows % positions, place[flat], (flat < len(used) - 1).sum(1))
