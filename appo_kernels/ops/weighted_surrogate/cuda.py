"""weighted_surrogate, backend "cuda": csrc/weighted_surrogate.

``logits_weighted_surrogate`` is two kernels, each of which reads every row of logits once. What lies between them, the
plain surrogate, and the linear one with its matrix products, are Triton's, or torch's without it.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from appo_kernels import cuda_library
from appo_kernels.cuda_constants import ELEMENTS
from appo_kernels.dispatch import Problem
from appo_kernels.ops.weighted_surrogate import streaming
from appo_kernels.ops.weighted_surrogate.kinds import MASK, SHARE, Options

OP = "logits_weighted_surrogate"


class SurrogateParams(cuda_library.Params):
    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("logprobs", ctypes.c_void_p),
        ("entropy", ctypes.c_void_p),
        ("row_max", ctypes.c_void_p),
        ("log_sum", ctypes.c_void_p),
        ("slope", ctypes.c_void_p),
        ("entropy_slope", ctypes.c_void_p),
        ("logits_stride_b", ctypes.c_int64),
        ("logits_stride_t", ctypes.c_int64),
        ("gradient_stride_b", ctypes.c_int64),
        ("gradient_stride_t", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("inverse_temperature", ctypes.c_float),
        ("element", ctypes.c_int),
    )


def unsupported(problem: Problem) -> str | None:
    return cuda_library.why_not(problem, cuda_library.LOGITS)


def forward(logprobs: Tensor, *operands: Any) -> None:
    """Arguments as of ``streaming.forward``."""
    cuda_library.next_best("weighted_surrogate", logprobs).forward(logprobs, *operands)


def scale_(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Arguments as of ``streaming.scale_``."""
    cuda_library.next_best("weighted_surrogate", factor).scale_(gradients, factor)


def linear_forward(hidden: Tensor, *operands: Any) -> None:
    """Arguments as of ``streaming.linear_forward``."""
    cuda_library.next_best("weighted_surrogate", hidden).linear_forward(hidden, *operands)


def logits_forward(
    logits: Tensor,
    targets: Tensor,
    table: Tensor,
    options: Options,
    loss: Tensor,
    metrics: Tensor,
    grad_logits: Tensor | None,
) -> None:
    """Arguments as of ``streaming.logits_forward``."""
    B, T, V = logits.shape
    if B * T == 0 or V == 0:
        streaming.logits_forward(logits, targets, table, options, loss, metrics, grad_logits)
        return
    source = logits if logits.stride(2) == 1 else logits.contiguous()
    # The gradient may share memory with the logits, but only position by position.
    gradient = grad_logits
    if gradient is not None and gradient.stride(2) != 1:
        gradient = source if gradient.data_ptr() == logits.data_ptr() else torch.empty_like(source)
    values = table.new_empty(4, B, T)
    logprobs, entropy, row_max, log_sum = values
    mask, targets = table[MASK].contiguous(), targets.to(torch.int64).contiguous()

    def run(launcher: str, slope: Tensor | None, entropy_slope: Tensor | None) -> None:
        """One pass over the rows (B T, V); slopes (B, T) only where it writes the gradient."""
        params = SurrogateParams(
            logits=source,
            gradient=gradient,
            targets=targets,
            mask=mask,
            logprobs=logprobs,
            entropy=entropy,
            row_max=row_max,
            log_sum=log_sum,
            slope=slope,
            entropy_slope=entropy_slope,
            logits_stride_b=source.stride(0),
            logits_stride_t=source.stride(1),
            gradient_stride_b=0 if gradient is None else gradient.stride(0),
            gradient_stride_t=0 if gradient is None else gradient.stride(1),
            rows=B * T,
            tokens=T,
            vocabulary=V,
            inverse_temperature=1.0 / options.temperature,
            element=ELEMENTS[logits.dtype],
        )
        cuda_library.call(OP, launcher, params, logits.device)

    run("appo_surrogate_rows", None, None)
    between = cuda_library.next_best("weighted_surrogate", logits)
    slope = between.row_terms(values[:2], table, options, loss, metrics)
    if grad_logits is None or gradient is None:
        return
    run("appo_surrogate_gradient", slope.contiguous(), (table[SHARE] * -options.entropy_coef).contiguous())
    if gradient is not grad_logits:
        grad_logits.copy_(gradient)
