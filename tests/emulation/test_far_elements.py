"""CUDA kernels on elements beyond the reach of 31-bit offsets, in sparse files: the same bits as from small tensors.

Of contiguous tensors of more than 2^31 elements only the last block is run, in which every sum of indices is largest.
"""

from pathlib import Path

import pytest
import torch
from far_tensors import SparseFiles

from appo_kernels import logits_weighted_surrogate
from appo_kernels.attention import cuda_passes
from appo_kernels.attention.arguments import AttentionLayout, Gradients, Upstream
from appo_kernels.ops.group_divergence import group_divergence_from_logits
from cudasim import Emulator

BF16 = torch.bfloat16
# Heads, tokens and head size of 2.3e9 elements; a last tile of rows or keys that is cut.
HEADS, TOKENS, HEAD_DIM = 17, (1 << 20) + 40, 128
LAST = 64 + 40  # of tokens: they start where a tile does


@pytest.fixture
def files(tmp_path: Path) -> SparseFiles:
    return SparseFiles(tmp_path)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def far(files: SparseFiles, last: torch.Tensor, tokens: int) -> torch.Tensor:
    """(1, HEADS, tokens, HEAD_DIM), 0 but for the last tokens of the last head."""
    tensor = files.contiguous((1, HEADS, tokens, HEAD_DIM), last.dtype)
    tensor[:, -1:, -last.shape[2] :] = last
    return tensor


def test_many_rows(emulator: Emulator, files: SparseFiles) -> None:
    """Query, out, its gradient and that of the query; the mass per head in the forward."""
    near = {name: normal(seed, 1, 1, 40, HEAD_DIM) for seed, name in enumerate(("query", "grad_out"))}
    key, value = normal(2, 1, HEADS, 70, HEAD_DIM), normal(3, 1, HEADS, 70, HEAD_DIM)
    frames = torch.arange(70, dtype=torch.int32)[None] % 126
    layout = AttentionLayout(frames, None, None, None, None, 0.1)
    results = []
    for query, grad_out, keys, values in (
        (near["query"], near["grad_out"], key[:, -1:], value[:, -1:]),
        (far(files, near["query"], TOKENS), far(files, near["grad_out"], TOKENS), key, value),
    ):
        whole = query.shape[1] == HEADS
        out, dquery = (files.contiguous(query.shape, BF16) if whole else torch.zeros_like(query) for _ in range(2))
        lse = torch.zeros(query.shape[:3])
        mass_shape = (*query.shape[:3], 126)
        mass = files.contiguous(mass_shape, torch.float32) if whole else torch.zeros(mass_shape)
        with emulator.last_blocks(1):
            cuda_passes.attend(query, keys, values, layout, out, lse, mass, per_head=True)
            gradients = Gradients(dquery, None, None)
            upstream = Upstream(grad_out, None, None)
            cuda_passes.attend_backward(query, keys, values, layout, out, lse, upstream, gradients, per_head=False)
        # The last block of the mean over heads has 256 elements: two rows
        results.append((out[:, -1:, -40:], lse[:, -1:, -40:], dquery[:, -1:, -40:], mass[:, -1:, -2:]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.abs().sum() > 0


def test_many_keys(emulator: Emulator, files: SparseFiles) -> None:
    """Key, value and their gradients; rows that see the last keys only."""
    query, grad_out = normal(0, 1, HEADS, 20, HEAD_DIM), normal(1, 1, HEADS, 20, HEAD_DIM)
    key, value = normal(2, 1, 1, LAST, HEAD_DIM), normal(3, 1, 1, LAST, HEAD_DIM)
    results = []
    for queries, grads, keys, values in (
        (query[:, -1:], grad_out[:, -1:], key, value),
        (query, grad_out, far(files, key, TOKENS), far(files, value, TOKENS)),
    ):
        whole, count = queries.shape[1] == HEADS, keys.shape[2]
        frames = torch.full((1, count), -1, dtype=torch.int32)
        first = torch.full((1, 20), count - LAST + 3, dtype=torch.int32)
        layout = AttentionLayout(frames, first, None, None, None, 0.1)
        out, lse, no_mass = torch.zeros_like(queries), torch.zeros(queries.shape[:3]), torch.zeros(1, 1, 20, 0)
        dkeys = [files.contiguous(keys.shape, BF16) if whole else torch.zeros_like(keys) for _ in range(2)]
        with emulator.last_blocks(HEADS):  # the rows' block of every head, one of which notes what rows see
            cuda_passes.attend(queries, keys, values, layout, out, lse, no_mass, per_head=False)
            gradients = Gradients(torch.zeros_like(queries), *dkeys)
            upstream = Upstream(grads, None, None)
            cuda_passes.attend_backward(queries, keys, values, layout, out, lse, upstream, gradients, per_head=False)
        results.append((out[:, -1:], lse[:, -1:], *(x[:, -1:, -40:] for x in dkeys)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.abs().sum() > 0


def test_logits(files: SparseFiles) -> None:
    """Tokens 2^28 elements apart, and sequences further apart than that."""
    B, T, V = 2, 9, 48
    logits = normal(0, B, T, V)
    targets, slots = torch.arange(B * T).view(B, T), torch.tensor([[[0, 8, 3], [8, 8, -1]]])  # (K, G, J)
    results = []
    for held in (logits.clone(), files.spread(logits, ((1 << 31) + 64, 1 << 28, 1))):
        lse = held.float().logsumexp(-1)
        divergence = group_divergence_from_logits(held, lse, slots, backend="cuda")
        leaf = held.requires_grad_()
        ones = torch.ones(B, T)
        loss = logits_weighted_surrogate(leaf, targets, -lse, ones[:, 0], ones, backend="cuda").loss
        results.append((divergence, loss.detach(), *torch.autograd.grad(loss, leaf)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.abs().sum() > 0
