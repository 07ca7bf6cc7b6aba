"""group_divergence, backend "cuda": csrc/group_divergence.

``group_divergence_from_logits`` is one kernel. ``group_divergence`` is matrix products, the vendor's library either
way, and passes between them, which are Triton's.
"""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from appo_kernels import cuda_library
from appo_kernels.cuda_constants import DIVERGENCE_CHUNK, ELEMENTS
from appo_kernels.dispatch import Problem
from appo_kernels.ops.group_divergence.selection import by_slot, write_divergence

OP = "group_divergence_from_logits"


class DivergenceParams(cuda_library.Params):
    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("logits_stride_g", ctypes.c_int64),
        ("logits_stride_n", ctypes.c_int64),
        ("responses", ctypes.c_int64),
        ("positions", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("slot_count", ctypes.c_int64),
        ("chunks", ctypes.c_int64),
        ("inverse_temperature", ctypes.c_float),
        ("log_uniform", ctypes.c_float),
        ("k3", ctypes.c_int),
        ("element", ctypes.c_int),
    )


def unsupported(problem: Problem) -> str | None:
    return cuda_library.why_not(problem, cuda_library.LOGITS)


def forward(hidden: Tensor, *operands: Any) -> None:
    """Arguments as of ``streaming.forward``."""
    cuda_library.next_best("group_divergence", hidden).forward(hidden, *operands)


def forward_from_logits(
    logits: Tensor, lse: Tensor, slots: Tensor, kind: str, temperature: float, divergence: Tensor
) -> None:
    """Arguments as of ``streaming.forward_from_logits``."""
    G, N, V = logits.shape
    K, _, J = slots.shape
    if not (K * J and G and V):
        divergence.zero_()
        return
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    members = by_slot(slots).to(torch.int64).contiguous()
    lse = lse.to(torch.float32).contiguous()
    chunks = -(-V // DIVERGENCE_CHUNK)
    partial = logits.new_empty(K * J, chunks, dtype=torch.float32)
    params = DivergenceParams(
        logits=logits,
        lse=lse,
        slots=members,
        partial=partial,
        logits_stride_g=logits.stride(0),
        logits_stride_n=logits.stride(1),
        responses=G,
        positions=N,
        vocabulary=V,
        slot_count=K * J,
        chunks=chunks,
        inverse_temperature=1.0 / temperature,
        log_uniform=-math.log(V),
        k3=int(kind == "k3"),
        element=ELEMENTS[logits.dtype],
    )
    cuda_library.call(OP, "appo_divergence_chunks", params, logits.device)
    write_divergence(partial.sum(1), kind, divergence)  # the kernel leaves 0 where fewer than two members are
