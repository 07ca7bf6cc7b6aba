"""The Triton backends on a GPU: the layouts that the simulator runs, all head sizes, and sizes only a GPU reaches."""

from dataclasses import replace

import attention_layouts as layouts
import backend_calls as calls
import pytest
import torch

import appo_kernels
from appo_kernels import testing
from appo_kernels.ops.group_divergence import reference as divergence_reference
from appo_kernels.ops.token_logprobs import reference as logprobs_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def on_gpu(layout: layouts.LayoutCase) -> layouts.LayoutCase:
    names = ("frame_ids", "first_key", "last_key", "prefix_keys")
    moved = {name: getattr(layout, name) for name in names}
    return replace(layout, **{name: None if t is None else t.cuda() for name, t in moved.items()})


# Head sizes that tiles hold exactly and padded ones; groups of 7 query heads, of one, and of a number between.
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("query_heads", "key_heads"), [(14, 2), (2, 2), (3, 1)])
def test_attention(dtype, head_dim, query_heads, key_heads):
    layout = on_gpu(layouts.hostile())
    inputs = [t.cuda() for t in calls.tensors(layouts.hostile(), query_heads, key_heads, head_dim, dtype)]
    grads = [t.cuda() for t in calls.upstream(layouts.hostile(), [t.cpu() for t in inputs])]
    expected = calls.expected_attention(layout, inputs, scale=0.2, grads=grads)
    framework = calls.attention(layout, inputs, "torch", scale=0.2, grads=grads)
    got = calls.attention(layout, inputs, "triton", scale=0.2, grads=grads)
    calls.compare(got, expected, framework)
    again = calls.attention(layout, inputs, "triton", scale=0.2, grads=grads)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_frame_mass_agrees_with_attention():
    """From torch's own lse, from ours, and without one: one number."""
    B, Hq, Hkv, R, S, d, F = 2, 28, 4, 384, 1560, 128, 16
    query = torch.randn(B, Hq, R, d, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, B, Hkv, S, d, device="cuda", dtype=torch.bfloat16)
    frames = torch.full((B, S), -1, device="cuda")
    frames[:, 70 : 70 + 64 * F] = torch.arange(F, device="cuda").repeat_interleave(64)
    last = torch.arange(S - R, S, device="cuda").expand(B, R)
    options = {"num_frames": F, "last_key": last, "backend": "triton"}
    attention = appo_kernels.frame_attention(query, key, value, frames, **options)
    for lse in (attention.lse, None):
        mass = appo_kernels.frame_mass(query, key, frames, lse=lse, **options)
        torch.testing.assert_close(mass, attention.mass, rtol=1e-4, atol=1e-6)
    assert (attention.mass.sum(-1) < 1).all() and (attention.mass > 0).all()


def test_offsets_beyond_31_bits():
    """Logits of 4,096 x 152,064 in place, more than 65,536 tokens, and the gradient of rows at the far end."""
    tokens, vocabulary = 16_384, 152_064  # 2.5e9 elements
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    logits = torch.zeros(1, tokens, vocabulary, device="cuda", dtype=torch.bfloat16)
    logits[0, -1, 5] = 8.0
    targets = torch.full((1, tokens), 5, device="cuda")
    ones = torch.ones(1, tokens, device="cuda")
    want = logits[0, -1].float().log_softmax(0)[5]
    leaf = logits.requires_grad_()
    result = appo_kernels.logits_weighted_surrogate(
        leaf * 1, targets, want * ones, torch.ones(1, device="cuda"), ones, inplace=True, backend="triton"
    )
    result.loss.backward()
    row = leaf.grad[0, -1].float()
    expected = -(torch.nn.functional.one_hot(targets[0, -1], vocabulary) - logits[0, -1].float().softmax(0)) / tokens
    torch.testing.assert_close(row, expected, rtol=1e-2, atol=1e-9)


# Fewer rows than a program takes, and more than 65,535, the largest second and third dimension of a grid.
@pytest.mark.parametrize("tokens", [5, 70_000])
def test_token_logprobs(tokens):
    hidden = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1031, 64, device="cuda", dtype=torch.bfloat16) / 4
    targets = torch.randint(1031, (tokens,), device="cuda")
    expected = logprobs_reference.token_logprobs(hidden.double(), weight.double(), targets)
    framework = appo_kernels.token_logprobs(hidden, weight, targets, backend="torch")
    got = appo_kernels.token_logprobs(hidden, weight, targets, backend="triton")
    for results in zip(got, expected, framework, strict=True):
        testing.assert_as_good_as(*results, atol=3e-6)


# Both kinds: one leaves a missing member out, the other gives it a value.
@pytest.mark.parametrize("kind", ["kl", "k3"])
def test_group_divergence(kind):
    hidden = torch.randn(8, 40, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1031, 64, device="cuda", dtype=torch.bfloat16) / 4
    lse = torch.logsumexp(hidden.double() @ weight.double().t(), -1)
    slots = torch.randint(-1, 40, (4, 8, 16), device="cuda")
    expected = divergence_reference.group_divergence(hidden.double(), weight.double(), lse, slots, kind=kind)
    framework = appo_kernels.group_divergence(hidden, weight, lse.float(), slots, kind=kind, backend="torch")
    got = appo_kernels.group_divergence(hidden, weight, lse.float(), slots, kind=kind, backend="triton")
    testing.assert_as_good_as(got, expected, framework, atol=3e-6)


def test_compiled():
    """torch.compile(fullgraph=True) gives the bits of the eager call."""
    query = torch.randn(1, 7, 50, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    key = torch.randn(1, 1, 200, 64, device="cuda", dtype=torch.bfloat16)
    frames = (torch.arange(200, device="cuda") // 50)[None]

    def run(query):
        return appo_kernels.frame_mass(query, key, frames, num_frames=4, backend="triton")

    assert torch.equal(run(query), torch.compile(run, fullgraph=True)(query))
