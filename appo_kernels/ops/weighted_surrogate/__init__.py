"""The policy-gradient loss with token weights: from log-probabilities, from logits, and from hidden states."""

from appo_kernels.ops.weighted_surrogate.op import (
    SurrogateOutput,
    linear_weighted_surrogate,
    logits_weighted_surrogate,
    weighted_surrogate,
)

__all__ = ["SurrogateOutput", "linear_weighted_surrogate", "logits_weighted_surrogate", "weighted_surrogate"]
