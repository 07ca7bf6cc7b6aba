"""frame_mass against its definition in fp64, its gradients, and what must hold whatever the numbers."""

import functools
import math
from typing import Any

import pytest
import torch
from attention_cases import (
    case,
    check_alone_as_in_a_batch,
    check_probabilities,
    compare_mass,
    mass_results,
    small_tiles,
    true_lse,
)
from attention_layouts import FRAMES, LAYOUTS, VISIBILITIES
from backends import served
from torch import Tensor

from appo_kernels import frame_mass
from appo_kernels.ops.frame_mass import op
from appo_kernels.testing import peak_extra_bytes

SERVED = served(op.OP, head_dim=32)


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)


# Every layout with every visibility: the two decide together which tiles are masked, skipped or cut.
@pytest.mark.parametrize("given", [True, False], ids=["lse", "no lse"])
@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_layouts(tiled: None, backend: str, device: str, layout: str, visibility: str, given: bool) -> None:
    compare_mass(backend, case(layout=layout, visibility=visibility, device=device), torch.float32, given)


# Ratios 1, 7 (no power of two) and 8; one row, odd lengths, primes; head sizes at both ends and a prime one.
@pytest.mark.parametrize(
    ("heads", "rows", "keys", "head_dim"),
    [((3, 3), 1, 5, 32), ((28, 4), 111, 63, 128), ((14, 2), 5, 211, 37), ((8, 1), 17, 40, 256)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_shapes_and_dtypes(
    backend: str, device: str, dtype: torch.dtype, heads: tuple[int, int], rows: int, keys: int, head_dim: int
) -> None:
    example = case(heads=heads, rows=rows, keys=keys, head_dim=head_dim, layout="scattered", device=device)
    for given in (True, False):
        compare_mass(backend, example, dtype, given, reduction="mean", scale=0.2)


# Every combination: each reduces over heads and keys in another place.
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("given", [True, False], ids=["lse", "no lse"])
@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_options(tiled: None, backend: str, device: str, given: bool, per_head: bool, reduction: str) -> None:
    example = case(heads=(6, 2), layout="unequal", visibility="shared prefix", device=device, strided=True)
    compare_mass(backend, example, torch.float32, given, per_head=per_head, reduction=reduction, scale=-0.3)


@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_strides(backend: str, device: str) -> None:
    example = case(heads=(6, 2), layout="interleaved", strided=True, device=device)
    plain = frame_mass(*(t.contiguous() for t in example[:2]), example.frame_ids, num_frames=FRAMES, **example.bounds)
    ids = torch.stack([example.frame_ids, example.frame_ids], -1)[..., 0]  # stride 2
    last_key = example.bounds["last_key"][:1].expand(2, -1)  # stride 0
    strided = frame_mass(example.query, example.key, ids, num_frames=FRAMES, last_key=last_key, backend=backend)
    torch.testing.assert_close(strided, plain, atol=1e-6, rtol=0)
    last_dimension = example.query.transpose(-1, -2).contiguous().transpose(-1, -2)  # stride of the last one not 1
    assert last_dimension.stride(-1) != 1
    odd = frame_mass(last_dimension, example.key, ids, num_frames=FRAMES, last_key=last_key, backend=backend)
    torch.testing.assert_close(odd, plain, atol=1e-6, rtol=0)


# Without and with a given lse: two passes; rows that see a prefix too, and rows that see nothing.
@pytest.mark.parametrize("given", [True, False], ids=["lse", "no lse"])
@pytest.mark.parametrize("visibility", ["shared prefix", "blind rows"])
@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_probabilities_add_up(tiled: None, backend: str, device: str, visibility: str, given: bool) -> None:
    """Mass over the frames + mass elsewhere, as one frame more, = 1; exactly 0 in blind rows."""
    example = case(heads=(7, 1), rows=63, keys=211, layout="scattered", visibility=visibility, device=device)
    check_probabilities(backend, example, given)


# From a given lse and without: two passes.
@pytest.mark.parametrize("given", [True, False], ids=["lse", "no lse"])
@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_bitwise_repeatable(backend: str, device: str, given: bool) -> None:
    example = case(heads=(14, 2), rows=111, keys=300, layout="scattered", device=device)
    lse = true_lse(example) if given else None
    first, second = (mass_results(frame_mass, example.to(torch.float32), lse=lse, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# As above: both passes.
@pytest.mark.parametrize("given", [True, False], ids=["lse", "no lse"])
@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_alone_as_in_a_batch(tiled: None, backend: str, device: str, given: bool) -> None:
    """A sequence padded at the left, and one packed behind another, have the mass they have alone."""
    alone = case(batch=1, heads=(7, 1), rows=40, keys=40, layout="interleaved", device=device)
    other = case(batch=1, heads=(7, 1), rows=23, keys=23, layout="scattered", device=device)
    check_alone_as_in_a_batch(backend, alone, other, given)


# The mass of each head and its mean over heads are added in different places.
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_out_accumulates_layers(backend: str, device: str, per_head: bool) -> None:
    layers = [case(rows=9, device=device) for _ in range(2)]
    layers[1] = layers[1]._replace(query=layers[1].query * 0.5)
    options: dict[str, Any] = {"num_frames": FRAMES, "per_head": per_head, "backend": backend}
    single = [frame_mass(x.query, x.key, x.frame_ids, **x.bounds, **options) for x in layers]
    wide = torch.zeros(*single[0].shape[:-1], FRAMES + 3, device=device)
    out = wide[..., :FRAMES]  # rows apart in memory, as a slice of a larger buffer
    for layer in layers:
        result = frame_mass(layer.query, layer.key, layer.frame_ids, **layer.bounds, **options, out=out)
        assert result is out
    torch.testing.assert_close(out, single[0] + single[1], atol=1e-6, rtol=0)
    assert not wide[..., FRAMES:].any()

    wanted = [layer.to(torch.float32) for layer in layers]
    out = torch.zeros_like(single[0])
    for layer in wanted:
        out = frame_mass(layer.query, layer.key, layer.frame_ids, **layer.bounds, **options, out=out)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, [layer.query for layer in wanted], upstream)
    for layer, gradient in zip(wanted, got, strict=True):
        alone = frame_mass(layer.query, layer.key, layer.frame_ids, **layer.bounds, **options)
        torch.testing.assert_close(gradient, torch.autograd.grad(alone, layer.query, upstream)[0])


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, keys=4, rows=4)
    example = case(heads=(2, 1), rows=5, keys=11, head_dim=2, layout="interleaved", visibility="shared prefix")
    example = example.to(torch.float64)

    def run(query: Tensor, key: Tensor, given: bool, **options: Any) -> Tensor:
        # A given lse follows query and key as in a model, where attention computes it; frame_mass gives it no gradient,
        # and differences of this function agree with the gradient because that is the one of the true mass.
        lse = true_lse(example._replace(query=query, key=key), torch.float64) if given else None
        return frame_mass(query, key, example.frame_ids, num_frames=FRAMES, lse=lse, **example.bounds, **options)

    for given in (True, False):
        for options in ({}, {"reduction": "mean", "per_head": True}):
            inputs = example.query, example.key
            function = functools.partial(run, given=given, **options)
            assert torch.autograd.gradcheck(function, inputs, fast_mode=bool(options))


def test_only_the_gradients_wanted() -> None:
    example = case()
    leaves = example.to(torch.float32)
    together = frame_mass(*leaves[:2], leaves.frame_ids, num_frames=FRAMES, **leaves.bounds)
    both = torch.autograd.grad(together.sum(), leaves[:2])
    for index in range(2):
        query, key = example.query.clone(), example.key.clone()
        wanted = (query, key)[index].requires_grad_()
        mass = frame_mass(query, key, example.frame_ids, num_frames=FRAMES, **example.bounds)
        torch.testing.assert_close(torch.autograd.grad(mass.sum(), wanted)[0], both[index])


# Each dimension that may be empty, by itself.
@pytest.mark.parametrize("sizes", [(0, 63, 6), (13, 0, 6), (13, 63, 0)], ids=["no rows", "no keys", "no frames"])
def test_nothing_to_do(sizes: tuple[int, int, int]) -> None:
    rows, keys, num_frames = sizes
    query, key = torch.randn(2, 4, rows, 8, requires_grad=True), torch.randn(2, 2, keys, 8, requires_grad=True)
    ids = torch.full((2, keys), -1)
    for lse in (None, torch.zeros(2, 4, rows)):
        mass = frame_mass(query, key, ids, num_frames=num_frames, lse=lse)
        assert mass.shape == (2, rows, num_frames) and not mass.any()
        mass.sum().backward()
    assert not query.grad.any() and not key.grad.any()


def test_lse_of_blind_rows() -> None:
    """Some attention kernels mark a row without keys by +inf, others by -inf, and one may leave any number there."""
    example = case(visibility="blind rows")
    lse = true_lse(example)
    blind = torch.isneginf(lse)
    assert blind.any()
    expected = frame_mass(*example[:2], example.frame_ids, num_frames=FRAMES, lse=lse, **example.bounds)
    for mark in (math.inf, -3.0):
        marked = lse.masked_fill(blind, mark)
        got = frame_mass(*example[:2], example.frame_ids, num_frames=FRAMES, lse=marked, **example.bounds)
        assert torch.equal(got, expected)


BAD_CALLS = {
    "query": {"query": torch.randn(2, 13, 32)},
    "key": {"key": torch.randn(2, 1, 63, 16)},
    "query ": {"key": torch.randn(2, 2, 63, 32)},  # 7 query heads on 2 key heads
    "key ": {"key": torch.randn(2, 1, 63, 32).half()},
    "frame_ids": {"frame_ids": torch.zeros(2, 62, dtype=torch.int32)},
    "frame_ids ": {"frame_ids": torch.zeros(2, 63)},
    "frame_ids  ": {"frame_ids": torch.full((2, 63), FRAMES)},
    "frame_ids   ": {"frame_ids": torch.full((2, 63), -2), "reduction": "mean"},
    "num_frames": {"num_frames": -1},
    "lse": {"lse": torch.zeros(2, 7, 12)},
    "lse ": {"lse": torch.zeros(2, 7, 13, dtype=torch.bfloat16)},
    "lse  ": {"lse": torch.full((2, 7, 13), math.nan)},
    "lse   ": {"lse": torch.full((2, 7, 13), math.inf)},
    "first_key": {"first_key": torch.zeros(2, 12, dtype=torch.int32)},
    "last_key": {"last_key": torch.full((2, 13), 63)},
    "prefix_keys": {"prefix_keys": torch.full((2, 13), 64)},
    "prefix_keys ": {"prefix_keys": torch.full((2, 13), -1)},
    "reduction": {"reduction": "max"},
    "out": {"out": torch.zeros(2, 13, FRAMES + 1)},
    "out ": {"out": torch.zeros(2, 13, FRAMES, dtype=torch.bfloat16)},
    "backend": {"backend": "fastest"},
}


# Wrong shapes, dtypes and values, by argument.
@pytest.mark.parametrize("argument", BAD_CALLS)
def test_refuses(argument: str) -> None:
    example = case(visibility="all")
    arguments: dict[str, Any] = {"query": example.query, "key": example.key, "frame_ids": example.frame_ids}
    arguments |= {"num_frames": FRAMES} | BAD_CALLS[argument]
    with pytest.raises(ValueError, match=f"frame_mass: `{argument.strip()}`: expected .*, got "):
        frame_mass(**arguments)


# With an lse given there is none to write: the schema has an output less.
@pytest.mark.parametrize("given", [True, False], ids=["lse", "no lse"])
def test_opcheck(given: bool) -> None:
    example = case(visibility="shared prefix")
    lse = true_lse(example)
    bounds = (example.bounds[name].int() for name in ("first_key", "last_key", "prefix_keys"))
    shared = (example.query, example.key, example.frame_ids.int())
    rest = (*bounds, torch.rand(2, FRAMES), 0.2, False)
    results = (torch.zeros(2, 13, FRAMES), None) if given else (torch.zeros(2, 13, FRAMES), torch.empty_like(lse))
    torch.library.opcheck(op.forward_op, (*shared, lse if given else None, *rest, *results, "torch"))
    gradients = torch.empty_like(example.query), torch.empty_like(example.key)
    upstream = torch.randn(2, 13, FRAMES)
    torch.library.opcheck(op.backward_op, (*shared, lse, *rest, upstream, *gradients, "torch"))
    torch.library.opcheck(op.backward_op, (*shared, lse, *rest, upstream, None, gradients[1], "torch"))


# From a given lse and without: two graphs.
@pytest.mark.parametrize("given", [True, False], ids=["lse", "no lse"])
def test_compiles_without_graph_breaks(given: bool) -> None:
    example = case(visibility="shared prefix").to(torch.float32)
    lse = true_lse(example) if given else None

    def loss(query: Tensor, key: Tensor) -> Tensor:
        mass = frame_mass(
            2 * query, key, example.frame_ids, num_frames=FRAMES, lse=lse, reduction="mean", **example.bounds
        )
        return mass.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = example.query, example.key
    for a, b in zip(
        torch.autograd.grad(loss(*inputs), inputs), torch.autograd.grad(compiled(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        out = torch.zeros(2, 13, FRAMES)
        accumulate = torch.compile(
            lambda q, k: frame_mass(q, k, example.frame_ids, num_frames=FRAMES, out=out, **example.bounds),
            fullgraph=True,
            backend="aot_eager",
        )
        for _ in range(2):
            accumulate(*inputs)
        expected = frame_mass(*inputs, example.frame_ids, num_frames=FRAMES, **example.bounds)
    torch.testing.assert_close(out, 2 * expected)


# The bound of the issue: 16,384 keys and 512 rows; the scores of one head alone would be 32 MiB, of all heads 896.
@pytest.mark.parametrize("given", [True, False], ids=["lse", "no lse"])
def test_memory(given: bool) -> None:
    query, key = torch.randn(1, 7, 512, 64), torch.randn(1, 1, 16_384, 64)
    ids = (torch.arange(16_384) // 64)[None]
    lse = torch.full((1, 7, 512), 12.0) if given else None
    frame_mass(query[..., :9, :], key, ids, num_frames=256, lse=None if lse is None else lse[..., :9])  # libraries load
    extra = peak_extra_bytes(lambda: frame_mass(query, key, ids, num_frames=256, lse=lse))
    assert extra < 64 << 20, f"{extra / 2**20:.0f} MiB"


def test_memory_of_the_backward() -> None:
    query, key = torch.randn(1, 2, 512, 64, requires_grad=True), torch.randn(1, 1, 16_384, 64, requires_grad=True)
    ids = (torch.arange(16_384) // 64)[None]
    mass = frame_mass(query, key, ids, num_frames=256)
    extra = peak_extra_bytes(lambda: torch.autograd.grad(mass.sum(), (query, key), retain_graph=True))
    assert extra < 64 << 20, f"{extra / 2**20:.0f} MiB"
