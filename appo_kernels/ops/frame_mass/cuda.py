"""frame_mass, backend "cuda": csrc/frame_mass from a given lse, csrc/attention_forward without one."""

import ctypes

import torch
from torch import Tensor

from appo_kernels import cuda_library
from appo_kernels.attention import cuda_passes as passes
from appo_kernels.attention.arguments import AttentionLayout
from appo_kernels.attention.cuda_passes import unsupported as unsupported
from appo_kernels.cuda_constants import ROW_TILE

OP = "frame_mass"


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


def forward(
    query: Tensor,
    key: Tensor,
    layout: AttentionLayout,
    lse: Tensor | None,
    mass: Tensor,
    new_lse: Tensor | None,
    per_head: bool,
) -> None:
    """Arguments as of ``streaming.forward``."""
    if lse is None:
        assert new_lse is not None
        passes.attend(query, key, None, layout, None, new_lse, mass, per_head)
        return
    batch, heads, rows, _ = query.shape
    frame_count = mass.shape[-1]
    if not (batch * rows and key.shape[2] and frame_count):
        return
    common = passes.operands(query, key, layout, frame_count)
    weights = None if layout.frame_weights is None else layout.frame_weights.contiguous()
    lse = lse.contiguous()
    blocks = batch * -(-rows // ROW_TILE) * (heads if per_head else 1)
    params = FrameMassParams(
        **common.fields(),
        lse=lse,
        frame_weights=weights,
        mass=mass,
        **passes.stride_fields("mass", "bhrf", mass),
        frames_per_block=frames_per_block(blocks, frame_count, mass.device),
        per_head=int(per_head),
    )
    cuda_library.call(OP, "appo_frame_mass_replay", params, mass.device)


def frames_per_block(blocks: int, frame_count: int, device: torch.device) -> int:
    """Number of frames of a block, so that every multiprocessor gets four blocks where there is that much work."""
    if device.type == "cpu":
        return max(1, frame_count // 2)  # emulated: two blocks, so that the cut is tested
    wanted = 4 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, frame_count // max(1, -(-wanted // blocks)))


backward = passes.attend_backward
