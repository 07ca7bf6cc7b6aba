"""Dtypes that operators compute in, bases of logarithms, and numbers in the place of infinite ones."""

import math

import torch

LOG2_E, LN_2 = math.log2(math.e), math.log(2.0)  # softmax is taken in base 2, lse is in base e
# Stands for the log-probability of an impossible token in products with its probability, which is 0: exp of it is
# exactly 0 in fp32 and fp64, and 0 times it is 0 where 0 * -inf is NaN; the mean of up to 1,677 of it is it.
LOG_ZERO = -1e4
# The largest difference of log-probabilities that the k3 divergence takes (docs/method.md, eq. 12).
K3_CLAMP = 11.0
HALVES = (torch.float16, torch.bfloat16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and of everything accumulated from them: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """The name without "torch.", such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
