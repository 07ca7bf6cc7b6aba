"""Inputs that attention kernels get wrong first, and the comparison of a backend with the fp64 reference on them."""

import math
from dataclasses import dataclass

import torch

from appo_kernels import dispatch, testing
from appo_kernels.attention import arguments
from appo_kernels.ops.frame_attention import reference


@dataclass(frozen=True)
class Layout:
    frame_ids: torch.Tensor  # (B, S) int32
    num_frames: int
    first_key: torch.Tensor | None  # (B, R) int32
    last_key: torch.Tensor | None
    prefix_keys: torch.Tensor | None
    rows: int

    @property
    def bounds(self):
        return self.first_key, self.last_key, self.prefix_keys

    def operands(self, scale: float, weights: torch.Tensor | None = None) -> arguments.Layout:
        """As backends take it."""
        return arguments.Layout(self.frame_ids, *self.bounds, weights, scale)


def runs(keys: int, *spans: tuple[int, int, int]) -> torch.Tensor:
    """(keys,) ids: -1 but for (frame, start, length) spans."""
    ids = torch.full((keys,), -1, dtype=torch.int32)
    for frame, start, length in spans:
        ids[start : start + length] = frame
    return ids


def ints(*rows: list[int] | torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.as_tensor(row) for row in rows]).int()


def hostile() -> Layout:
    """Two sequences with different layouts, 41 rows.

    First: a frame of exactly one tile, one that leaves a remainder, one split in two by text, three small ones that
    share a tile, one with no key; left padding; causal rows at the end, the last of them empty (first > last).
    Second: interleaved and single-key frames; rows that see a shared prefix and a window of their own.
    """
    S, R = 203, 41
    first = runs(S, (0, 15, 64), (1, 80, 33), (1, 120, 20), (2, 113, 5), (4, 145, 3), (5, 150, 9))
    second = runs(S, (3, 0, 1), (0, 199, 4))
    second[10:130] = torch.arange(120, dtype=torch.int32) % 3
    rows = torch.arange(R)
    causal = rows + S - R
    first_key = ints(torch.full((R,), 9), 150 + rows // 2)
    last_key = ints(causal.clone(), causal)
    first_key[0, -1], last_key[0, -1] = 5, 4
    last_key[0, 0] = 12  # sees keys, but none of a frame
    prefix = ints(torch.zeros(R), torch.full((R,), 77))
    prefix[1, 5], first_key[1, 5], last_key[1, 5] = 0, 1, 0
    prefix[1, 6], first_key[1, 6], last_key[1, 6] = 160, 140, 202  # prefix and interval overlap
    return Layout(torch.stack([first, second]), 6, first_key, last_key, prefix, R)


def everything_visible() -> Layout:
    """No bounds at all: rows see every key, and there is a frame for every key."""
    S = 130
    return Layout(runs(S, (0, 0, 70), (1, 70, 60))[None], 2, None, None, None, 19)


def tensors(layout: Layout, query_heads: int, key_heads: int, head_dim: int, dtype: torch.dtype):
    """query, key, value, not contiguous: (B, S, heads, d) in memory, as projections leave them."""
    generator = torch.Generator().manual_seed(head_dim)
    B, S = layout.frame_ids.shape

    def make(length: int, heads: int) -> torch.Tensor:
        return torch.randn(B, length, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)

    return make(layout.rows, query_heads), make(S, key_heads), make(S, key_heads)


def attention(layout: Layout, inputs, backend: str, *, scale: float, grads=None, weights=None):
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
    module.forward(*common, out, lse, mass[:, None])
    if grads is None:
        return out, lse, mass
    gradients = arguments.Gradients(*(torch.full(t.shape, math.nan, dtype=t.dtype, device=device) for t in inputs))
    grad_out, grad_lse, grad_mass = grads
    upstream = arguments.Upstream(grad_out.to(query.dtype), grad_lse.to(compute), grad_mass.to(compute)[:, None])
    module.backward(*common, out, lse, upstream, gradients)
    return out, lse, mass, *gradients


def expected_attention(layout: Layout, inputs, *, scale: float, grads, weights=None):
    """The same by the reference in fp64 and ordinary autograd."""
    leaves = [t.detach().double().requires_grad_() for t in inputs]
    bounds = dict(zip(("first_key", "last_key", "prefix_keys"), layout.bounds, strict=True))
    result = reference.frame_attention(*leaves, layout.frame_ids, num_frames=layout.num_frames, scale=scale, **bounds)
    mass = result.mass if weights is None else result.mass * weights.double()[:, None]
    finite = torch.where(result.lse.isfinite(), result.lse, 0.0)
    total = (result.out * grads[0]).sum() + (finite * grads[1]).sum() + (mass * grads[2]).sum()
    return result.out, result.lse, mass, *torch.autograd.grad(total, leaves)


def upstream(layout: Layout, inputs) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    query, dtype = inputs[0], inputs[0].dtype
    out = torch.randn(query.shape, generator=generator).to(dtype).double()  # exact in the dtype under test
    lse = torch.randn(query.shape[:3], generator=generator).double()
    mass = 5 * torch.randn(query.shape[0], query.shape[2], layout.num_frames, generator=generator).double()
    return out, lse, mass


NAMES = ("out", "lse", "mass", "grad_query", "grad_key", "grad_value")


def compare(got, expected, framework) -> None:
    for i, (name, *results) in enumerate(zip(NAMES[: len(got)], got, expected, framework, strict=False)):
        testing.assert_as_good_as(*results, factor=2.0 if i < 3 else 3.0, atol=3e-6, name=name)
