"""Attention of groups of responses, each behind one prompt, packed in one row without padding and without a mask."""

from appo_kernels.ops.group_attention.op import group_attention

__all__ = ["group_attention"]
