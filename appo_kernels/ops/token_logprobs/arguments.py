"""Operands of the backends: what logits are made of, results, and buffers for gradients.

Shapes: M rows, D hidden size, V vocabulary.
"""

from typing import NamedTuple

from torch import Tensor


class Projection(NamedTuple):
    """Logits (M, V) that are never whole: softcap(hidden weight^T + bias) / temperature; checked."""

    hidden: Tensor  # (M, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    temperature: float
    softcap: float | None


class TokenLogprobs(NamedTuple):
    """Of M tokens, each (M,) fp32 (fp64 for fp64 inputs), natural logarithms."""

    logprobs: Tensor  # log p(target)
    entropy: Tensor  # -sum_v p(v) log p(v) of the distribution the target was drawn from
    lse: Tensor  # log-sum-exp of the scaled logits


class Gradients(NamedTuple):
    """Buffers for the gradients of a projection's tensors, like these; None where none is wanted."""

    hidden: Tensor | None  # (M, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)
