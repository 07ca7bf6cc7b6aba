"""The Triton kernels of the operators on logits, compiled for sm_80 and executed, against the fp64 reference.

bf16 is what they are for; the framework that sets the tolerance is the torch backend in the same dtype.
"""

import pytest
import torch

from appo_kernels import testing
from appo_kernels.ops.group_divergence import group_divergence, group_divergence_from_logits
from appo_kernels.ops.group_divergence import reference as divergence_reference
from appo_kernels.ops.token_logprobs import reference as logprobs_reference
from appo_kernels.ops.token_logprobs import token_logprobs
from appo_kernels.ops.weighted_surrogate import linear_weighted_surrogate, logits_weighted_surrogate
from ptxsim import triton_device

# A vocabulary that is a multiple of nothing and is cut into several tiles; a word that is forbidden; few rows.
V, D, M = 331, 32, 5


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    """Tiles of about 100 columns and 3 rows, so that states and sums are carried from one to the next."""
    from appo_kernels.ops.group_divergence import triton as divergence_triton
    from appo_kernels.ops.token_logprobs import triton as logprobs_triton
    from appo_kernels.vocabulary import output_head

    monkeypatch.setattr(logprobs_triton, "tile_shape", lambda *args: (3, 100))
    monkeypatch.setattr(divergence_triton, "TILE_BYTES", 4 * 300 * 8)
    monkeypatch.setattr(output_head, "CPU_HEAD_TILE_BYTES", 4 * V * 3)


def make(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(M, D, generator=generator).to(dtype)
    weight = (torch.randn(V, D, generator=generator) / 3).to(dtype)
    bias = torch.randn(V, generator=generator).to(dtype)
    targets = torch.randint(V, (M,), generator=generator)
    targets[0], targets[1] = V - 1, 100  # the last word, and the first of a tile
    bias[7] = float("-inf")
    targets[targets == 7] = 8
    return hidden, weight, bias, targets


def errors_allowed(results, reference, framework, names, factor):
    for name, got, expected, torch_result in zip(names, results, reference, framework, strict=True):
        testing.assert_as_good_as(got, expected, torch_result, factor=factor, atol=3e-6, name=name)


# (dtype, bias, soft cap, temperature): each feature in one of few cases, because every flag compiles another kernel.
@pytest.mark.parametrize(
    ("dtype", "with_bias", "softcap", "temperature"),
    [(torch.bfloat16, False, None, 1.0), (torch.bfloat16, True, 5.0, 0.7), (torch.float32, True, None, 1.3)],
)
def test_token_logprobs(dtype, with_bias, softcap, temperature):
    hidden, weight, bias, targets = make(dtype)
    options = {"temperature": temperature, "softcap": softcap}
    upstream = torch.randn(3, M, generator=torch.Generator().manual_seed(1))

    def run(function, dtype, **more):
        inputs = [
            t.detach().to(dtype).requires_grad_() for t in ((hidden, weight, bias) if with_bias else (hidden, weight))
        ]
        results = function(*inputs[:2], targets, bias=inputs[2] if with_bias else None, **options, **more)
        total = sum((result * up.to(result.dtype)).sum() for result, up in zip(results, upstream, strict=True))
        return results, torch.autograd.grad(total, inputs)

    expected, expected_grads = run(logprobs_reference.token_logprobs, torch.float64)
    framework, framework_grads = run(token_logprobs, dtype, backend="torch")
    with triton_device.simulated(seed=0) as device:
        results, grads = run(token_logprobs, dtype, backend="triton")
    assert {launch.name for launch in device.launches} == {"fold_kernel", "gradient_kernel"}
    errors_allowed(results, expected, framework, ("logprobs", "entropy", "lse"), 2.0)
    errors_allowed(grads, expected_grads, framework_grads, ("hidden", "weight", "bias")[: len(grads)], 3.0)


# Both kinds: their terms are written separately.
@pytest.mark.parametrize("kind", ["kl", "k3"])
def test_group_divergence(kind):
    """Missing members, a slot with one member, a slot with none, and one where all members are the same row."""
    G, N = 3, 6
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(G, N, D, generator=generator).bfloat16()
    hidden[1, 2] = hidden[0, 1] = hidden[2, 5]
    _, weight, bias, _ = make(torch.bfloat16)
    slots = torch.tensor([[[0, 1, 3], [4, 2, -1], [2, 5, -1]], [[-1, 1, 2], [-1, -1, 5], [-1, 0, 0]]])  # (K, G, J)
    logits = hidden.double() @ weight.double().t() + bias.double()
    lse = torch.logsumexp(logits / 0.8, -1)
    options = {"kind": kind, "bias": bias, "temperature": 0.8}
    expected = divergence_reference.group_divergence(
        hidden.double(), weight.double(), lse, slots, kind=kind, bias=bias.double(), temperature=0.8
    )
    framework = group_divergence(hidden, weight, lse.float(), slots, backend="torch", **options)
    with triton_device.simulated(seed=0):
        got = group_divergence(hidden, weight, lse.float(), slots, backend="triton", **options)
    testing.assert_as_good_as(got, expected, framework, atol=3e-6, name=kind)

    half = logits.bfloat16().transpose(1, 2).contiguous().transpose(1, 2)  # the vocabulary is not the last in memory
    half_lse = torch.logsumexp(half.double() / 0.8, -1)
    expected = divergence_reference.group_divergence_from_logits(
        half.double(), half_lse, slots, kind=kind, temperature=0.8
    )
    with triton_device.simulated(seed=1):
        got = group_divergence_from_logits(half, half_lse.float(), slots, kind=kind, temperature=0.8, backend="triton")
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-6)


def surrogate_arguments(B, T):
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 0], mask[-1, -1] = False, False
    return {
        "old_logprobs": -3 + torch.randn(B, T, generator=generator),
        "advantages": torch.tensor([1.5, 0.0])[:B],  # the second response has no gradient
        "mask": mask,
        "token_weights": 1 + torch.rand(B, T, generator=generator),
    }


# Token-level in both, sequence-level (two passes) with an entropy bonus, which gives every valid row a gradient.
@pytest.mark.parametrize(("level", "entropy_coef"), [("token", 0.0), ("sequence", 0.1)])
def test_linear_weighted_surrogate(level, entropy_coef):
    B, T = 2, 3
    _, weight, bias, _ = make(torch.bfloat16)
    hidden = torch.randn(B, T, D, generator=torch.Generator().manual_seed(4)).bfloat16()
    targets = torch.randint(8, V, (B, T), generator=torch.Generator().manual_seed(5))
    options = surrogate_arguments(B, T) | {"level": level, "entropy_coef": entropy_coef, "temperature": 0.9}

    def run(dtype, backend):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        result = linear_weighted_surrogate(*inputs[:2], targets, bias=inputs[2], backend=backend, **options)
        result.loss.backward()
        return [result.loss, result.metrics["entropy"], *(t.grad for t in inputs)]

    expected, framework = run(torch.float64, "torch"), run(torch.bfloat16, "torch")
    with triton_device.simulated(seed=0) as device:
        got = run(torch.bfloat16, "triton")
    assert device.launches
    errors_allowed(got, expected, framework, ("loss", "entropy", "hidden", "weight", "bias"), 3.0)


# The gradient in a tensor of its own, and in the place of the logits.
@pytest.mark.parametrize("inplace", [False, True])
def test_logits_weighted_surrogate(inplace):
    """bf16 logits in a (B, T, V) slice of something larger; the gradient may take their place."""
    B, T = 2, 3
    storage = torch.randn(B, T + 2, V, generator=torch.Generator().manual_seed(6)).bfloat16() * 3
    targets = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(7))
    options = surrogate_arguments(B, T)

    def run(dtype, backend):
        leaf = storage.to(dtype).clone().requires_grad_()
        logits = (leaf * 1)[:, 1 : T + 1]
        logits.retain_grad()
        result = logits_weighted_surrogate(logits, targets, backend=backend, inplace=inplace, **options)
        result.loss.backward()
        return result.loss, logits.grad

    expected, framework = run(torch.float64, "torch"), run(torch.bfloat16, "torch")
    with triton_device.simulated(seed=0) as device:
        got = run(torch.bfloat16, "triton")
    names = [launch.name for launch in device.launches]
    assert names == ["fold_kernel", "terms_kernel", "sums_kernel", "gradient_kernel", "scale_kernel"]
    errors_allowed(got, expected, framework, ("loss", "logits"), 3.0)
    assert not got[1][0, 0].any()  # masked
