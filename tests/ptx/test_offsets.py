"""Elements beyond the reach of 31-bit offsets, in sparse files: the same bits as from contiguous copies."""

import attention_layouts as layouts
import backend_calls as calls
import pytest
import torch
from far_tensors import SparseFiles

from appo_kernels.ops.group_divergence import group_divergence_from_logits
from appo_kernels.vocabulary import triton_rows
from appo_kernels.vocabulary.triton_rows import fold, gradient, new_state
from ptxsim import triton_device


@pytest.fixture
def spread(tmp_path):
    return SparseFiles(tmp_path).spread


def test_logits(spread):
    """Tokens 2^28 elements apart: a stride of 31 bits times a row number; sequences further apart than that."""
    B, T, V = 2, 9, 48  # strides are multiples of 16 in both forms, so both are read in the same pieces
    logits = torch.randn(B, T, V, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows, targets = torch.arange(B * T), torch.arange(B * T)
    coefficients = torch.randn(3, B * T, generator=torch.Generator().manual_seed(1))
    slots = torch.tensor([[[0, 8, 3], [8, 8, -1]]])  # (K, G, J)
    results = []
    for held in (logits.clone(), spread(logits, ((1 << 31) + 64, 1 << 28, 1))):
        with triton_device.simulated():
            state = new_state(B * T, coefficients)
            fold(held, targets, state)
            logprobs, entropy, lse = triton_rows.results(state)
            divergence = group_divergence_from_logits(held, lse.view(B, T), slots, backend="triton")
            gradient(held, targets, lse, *coefficients, held)  # in the place of the logits
        results.append((logprobs, entropy, divergence, held))
    for near, distant in zip(*results, strict=True):
        assert torch.equal(near, distant)
    expected = logits.double().log_softmax(-1).view(B * T, V)[rows, targets]
    assert (results[1][0] - expected).abs().max() < 1e-5 and not torch.equal(results[1][3], logits)


@pytest.mark.slow
def test_attention(spread):
    """Query rows, keys and heads of values, each where a product of 32-bit numbers would be too small."""
    layout = layouts.hostile()
    inputs = calls.tensors(layout, 7, 1, 32, torch.bfloat16)
    query, key, value = inputs
    far = (
        spread(query, ((1 << 32) + 64, 32, 1 << 26, 1)),
        spread(key, (32, 32, 1 << 24, 1)),
        spread(value, ((1 << 31) + 32, 32, 64, 1)),
    )
    grads = calls.upstream(layout, inputs)
    results = []
    for tensors in (inputs, far):
        with triton_device.simulated():
            results.append(calls.attention(layout, tensors, "triton", scale=0.2, grads=grads))
    for name, near, distant in zip(calls.NAMES, *results, strict=True):
        assert torch.equal(near, distant), name
