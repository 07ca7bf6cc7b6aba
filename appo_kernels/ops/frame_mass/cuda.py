"""frame_mass, backend "cuda": csrc/frame_mass from a given lse, csrc/attention_forward without one."""

import ctypes
import math

import torch
from torch import Tensor

from appo_kernels import cuda_library
from appo_kernels.attention import cuda_passes as passes
from appo_kernels.attention.arguments import Layout
from appo_kernels.dispatch import Problem

OP = "frame_mass"
ROW_TILE = 64  # rows of a block: kRows


class FrameMassParams(cuda_library.Params):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "lse", "frame_weights", "mass")),
        ("visibility", passes.Visibility),
        ("frames", passes.FrameIds),
        *passes.strides("query", "bhr"),
        *passes.strides("key", "bhs"),
        *passes.strides("mass", "bhrf"),
        *passes.SIZES,
        *passes.counts("frames_per_block", "per_head"),
        ("scale_log2", ctypes.c_float),
        *passes.counts("head_dim", "element"),
    )


def unsupported(problem: Problem) -> str | None:
    return passes.unsupported(problem)


def forward(
    query: Tensor,
    key: Tensor,
    layout: Layout,
    lse: Tensor | None,
    per_head: bool,
    mass: Tensor,
    new_lse: Tensor | None,
) -> None:
    """Arguments as of ``streaming.forward``."""
    batch, heads, rows, _ = query.shape
    frame_count = mass.shape[-1]
    if not (batch * rows and key.shape[2]):
        if new_lse is not None:
            new_lse.fill_(-math.inf)
        return
    common = passes.operands(query, key, layout, frame_count)
    if lse is None:
        assert new_lse is not None
        passes.attend(
            OP, "appo_frame_mass_one_pass", common, None, layout.frame_weights, None, new_lse, mass, per_head
        )  # fmt: skip
        return
    if not frame_count:
        return
    mass_BHRF = mass if per_head else mass[:, None]
    weights = None if layout.frame_weights is None else layout.frame_weights.contiguous()
    lse = lse.contiguous()
    params = FrameMassParams(
        **common.fields(),
        lse=lse,
        frame_weights=weights,
        mass=mass,
        **passes.stride_fields("mass", "bhrf", mass_BHRF),
        frames_per_block=frames_per_block(
            batch * -(-rows // ROW_TILE) * (heads if per_head else 1), frame_count, mass.device
        ),
        per_head=int(per_head),
    )
    cuda_library.call(OP, "appo_frame_mass_replay", params, mass.device)


def backward(
    query: Tensor,
    key: Tensor,
    layout: Layout,
    lse: Tensor,
    per_head: bool,
    grad_mass: Tensor,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
) -> None:
    """Arguments as of ``streaming.backward``."""
    head_mass = grad_mass if per_head else grad_mass[:, None] / query.shape[1]
    if layout.frame_weights is not None:
        head_mass = head_mass * layout.frame_weights[:, None, None]
    passes.attend_backward(OP, query, key, None, layout, None, lse, None, None, head_mass, grad_query, grad_key, None)


def frames_per_block(blocks: int, frame_count: int, device: torch.device) -> int:
    """How many frames each block takes, so that every multiprocessor gets four blocks where there is that much work."""
    if device.type == "cpu":
        return max(1, frame_count // 2)  # emulated: two blocks, so that the cut is tested
    wanted = 4 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, frame_count // max(1, -(-wanted // blocks)))
