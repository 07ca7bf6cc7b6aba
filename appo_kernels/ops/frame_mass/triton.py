"""frame_mass, backend "triton": a replay of the keys of frames from a given lse, else an online pass without values."""

from torch import Tensor

from appo_kernels.attention import triton_passes as passes
from appo_kernels.attention.arguments import AttentionLayout
from appo_kernels.attention.triton_block_mask import key_plan
from appo_kernels.attention.triton_mass import mass_from_lse
from appo_kernels.triton_launch import FORWARD, architecture, tiling
from appo_kernels.triton_launch import unsupported as unsupported


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
    (B, Hq, R, D), (HKV, S), F = query.shape, key.shape[1:3], mass.shape[-1]
    if not B * R * S * F:
        return
    choice = tiling(FORWARD, architecture(query.device), query.element_size(), D, Hq // HKV)
    plan = key_plan(layout, R, F, choice.keys)
    mass_from_lse(query, key, lse, plan, layout.frame_weights, layout.scale, mass, per_head, choice)


backward = passes.attend_backward
