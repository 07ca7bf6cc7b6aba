"""APPO inside other trainers: one function from frame mass to token weights, and an adapter for each trainer."""

from appo.integrations.weights import GroupWeights, group_weights

__all__ = ["GroupWeights", "group_weights"]
