"""The definition of frame_attention: dense, in the dtype of its inputs, differentiated by autograd."""

from torch import Tensor

from appo_kernels.attention.merge import FrameAttentionOutput
from appo_kernels.attention.reference import attention_matrix, mass_of, visible_keys


def frame_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    frame_ids: Tensor,
    *,
    num_frames: int,
    first_key: Tensor | None = None,
    last_key: Tensor | None = None,
    prefix_keys: Tensor | None = None,
    scale: float | None = None,
    reduction: str = "sum",
) -> FrameAttentionOutput:
    """See ``appo_kernels.frame_attention``."""
    seen = visible_keys(query, key.shape[2], first_key, last_key, prefix_keys)
    probabilities, lse = attention_matrix(query, key, seen, scale)
    out = probabilities @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return FrameAttentionOutput(out, lse, mass_of(probabilities, frame_ids, num_frames, reduction).mean(1))
