"""Other numbers of rows, keys, frames, sequences or tokens launch kernels that are there: nothing is compiled anew."""

import attention_layouts as layouts
import backend_calls as calls
import pytest
import torch

from appo_kernels.ops.frame_mass import triton as frame_mass
from appo_kernels.ops.group_divergence import group_divergence
from appo_kernels.ops.token_logprobs import token_logprobs
from appo_kernels.ops.weighted_surrogate import linear_weighted_surrogate, logits_weighted_surrogate
from appo_kernels.vocabulary import torch_tiles
from ptxsim import triton_device


def compiled(run, *shapes) -> list[set]:
    """The files of the compiled kernels that ``run`` launches for each shape."""
    found = []
    for shape in shapes:
        with triton_device.simulated(execute=False) as device:
            run(*shape)
        assert device.launches
        found.append({(launch.name, launch.ptx) for launch in device.launches})
    return found


def attention(batch: int, rows: int, keys: int, frames: int) -> None:
    """frame_attention with all its gradients, and frame_mass from its lse, at causal bounds."""
    ids = (torch.arange(keys) * frames // keys).int().expand(batch, keys)
    last = (torch.arange(rows) + keys - rows).int().expand(batch, rows)
    layout = layouts.LayoutCase(ids, frames, None, last, None, rows)
    inputs = calls.tensors(layout, 14, 2, 64, torch.bfloat16)
    calls.attention(layout, inputs, "triton", scale=0.2, grads=calls.upstream(layout, inputs))
    lse, mass = torch.zeros(batch, 14, rows), torch.zeros(batch, rows, frames)
    frame_mass.forward(*inputs[:2], layout.operands(0.2), lse, mass[:, None], None, False)


def test_attention():
    """Odd numbers, multiples of 16, a single row, a single frame, more frames than a program takes."""
    first, *others = compiled(attention, (1, 32, 256, 4), (1, 33, 257, 5), (3, 64, 640, 1), (2, 1, 99, 40))
    assert len(first) >= 6
    for other in others:
        assert other == first


V, D = 1040, 32


def vocabulary(tokens: int) -> None:
    hidden = torch.zeros(tokens, D, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(V, D, dtype=torch.bfloat16, requires_grad=True)
    token_logprobs(hidden, weight, torch.zeros(tokens).long(), backend="triton").logprobs.sum().backward()


def divergence(tokens: int) -> None:
    hidden, weight = torch.zeros(2, tokens, D, dtype=torch.bfloat16), torch.zeros(V, D, dtype=torch.bfloat16)
    slots = torch.arange(tokens).expand(1, 2, tokens).contiguous()
    group_divergence(hidden, weight, torch.zeros(2, tokens), slots, backend="triton")


def from_hidden(tokens: int) -> None:
    hidden = torch.zeros(2, tokens, D, dtype=torch.bfloat16, requires_grad=True)
    weight, zeros = torch.zeros(V, D, dtype=torch.bfloat16), torch.zeros(2, tokens)
    ids, mask = zeros.long(), torch.ones(2, tokens, dtype=torch.bool)
    linear_weighted_surrogate(hidden, weight, ids, zeros, torch.ones(2), mask, backend="triton").loss.backward()


def from_logits(tokens: int) -> None:
    raw, zeros = torch.zeros(2, tokens, V, dtype=torch.bfloat16, requires_grad=True), torch.zeros(2, tokens)
    ids, mask = zeros.long(), torch.ones(2, tokens, dtype=torch.bool)
    logits_weighted_surrogate(raw, ids, zeros, torch.ones(2), mask, backend="triton").loss.backward()


# Every operator that launches kernels on logits.
@pytest.mark.parametrize("run", [vocabulary, divergence, from_hidden, from_logits])
def test_vocabulary(run, monkeypatch):
    """Tiles of any width, of which the last may be narrow: two forms of a kernel at most, whatever the lengths."""
    monkeypatch.setattr(torch_tiles, "CPU_LOGITS_TILE_BYTES", 4 * V * 7)
    first, *others = compiled(run, (16,), (5,), (33,), (48,))
    forms = set().union(first, *others)
    assert max(sum(name == other for other, _ in forms) for name, _ in forms) <= 2, forms
    again = compiled(run, (17,), (21,), (64,))
    assert set().union(*again) <= forms
