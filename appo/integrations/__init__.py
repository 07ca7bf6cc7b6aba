"""APPO inside other trainers: one function from frame mass to token weights, and an adapter for each trainer."""

from appo.integrations.packed import PackedMass, PackedRows
from appo.integrations.weights import GroupWeights, group_weights

__all__ = ["GroupWeights", "PackedMass", "PackedRows", "group_weights"]
