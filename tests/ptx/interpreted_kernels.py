"""The Triton kernels in Triton's own interpreter, fp16 and fp32. Run by test_interpreter.py, with TRITON_INTERPRET=1.

The interpreter multiplies the raw bits of bf16 numbers in a matrix product, so bf16 is left to the compiled kernels.
"""

import attention_layouts as layouts
import pytest
import torch

import appo_kernels
from appo_kernels import testing
from appo_kernels.ops.frame_mass import streaming
from appo_kernels.ops.frame_mass import triton as frame_mass
from appo_kernels.ops.group_divergence import group_divergence
from appo_kernels.ops.token_logprobs import token_logprobs

SCALE = 0.21


# Seven query heads to a key/value head, and a padded head size.
@pytest.mark.parametrize(
    ("dtype", "head_dim", "query_heads", "key_heads"), [(torch.float16, 64, 7, 1), (torch.float32, 40, 2, 1)]
)
def test_attention(dtype, head_dim, query_heads, key_heads):
    layout = layouts.hostile()
    inputs = layouts.tensors(layout, query_heads, key_heads, head_dim, dtype)
    grads = layouts.upstream(layout, inputs)
    expected = layouts.expected_attention(layout, inputs, scale=SCALE, grads=grads)
    results = [layouts.attention(layout, inputs, backend, scale=SCALE, grads=grads) for backend in ("triton", "torch")]
    layouts.compare(results[0], expected, results[1])


@pytest.mark.parametrize("per_head", [False, True])
def test_frame_mass(per_head):
    layout = layouts.hostile()
    query, key, value = layouts.tensors(layout, 4, 2, 32, torch.float16)
    _, lse, _ = layouts.attention(layout, (query, key, value), "torch", scale=SCALE)
    shape = (2, 4, layout.rows, 6) if per_head else (2, layout.rows, 6)
    results = []
    for module, given in ((streaming, lse), (frame_mass, lse), (frame_mass, None)):
        mass, new_lse = torch.zeros(shape), torch.full_like(lse, float("nan")) if given is None else None
        mass_BHRF = mass if per_head else mass[:, None]
        module.forward(query, key, layout.operands(SCALE), given, mass_BHRF, new_lse, per_head)
        results.append(mass)
    for got in results[1:]:
        testing.assert_as_good_as(got, results[0].double(), results[0], atol=3e-6, name="mass")


def test_logits():
    hidden, weight, bias = torch.randn(6, 48), torch.randn(331, 48) / 3, torch.randn(331)
    targets = torch.randint(331, (6,))
    results = []
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "torch"), (torch.float32, "triton")):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        values = token_logprobs(*leaves[:2], targets, bias=leaves[2], temperature=0.7, softcap=8.0, backend=backend)
        (values.logprobs.sum() + 2 * values.entropy.sum() - values.lse.sum()).backward()
        results.append([*values, *(leaf.grad for leaf in leaves)])
    for expected, framework, got in zip(*results, strict=True):
        testing.assert_as_good_as(got, expected, framework, factor=3.0, atol=3e-6)
    lse = results[0][2].view(2, 3)
    slots = torch.tensor([[[0, 1, -1], [2, -1, 1]]])
    for kind in ("kl", "k3"):
        options = {"kind": kind, "bias": bias, "temperature": 0.7, "softcap": 8.0}
        expected = group_divergence(
            hidden.double().view(2, 3, 48),
            weight.double(),
            lse,
            slots,
            backend="torch",
            **options | {"bias": bias.double()},
        )
        got = group_divergence(hidden.view(2, 3, 48), weight, lse.float(), slots, backend="triton", **options)
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("op", ["frame_mass", "frame_attention"])
def test_bf16_attention_is_refused(op):
    """The interpreter's tl.dot takes the bits of bf16 for integers: results would be off by powers of ten."""
    query, ids = torch.randn(1, 1, 4, 32, dtype=torch.bfloat16), torch.zeros(1, 4, dtype=torch.int64)
    value = {"value": query} if op == "frame_attention" else {}
    with pytest.raises(ValueError, match=rf"^{op}: `backend`: .*interpreter cannot multiply bf16"):
        getattr(appo_kernels, op)(query, query, frame_ids=ids, num_frames=1, backend="triton", **value)
