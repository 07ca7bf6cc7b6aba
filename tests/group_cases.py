"""Groups behind their prompts that tests of group_attention share, and its comparison with the definition in fp64."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from appo_kernels import GroupLayout, group_attention
from appo_kernels.ops.group_attention import op, reference
from appo_kernels.testing import compare

# Equal responses; unequal with an empty one; none at all; one-token prompts and responses; several groups with another
# number of responses each, one of them without; lengths around the 64 from which a response has a call of its own.
LAYOUTS = {
    "equal": ([20], [[7, 7, 7]]),
    "unequal": ([33], [[9, 0, 1, 14]]),
    "alone": ([17], [[21]]),
    "no response": ([11], [[0, 0]]),
    "ones": ([1], [[1, 1]]),
    "several": ([5, 1, 40, 3, 2], [[4, 30, 0], [2], [], [0, 1, 1, 1], [17, 16]]),
    "long": ([70], [[65, 64, 63, 3]]),
}


NAMES = ("out", "lse", "dq", "dk", "dv")  # gradients too are held to the factor of results


def tensors(layout: GroupLayout, heads: tuple[int, int], head_dim: int, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(layout.tokens)
    shapes = [(1, count, layout.tokens, head_dim) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def results(
    function: Any, inputs: list[Tensor], dtype: torch.dtype, layout: GroupLayout, **options: Any
) -> dict[str, Tensor]:
    """out, lse and the gradients of query, key and value through both."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out, lse = function(*leaves, layout, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x.device, torch.bfloat16) for x in (out, lse)]
    total = (out * upstream[0].to(out.dtype)).sum() + (lse * upstream[1].to(lse.dtype)).sum()
    gradients = torch.autograd.grad(total, leaves)
    return dict(zip(NAMES, (out.detach(), lse.detach(), *gradients), strict=True))


def framework(query: Tensor, key: Tensor, value: Tensor, layout: GroupLayout, **options: Any) -> tuple[Tensor, Tensor]:
    """torch's own attention with a dense mask; its lse, which it does not return, from the scores in its dtype."""
    seen = reference.visible(layout).to(query.device)
    out = scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True, **options)
    return out, reference.group_attention(query, key, value, layout, **options)[1].to(op.compute_dtype(query.dtype))


def compare_groups(backend: str, layout: GroupLayout, inputs: list[Tensor], dtype: torch.dtype, **options: Any) -> None:
    rounded = [x.to(dtype) for x in inputs]
    got = results(group_attention, rounded, dtype, layout, backend=backend, **options)
    exact = results(reference.group_attention, rounded, torch.float64, layout, **options)
    theirs = results(framework, rounded, dtype, layout, **options)
    assert got["out"].dtype == dtype and got["lse"].dtype == op.compute_dtype(dtype)
    compare(got, exact, theirs)
