"""frame_mass, backend "triton": a replay of the keys of frames from a given lse, else an online pass without values."""

from torch import Tensor

from appo_kernels.dispatch import Problem
from appo_kernels.ops.frame_attention import triton as attention
from appo_kernels.ops.frame_mass.triton_replay import replay
from appo_kernels.tile_plan import key_plan, row_bounds
from appo_kernels.triton_launch import FORWARD, architecture, tiling


def unsupported(problem: Problem) -> str | None:
    return attention.unsupported(problem)


def forward(
    query: Tensor,
    key: Tensor,
    frame_ids: Tensor,
    lse: Tensor | None,
    first_key: Tensor | None,
    last_key: Tensor | None,
    prefix_keys: Tensor | None,
    frame_weights: Tensor | None,
    scale: float,
    per_head: bool,
    mass: Tensor,
    new_lse: Tensor | None,
) -> None:
    mass_BHRF = mass if per_head else mass[:, None]
    if lse is None:
        assert new_lse is not None
        attention.attend(
            query, key, None, frame_ids, first_key, last_key, prefix_keys, frame_weights, scale, None, new_lse,
            mass_BHRF,
        )  # fmt: skip
        return
    (B, Hq, R, D), (HKV, S), F = query.shape, key.shape[1:3], mass.shape[-1]
    if not B * R * S * F:
        return
    choice = tiling(FORWARD, architecture(query.device), query.element_size(), D, Hq // HKV)
    bounds = row_bounds(B, R, S, first_key, last_key, prefix_keys)
    plan = key_plan(frame_ids, F, bounds, choice.keys)
    replay(query, key, lse, plan, bounds, frame_weights, scale, mass_BHRF, choice)


def backward(
    query: Tensor,
    key: Tensor,
    frame_ids: Tensor,
    lse: Tensor,
    first_key: Tensor | None,
    last_key: Tensor | None,
    prefix_keys: Tensor | None,
    frame_weights: Tensor | None,
    scale: float,
    per_head: bool,
    grad_mass: Tensor,
    grad_query: Tensor | None,
    grad_key: Tensor | None,
) -> None:
    attention.attend_backward(
        query, key, None, frame_ids, first_key, last_key, prefix_keys, frame_weights, scale, None, lse,
        None, None, grad_mass if per_head else grad_mass[:, None], grad_query, grad_key, None,
    )  # fmt: skip
