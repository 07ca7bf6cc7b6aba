"""Calls without a row to compute (all responses of a batch empty) return results of that shape, and gradients of 0."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import served
from torch import Tensor

import appo_kernels as kernels
from appo_kernels import FramePlan, GroupLayout

LAYOUT = GroupLayout([3, 1], [[0, 0], []])  # prompts alone
D, V = 8, 11


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def frame_mass(batch: int, rows: int, backend: str) -> tuple[list[Tensor], Any]:
    query, key = leaf(batch, 4, rows, 16), leaf(batch, 2, 5, 16)
    ids = torch.zeros(batch, 5, dtype=torch.int32)
    return [query, key], kernels.frame_mass(query, key, ids, num_frames=2, backend=backend)


def replayed_mass(batch: int, rows: int, backend: str) -> tuple[list[Tensor], Any]:
    query, key = leaf(batch, 4, rows, 16), leaf(batch, 2, 5, 16)
    ids, lse = torch.zeros(batch, 5, dtype=torch.int32), torch.zeros(batch, 4, rows)
    return [query, key], kernels.frame_mass(query, key, ids, num_frames=2, lse=lse, backend=backend)


def frame_attention(batch: int, rows: int, backend: str) -> tuple[list[Tensor], Any]:
    leaves = [leaf(batch, 4, rows, 16), leaf(batch, 2, 5, 16), leaf(batch, 2, 5, 16)]
    ids = torch.zeros(batch, 5, dtype=torch.int32)
    return leaves, tuple(kernels.frame_attention(*leaves, ids, num_frames=2, backend=backend))


def mass_of_groups(batch: int, rows: int, backend: str) -> tuple[list[Tensor], Any]:
    leaves = [leaf(1, 4, 0, 16), leaf(1, 2, LAYOUT.tokens, 16)]
    plan = FramePlan.of_layout(
        torch.zeros(1, LAYOUT.tokens, dtype=torch.int32), 1, LAYOUT, rows=torch.zeros(0, dtype=torch.int64)
    )
    return leaves, kernels.frame_mass(*leaves, plan=plan, backend=backend)


def token_logprobs(batch: int, rows: int, backend: str) -> tuple[list[Tensor], Any]:
    leaves = [leaf(batch * rows, D), leaf(V, D)]
    return leaves, tuple(kernels.token_logprobs(*leaves, torch.zeros(0, dtype=torch.int64), backend=backend))


def tokens(batch: int, rows: int) -> list[Tensor]:
    none = torch.zeros(batch, rows)
    return [none, torch.zeros(batch), torch.ones(batch, rows)]


def weighted_surrogate(batch: int, rows: int, backend: str) -> tuple[list[Tensor], Any]:
    leaves = [leaf(batch, rows)]
    return leaves, kernels.weighted_surrogate(*leaves, *tokens(batch, rows), backend=backend).loss


def logits_weighted_surrogate(batch: int, rows: int, backend: str) -> tuple[list[Tensor], Any]:
    leaves, targets = [leaf(batch, rows, V)], torch.zeros(batch, rows, dtype=torch.int64)
    return leaves, kernels.logits_weighted_surrogate(*leaves, targets, *tokens(batch, rows), backend=backend).loss


def linear_weighted_surrogate(batch: int, rows: int, backend: str) -> tuple[list[Tensor], Any]:
    leaves, targets = [leaf(batch, rows, D), leaf(V, D)], torch.zeros(batch, rows, dtype=torch.int64)
    return leaves, kernels.linear_weighted_surrogate(*leaves, targets, *tokens(batch, rows), backend=backend).loss


CALLS: dict[str, tuple[str, Callable[..., tuple[list[Tensor], Any]]]] = {
    "frame_mass": ("frame_mass", frame_mass),
    "frame_mass, lse": ("frame_mass", replayed_mass),
    "frame_mass, groups": ("frame_mass", mass_of_groups),
    "frame_attention": ("frame_attention", frame_attention),
    "token_logprobs": ("token_logprobs", token_logprobs),
    "weighted_surrogate": ("weighted_surrogate", weighted_surrogate),
    "logits_weighted_surrogate": ("weighted_surrogate", logits_weighted_surrogate),
    "linear_weighted_surrogate": ("weighted_surrogate", linear_weighted_surrogate),
}


# Every call with every backend that this machine can run.
SERVED = [(call, *pair) for call, (op, _) in CALLS.items() for pair in served(op, head_dim=16)]


# No row in a sequence, no sequence, and neither.
@pytest.mark.parametrize(("batch", "rows"), [(3, 0), (0, 4), (0, 0)])
@pytest.mark.parametrize(("call", "backend", "device"), SERVED)
def test_results_and_gradients(call: str, backend: str, device: str, batch: int, rows: int) -> None:
    with torch.device(device):
        leaves, results = CALLS[call][1](batch, rows, backend)
    results = results if isinstance(results, tuple) else (results,)
    total = sum(result.sum() for result in results if result.requires_grad)
    assert isinstance(total, Tensor) and not total.detach().any()
    for given, gradient in zip(leaves, torch.autograd.grad(total, leaves, allow_unused=True), strict=True):
        assert gradient is None or (gradient.shape == given.shape and not gradient.any())


# Both kinds: their terms are written separately.
@pytest.mark.parametrize("kind", ["kl", "k3"])
@pytest.mark.parametrize(("backend", "device"), served("group_divergence"))
def test_a_divergence_of_nobody(backend: str, device: str, kind: str) -> None:
    with torch.device(device):
        slots, lse = torch.full((2, 3, 4), -1), torch.zeros(3, 0)
        hidden, weight, logits = torch.zeros(3, 0, D), torch.zeros(V, D), torch.zeros(3, 0, V)
    found = kernels.group_divergence(hidden, weight, lse, slots, kind=kind, backend=backend)
    assert found.shape == (2, 4) and not found.any()
    assert torch.equal(found, kernels.group_divergence_from_logits(logits, lse, slots, kind=kind, backend=backend))
    with pytest.raises(ValueError, match=r"group_divergence: `slots`: expected positions in \[0, 0\), or -1"):
        kernels.group_divergence(hidden, weight, lse, slots + 1, kind=kind, backend=backend)
