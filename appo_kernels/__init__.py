"""Fused operators for attention statistics and policy optimisation: Triton, CUDA and a fast PyTorch path."""

from appo_kernels.attention.frame_plan import FramePlan
from appo_kernels.attention.group_layout import GroupLayout
from appo_kernels.attention.merge import FrameAttentionOutput, merge_attention
from appo_kernels.ops.frame_attention import frame_attention
from appo_kernels.ops.frame_mass import frame_mass
from appo_kernels.ops.group_attention import group_attention
from appo_kernels.ops.group_divergence import group_divergence, group_divergence_from_logits
from appo_kernels.ops.token_logprobs import TokenLogprobs, token_logprobs
from appo_kernels.ops.weighted_surrogate import (
    SurrogateOutput,
    linear_weighted_surrogate,
    logits_weighted_surrogate,
    weighted_surrogate,
)

__all__ = [
    "FrameAttentionOutput",
    "FramePlan",
    "GroupLayout",
    "SurrogateOutput",
    "TokenLogprobs",
    "frame_attention",
    "frame_mass",
    "group_attention",
    "group_divergence",
    "group_divergence_from_logits",
    "linear_weighted_surrogate",
    "logits_weighted_surrogate",
    "merge_attention",
    "token_logprobs",
    "weighted_surrogate",
]

__version__ = "0.1.0"
