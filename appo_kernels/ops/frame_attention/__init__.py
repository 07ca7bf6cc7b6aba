"""Attention, its log-sum-exp and the mass on each video frame, in one pass."""

from appo_kernels.ops.frame_attention.op import FrameAttentionOutput, frame_attention

__all__ = ["FrameAttentionOutput", "frame_attention"]
