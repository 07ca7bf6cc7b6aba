"""frame_attention against its definition in fp64, its gradients through all three results, and its invariants."""

import functools
import math
from typing import Any

import pytest
import torch
from attention_cases import Case, attention_results, case, compare_attention, small_tiles
from attention_layouts import FRAMES, LAYOUTS, VISIBILITIES
from backends import served
from torch import Tensor

from appo_kernels import frame_attention, frame_mass
from appo_kernels.ops.frame_attention import op, reference
from appo_kernels.testing import peak_extra_bytes

SERVED = served(op.OP, head_dim=32)


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)


def call(function: Any, example: Case, **options: Any) -> Any:
    return function(*example[:4], num_frames=FRAMES, **example.bounds, **options)


# Every layout with every visibility: the two decide together which tiles are masked, skipped or cut.
@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_layouts(tiled: None, backend: str, device: str, layout: str, visibility: str) -> None:
    compare_attention(backend, case(layout=layout, visibility=visibility, device=device), torch.float32)


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
    compare_attention(backend, example, dtype, reduction="mean", scale=0.2)


@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_strides(tiled: None, backend: str, device: str) -> None:
    example = case(heads=(6, 2), layout="unequal", visibility="shared prefix", device=device, strided=True)
    compare_attention(backend, example, torch.float32, scale=-0.3)


@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_attention_of_torch(backend: str, device: str) -> None:
    """out as scaled_dot_product_attention, lse and mass as frame_mass without one."""
    example = case(heads=(14, 2), rows=50, keys=130, visibility="packed", device=device)
    got = call(frame_attention, example, backend=backend)
    expected = torch.nn.functional.scaled_dot_product_attention(*example[:3], attn_mask=example.seen(), enable_gqa=True)
    torch.testing.assert_close(got.out, expected, atol=2e-6, rtol=0)
    mass = frame_mass(
        *example[:2], example.frame_ids, num_frames=FRAMES, lse=got.lse, backend=backend, **example.bounds
    )
    torch.testing.assert_close(got.mass, mass, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_blind_rows_and_sums(tiled: None, backend: str, device: str) -> None:
    example = case(rows=63, keys=211, layout="scattered", visibility="blind rows", device=device).to(torch.float32)
    blind = ~example.seen().any(-1)[:, 0]  # (B, R)
    got = call(frame_attention, example, backend=backend)
    assert not got.out.transpose(1, 2)[blind].any() and not got.mass[blind].any()
    assert bool((got.lse.transpose(1, 2)[blind] == -math.inf).all())
    grad_query = torch.autograd.grad(got.out.sum() + got.mass.square().sum(), example.query)[0]
    assert not grad_query.transpose(1, 2)[blind].any() and grad_query.isfinite().all()
    everywhere = torch.where(example.frame_ids < 0, FRAMES, example.frame_ids)
    mass = frame_attention(*example[:3], everywhere, num_frames=FRAMES + 1, backend=backend, **example.bounds).mass
    torch.testing.assert_close(got.mass, mass[..., :FRAMES], atol=1e-6, rtol=0)
    torch.testing.assert_close(mass.sum(-1), (~blind).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_bitwise_repeatable(backend: str, device: str) -> None:
    results = []
    for _ in range(2):
        example = case(heads=(14, 2), rows=111, keys=300, layout="scattered", device=device).to(torch.float32)
        results.append(attention_results(frame_attention, example, backend=backend).values())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("backend", "device"), SERVED)
def test_alone_as_in_a_batch(tiled: None, backend: str, device: str) -> None:
    """A sequence packed behind another has the results it has alone."""
    alone = case(batch=1, rows=40, keys=40, layout="interleaved", device=device)
    other = case(batch=1, rows=23, keys=23, layout="scattered", device=device)
    expected = call(frame_attention, alone, backend=backend)
    tensors = (torch.cat([a, b], 2) for a, b in zip(other[:3], alone[:3], strict=True))
    ids = torch.cat([other.frame_ids, alone.frame_ids], 1)
    first = torch.cat([torch.zeros(23), torch.full((40,), 23)]).int()[None].to(device)
    last = torch.arange(63, device=device)[None]
    got = frame_attention(*tensors, ids, num_frames=FRAMES, first_key=first, last_key=last, backend=backend)
    for packed, single in ((got.out[:, :, 23:], expected.out), (got.lse[:, :, 23:], expected.lse)):
        torch.testing.assert_close(packed, single, atol=2e-6, rtol=0)
    torch.testing.assert_close(got.mass[:, 23:], expected.mass, atol=1e-6, rtol=0)


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, keys=4, rows=4)
    example = case(heads=(2, 1), rows=5, keys=11, head_dim=2, layout="interleaved", visibility="shared prefix")
    example = example.to(torch.float64)
    for reduction in ("sum", "mean"):
        options = dict(num_frames=FRAMES, reduction=reduction, **example.bounds)
        function = functools.partial(frame_attention, frame_ids=example.frame_ids, **options)
        assert torch.autograd.gradcheck(function, example[:3], fast_mode=reduction == "mean")


# Each result alone: the other two upstream gradients are None then.
@pytest.mark.parametrize("result", ["out", "lse", "mass"])
def test_one_result_and_one_gradient(result: str) -> None:
    example, double = case().to(torch.float32), case().to(torch.float64)
    exact = torch.autograd.grad(getattr(call(reference.frame_attention, double), result).square().sum(), double.key)
    key = example.key
    output = frame_attention(
        example.query.detach(), key, example.value.detach(), example.frame_ids, num_frames=FRAMES, **example.bounds
    )
    got = torch.autograd.grad(getattr(output, result).square().sum(), key)
    torch.testing.assert_close(got[0].double(), exact[0], atol=2e-5, rtol=1e-5)


# Each dimension that may be empty, by itself.
@pytest.mark.parametrize("sizes", [(0, 63, 6), (13, 0, 6), (13, 63, 0)], ids=["no rows", "no keys", "no frames"])
def test_nothing_to_do(sizes: tuple[int, int, int]) -> None:
    rows, keys, num_frames = sizes
    query = torch.randn(2, 4, rows, 8, requires_grad=True)
    key, value = (torch.randn(2, 2, keys, 8, requires_grad=True) for _ in range(2))
    got = frame_attention(query, key, value, torch.full((2, keys), -1), num_frames=num_frames)
    assert got.out.shape == (2, 4, rows, 8) and got.mass.shape == (2, rows, num_frames)
    assert not got.mass.any() and (keys > 0 or not got.out.any())
    (got.out.sum() + got.mass.sum()).backward()
    assert query.grad.isfinite().all() and key.grad.shape == key.shape


# One wrong value of each argument that this operator adds to frame_mass, and of each shared check.
@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("value", {"value": torch.randn(2, 1, 62, 32)}),
        ("value", {"value": torch.randn(2, 1, 63, 32).half()}),
        ("key", {"key": torch.randn(2, 1, 63, 31)}),
        ("frame_ids", {"frame_ids": torch.full((2, 63), FRAMES)}),
        ("last_key", {"last_key": torch.full((2, 13), 63)}),
        ("prefix_keys", {"prefix_keys": torch.full((13,), 3)}),
        ("reduction", {"reduction": "max"}),
    ],
)
def test_refuses(argument: str, wrong: dict[str, Any]) -> None:
    example = case(visibility="all")
    arguments: dict[str, Any] = dict(zip(("query", "key", "value", "frame_ids"), example, strict=False))
    arguments |= {"num_frames": FRAMES} | wrong
    with pytest.raises(ValueError, match=f"frame_attention: `{argument}`: expected .*, got "):
        frame_attention(**arguments)


def test_opcheck() -> None:
    example = case(visibility="shared prefix")
    bounds = (example.bounds[name].int() for name in ("first_key", "last_key", "prefix_keys"))
    shared = (*example[:3], example.frame_ids.int(), *bounds, torch.rand(2, FRAMES), 0.2)
    results = torch.empty_like(example.query), torch.empty(2, 7, 13), torch.zeros(2, 13, FRAMES)
    torch.library.opcheck(op.forward_op, (*shared, *results, "torch"))
    upstream = tuple(torch.randn_like(t) for t in results)
    wanted = tuple(torch.empty_like(t) for t in example[:3])
    torch.library.opcheck(op.backward_op, (*shared, *results[:2], *upstream, *wanted, "torch"))
    torch.library.opcheck(op.backward_op, (*shared, *results[:2], upstream[0], None, None, None, *wanted[1:], "torch"))


# One result leaves upstream gradients out of the graph; all of them do not.
@pytest.mark.parametrize("results", [("out",), ("out", "lse", "mass")])
def test_compiles_without_graph_breaks(results: tuple[str, ...]) -> None:
    example = case(visibility="shared prefix").to(torch.float32)

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = frame_attention(2 * query, key, value, example.frame_ids, num_frames=FRAMES, **example.bounds)
        return sum(getattr(output, name).square().sum() for name in results)  # type: ignore[return-value]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*example[:3]), example[:3])
    for a, b in zip(expected, torch.autograd.grad(compiled(*example[:3]), example[:3]), strict=True):
        torch.testing.assert_close(a, b)


def test_memory() -> None:
    """16,384 keys and 512 rows: beside the results nothing grows with rows x keys."""
    tensors = torch.randn(1, 2, 512, 64), torch.randn(1, 1, 16_384, 64), torch.randn(1, 1, 16_384, 64)
    ids = (torch.arange(16_384) // 64)[None]
    query, key, value = (t.requires_grad_() for t in tensors)
    output = frame_attention(query, key, value, ids, num_frames=256)
    forward = peak_extra_bytes(lambda: frame_attention(query, key, value, ids, num_frames=256))
    total = output.out.sum() + output.mass.square().sum()
    backward = peak_extra_bytes(lambda: torch.autograd.grad(total, (query, key, value), retain_graph=True))
    assert max(forward, backward) < 64 << 20, f"{forward / 2**20:.0f} and {backward / 2**20:.0f} MiB"
