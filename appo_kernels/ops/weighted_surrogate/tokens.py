"""The tokens of a batch that the fused loss multiplies, found without waiting for the device."""

from typing import NamedTuple

import torch
from torch import Tensor

from appo_kernels.ops.weighted_surrogate.kinds import ADVANTAGE, IMPORTANCE, MASK, WEIGHT, Options


class Tokens(NamedTuple):
    order: Tensor  # (B T,) int64 flat tokens: those that learn, other valid ones, masked ones; each kind ascending
    valid: int
    learning: int  # valid tokens whose gradient is not zero whatever their ratio


def mark(table: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """``Tokens`` with the numbers still on the device, () each."""
    valid = table[MASK].flatten() != 0
    learning = valid
    if options.beta == 0.0 and options.entropy_coef == 0.0:
        learning = valid & ((table[ADVANTAGE] * table[WEIGHT] * table[IMPORTANCE]).flatten() != 0)
    rank = valid.to(torch.int8) + learning.to(torch.int8)
    return rank.argsort(descending=True, stable=True), valid.sum(), learning.sum()
