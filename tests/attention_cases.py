"""Inputs that the tests of the attention operators share, their results by name, and the comparison with fp64."""

from typing import Any, NamedTuple

import torch
from attention_layouts import FRAMES, bounds, frames
from torch import Tensor

from appo_kernels import frame_attention, frame_mass
from appo_kernels.attention.reference import visible_keys
from appo_kernels.ops.frame_attention import reference as attention_reference
from appo_kernels.ops.frame_mass import reference as mass_reference
from appo_kernels.testing import compare


class Case(NamedTuple):
    query: Tensor  # (B, Hq, R, d)
    key: Tensor  # (B, Hkv, S, d)
    value: Tensor
    frame_ids: Tensor  # (B, S)
    bounds: dict[str, Tensor]  # first_key, last_key, prefix_keys (B, R)

    def to(self, dtype: torch.dtype) -> "Case":
        """Leaves of their own, so that each implementation gets its own gradients."""
        tensors = (t.detach().to(dtype).requires_grad_() for t in self[:3])
        return Case(*tensors, self.frame_ids, self.bounds)

    def seen(self) -> Tensor:
        """(B, 1, R, S) bool."""
        bounds = (self.bounds.get(name) for name in ("first_key", "last_key", "prefix_keys"))
        return visible_keys(self.query, self.key.shape[2], *bounds)


def case(
    *,
    batch: int = 2,
    heads: tuple[int, int] = (7, 1),
    rows: int = 13,
    keys: int = 63,
    head_dim: int = 32,
    layout: str = "equal",
    visibility: str = "causal",
    device: str = "cpu",
    strided: bool = False,
) -> Case:
    generator = torch.Generator().manual_seed(rows * keys)

    def random(heads: int, length: int) -> Tensor:
        if strided:  # heads next to each other and a padded last dimension, as a fused projection leaves them
            wide = torch.randn(batch, length, heads, head_dim + 8, generator=generator)
            return wide[..., :head_dim].transpose(1, 2).to(device)
        return torch.randn(batch, heads, length, head_dim, generator=generator).to(device)

    tensors = random(heads[0], rows), random(heads[1], keys), random(heads[1], keys)
    limits = {name: bound.to(device) for name, bound in bounds(visibility, batch, rows, keys).items()}
    return Case(*tensors, frames(layout, batch, keys).to(device), limits)


def small_tiles(monkeypatch: Any, keys: int = 20, rows: int = 17) -> None:
    """So that the small cases take several tiles of rows and of keys, with remainders, and frames cut in two."""
    from appo_kernels.attention import torch_passes as attention
    from appo_kernels.ops.frame_mass import streaming as mass

    for module in (attention, mass):
        monkeypatch.setattr(module, "MAX_KEYS", keys)
        monkeypatch.setattr(module, "TILE_SCORES", keys * rows)
    monkeypatch.setattr(mass, "MIN_KEYS", 1)


def true_lse(example: Case, dtype: torch.dtype = torch.float32, scale: float | None = None) -> Tensor:
    """(B, Hq, R) log-sum-exp over all visible keys, computed in fp64."""
    double = example.to(torch.float64)
    output = attention_reference.frame_attention(*double[:4], num_frames=FRAMES, scale=scale, **double.bounds)
    return output.lse.detach().to(dtype)


def random_upstream(results: tuple[Tensor, ...]) -> list[Tensor]:
    """A gradient of every result, the same numbers rounded to its dtype. A blind row's lse of -inf is a constant: 0."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in results]
    return [torch.where(x.isneginf(), 0, upstream) for x, upstream in zip(results, drawn, strict=True)]


def attention_results(function: Any, example: Case, gradients: bool = True, **options: Any) -> dict[str, Tensor]:
    """out, lse, mass, and the gradients through all three."""
    with torch.set_grad_enabled(gradients):
        output = function(*example[:4], num_frames=FRAMES, **example.bounds, **options)
    results = {name: tensor.detach() for name, tensor in output._asdict().items()}
    if gradients:
        wanted = torch.autograd.grad(tuple(output), example[:3], random_upstream(output))
        results |= dict(zip(("grad_query", "grad_key", "grad_value"), wanted, strict=True))
    return results


def mass_results(function: Any, example: Case, gradients: bool = True, **options: Any) -> dict[str, Tensor]:
    """The mass and the gradients through it."""
    with torch.set_grad_enabled(gradients):
        mass = function(*example[:2], example.frame_ids, num_frames=FRAMES, **example.bounds, **options)
    results = {"mass": mass.detach()}
    if gradients:
        wanted = torch.autograd.grad(mass, example[:2], *random_upstream((mass,)))
        results |= dict(zip(("grad_query", "grad_key"), wanted, strict=True))
    return results


def compare_attention(
    backend: str, example: Case, dtype: torch.dtype, *, gradients: bool = True, **options: Any
) -> None:
    """frame_attention in ``dtype`` against its definition in fp64, beside the definition in ``dtype``."""
    rounded = example.to(dtype)
    got = attention_results(frame_attention, rounded, gradients, backend=backend, **options)
    assert (got["out"].dtype, got["lse"].dtype, got["mass"].dtype) == (dtype, torch.float32, torch.float32)
    exact, framework = (
        attention_results(attention_reference.frame_attention, rounded.to(kind), **options)
        for kind in (torch.float64, dtype)
    )
    compare(got, exact, framework)


def compare_mass(
    backend: str, example: Case, dtype: torch.dtype, given: bool, *, gradients: bool = True, **options: Any
) -> None:
    """frame_mass in ``dtype``, from the true lse or from none, as ``compare_attention``."""
    rounded = example.to(dtype)
    lse = true_lse(rounded, scale=options.get("scale")) if given else None
    got = mass_results(frame_mass, rounded, gradients, backend=backend, lse=lse, **options)
    assert got["mass"].dtype == torch.float32
    assert all(tensor.dtype == dtype for name, tensor in got.items() if name.startswith("grad"))
    exact, framework = (
        mass_results(mass_reference.frame_mass, rounded.to(kind), **options) for kind in (torch.float64, dtype)
    )
    compare(got, exact, framework)


def check_probabilities(backend: str, example: Case, given: bool) -> None:
    """Mass over the frames + mass elsewhere, as one frame more, = 1; exactly 0 in blind rows."""
    everywhere = torch.where(example.frame_ids < 0, FRAMES, example.frame_ids)
    lse = true_lse(example) if given else None
    options: dict[str, Any] = dict(example.bounds, lse=lse, backend=backend)
    mass = frame_mass(example.query, example.key, example.frame_ids, num_frames=FRAMES, **options)
    total = frame_mass(example.query, example.key, everywhere, num_frames=FRAMES + 1, **options)
    sighted = example.seen().any(-1)[:, 0]  # (B, R)
    torch.testing.assert_close(mass.sum(-1) + total[..., -1], sighted.float(), atol=1e-6, rtol=0)
    assert not mass[~sighted].any() and not total[~sighted].any()
    assert not mass[..., 2].any()  # a frame without keys


def check_alone_as_in_a_batch(backend: str, alone: Case, other: Case, given: bool) -> None:
    """``alone`` behind ``other``, packed and padded at the left, has the mass that it has alone."""
    before_rows, rows, device = other.query.shape[2], alone.query.shape[2], alone.query.device
    options: dict[str, Any] = {"num_frames": FRAMES, "backend": backend}
    if given:
        options["lse"] = true_lse(alone)
    expected = frame_mass(*alone[:2], alone.frame_ids, **options, **alone.bounds)
    query, key = (torch.cat([a, b], 2) for a, b in zip(other[:2], alone[:2], strict=True))
    first = torch.cat([torch.zeros(before_rows), torch.full((rows,), before_rows)]).int()[None].to(device)
    last = torch.arange(before_rows + rows, device=device, dtype=torch.int32)[None]
    for before in (other.frame_ids, torch.full_like(other.frame_ids, -1)):  # packed, padded
        if given:
            options["lse"] = torch.cat([true_lse(other), true_lse(alone)], 2)
        ids = torch.cat([before, alone.frame_ids], 1)
        packed = frame_mass(query, key, ids, first_key=first, last_key=last, **options)
        torch.testing.assert_close(packed[:, before_rows:], expected, atol=1e-6, rtol=0)
