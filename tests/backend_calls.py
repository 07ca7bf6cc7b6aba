"""The attention backends' own functions, called with buffers full of NaN, and what they must give."""

import math

import torch
from attention_layouts import LayoutCase

from appo_kernels import dispatch, testing
from appo_kernels.attention import arguments
from appo_kernels.ops.frame_attention import reference


def tensors(layout: LayoutCase, query_heads: int, key_heads: int, head_dim: int, dtype: torch.dtype):
    """query, key, value, not contiguous: (B, S, heads, d) in memory, as projections leave them."""
    generator = torch.Generator().manual_seed(head_dim)
    B, S = layout.frame_ids.shape

    def make(length: int, heads: int) -> torch.Tensor:
        return torch.randn(B, length, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)

    return make(layout.rows, query_heads), make(S, key_heads), make(S, key_heads)


def attention(layout: LayoutCase, inputs, backend: str, *, scale: float, grads=None, weights=None):
    """out, lse, mass and, for upstream gradients, those of query, key, value; by the backend's own functions.

    All buffers that the operators allocate come filled with NaN.
    """
    query = inputs[0]
    module = dispatch.implementation("frame_attention", backend)
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    device = query.device
    out = torch.full(query.shape, math.nan, dtype=query.dtype, device=device)
    lse = torch.full(query.shape[:3], math.nan, dtype=compute, device=device)
    mass = torch.zeros(query.shape[0], query.shape[2], layout.num_frames, dtype=compute, device=device)
    common = (*inputs, layout.operands(scale, weights))
    module.forward(*common, out, lse, mass[:, None], per_head=False)
    if grads is None:
        return out, lse, mass
    gradients = arguments.Gradients(*(torch.full(t.shape, math.nan, dtype=t.dtype, device=device) for t in inputs))
    grad_out, grad_lse, grad_mass = grads
    upstream = arguments.Upstream(grad_out.to(query.dtype), grad_lse.to(compute), grad_mass.to(compute)[:, None])
    module.backward(*common, out, lse, upstream, gradients, per_head=False)
    return out, lse, mass, *gradients


def expected_attention(layout: LayoutCase, inputs, *, scale: float, grads, weights=None):
    """The same by the reference in fp64 and ordinary autograd."""
    leaves = [t.detach().double().requires_grad_() for t in inputs]
    bounds = dict(zip(("first_key", "last_key", "prefix_keys"), layout.bounds, strict=True))
    result = reference.frame_attention(*leaves, layout.frame_ids, num_frames=layout.num_frames, scale=scale, **bounds)
    mass = result.mass if weights is None else result.mass * weights.double()[:, None]
    finite = torch.where(result.lse.isfinite(), result.lse, 0.0)
    total = (result.out * grads[0]).sum() + (finite * grads[1]).sum() + (mass * grads[2]).sum()
    return result.out, result.lse, mass, *torch.autograd.grad(total, leaves)


def upstream(layout: LayoutCase, inputs) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    query, dtype = inputs[0], inputs[0].dtype
    out = torch.randn(query.shape, generator=generator).to(dtype).double()  # exact in the dtype under test
    lse = torch.randn(query.shape[:3], generator=generator).double()
    mass = 5 * torch.randn(query.shape[0], query.shape[2], layout.num_frames, generator=generator).double()
    return out, lse, mass


NAMES = ("out", "lse", "mass", "grad_query", "grad_key", "grad_value")


def compare(got, expected, framework) -> None:
    """Of results in the order of NAMES, of which ``got`` may lack the gradients."""
    testing.compare(*(dict(zip(NAMES, results, strict=False)) for results in (got, expected, framework)), atol=3e-6)
