"""The rows that slots refer to, each once.

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


def mark(slots: Tensor, positions: int) -> Marked:
    """slots (K, G, J)."""
    _, G, _ = slots.shape
    missing = G * positions
    response = torch.arange(G, device=slots.device)[None, :, None]
    flat = torch.where(slots >= 0, response * positions + slots, missing).transpose(1, 2).reshape(-1, G)
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
