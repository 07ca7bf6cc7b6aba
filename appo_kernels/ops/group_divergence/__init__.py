"""Divergence between the token distributions of a group, without a tensor of log-probabilities."""

from appo_kernels.ops.group_divergence.op import group_divergence, group_divergence_from_logits

__all__ = ["group_divergence", "group_divergence_from_logits"]
