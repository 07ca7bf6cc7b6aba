"""The grids and properties of tests/kernels/test_frame_{mass,attention}.py with backend "cuda", on the emulated GPU.

Those tests mostly take fp32 and a head size of 32, which the CUDA kernels are not made for; here they take fp16 or bf16
and 64. The other operators' tests run with backend "cuda" where they are.
"""

import functools
import math
from typing import Any

import pytest
import torch
from attention_cases import (
    Case,
    case,
    check_alone_as_in_a_batch,
    check_probabilities,
    compare_attention,
    compare_mass,
)
from attention_layouts import FRAMES, LAYOUTS, VISIBILITIES
from group_cases import LAYOUTS as GROUPS
from group_cases import compare_groups, tensors

from appo_kernels import GroupLayout, frame_attention, frame_mass
from appo_kernels.ops.frame_attention import op as attention_op
from appo_kernels.ops.frame_mass import op as mass_op

BF16, FP16 = torch.bfloat16, torch.float16


def half(dtype: torch.dtype = BF16, **options: Any) -> Case:
    example = case(**{"head_dim": 64} | options)
    return Case(*(t.to(dtype) for t in example[:3]), *example[3:])


# Each pair with one of the element types: which, is neither the layout's nor the visibility's alone.
GRID = [
    (layout, visibility, (BF16, FP16)[(i + j) % 2])
    for i, layout in enumerate(LAYOUTS)
    for j, visibility in enumerate(VISIBILITIES)
]


@pytest.mark.parametrize(("layout", "visibility", "dtype"), GRID)
def test_layouts(layout: str, visibility: str, dtype: torch.dtype) -> None:
    example = case(layout=layout, visibility=visibility, head_dim=64)
    compare_attention("cuda", example, dtype)
    for given in (True, False):
        compare_mass("cuda", example, dtype, given)


# As in tests/kernels, where 32, 37 and 256 have become sizes that have a backward.
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("heads", "rows", "keys", "head_dim"),
    [
        ((3, 3), 1, 5, 64),
        ((7, 1), 111, 63, 128),
        ((14, 2), 5, 150, 64),
        ((8, 1), 17, 40, 128),
        pytest.param((28, 4), 111, 211, 128, marks=pytest.mark.slow),
    ],
)
def test_shapes(dtype: torch.dtype, heads: tuple[int, int], rows: int, keys: int, head_dim: int) -> None:
    example = case(heads=heads, rows=rows, keys=keys, head_dim=head_dim, layout="scattered")
    compare_attention("cuda", example, dtype, reduction="mean", scale=0.2)
    for given in (True, False):
        compare_mass("cuda", example, dtype, given, reduction="mean", scale=0.2)


# Every combination: each is another end of the same kernels.
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("given", [True, False], ids=["lse", "no lse"])
def test_options_and_strides(given: bool, per_head: bool, reduction: str) -> None:
    example = case(heads=(6, 2), layout="unequal", visibility="shared prefix", strided=True, head_dim=64)
    compare_mass("cuda", example, BF16, given, per_head=per_head, reduction=reduction, scale=-0.3)
    if given and per_head:
        compare_attention("cuda", example, FP16, reduction=reduction, scale=-0.3)


# Without and with a given lse: two kernels; rows that see a prefix too, and rows that see nothing.
@pytest.mark.parametrize("given", [True, False], ids=["lse", "no lse"])
@pytest.mark.parametrize("visibility", ["shared prefix", "blind rows"])
def test_probabilities_add_up(visibility: str, given: bool) -> None:
    example = half(heads=(7, 1), rows=63, keys=211, layout="scattered", visibility=visibility)
    check_probabilities("cuda", example, given)


# From a given lse and without: two kernels.
@pytest.mark.parametrize("given", [True, False], ids=["lse", "no lse"])
def test_alone_as_in_a_batch(given: bool) -> None:
    alone = half(batch=1, heads=(7, 1), rows=40, keys=40, layout="interleaved")
    other = half(batch=1, heads=(7, 1), rows=23, keys=23, layout="scattered")
    check_alone_as_in_a_batch("cuda", alone, other, given)


def test_blind_rows_and_sums_of_attention() -> None:
    example = half(rows=63, keys=211, layout="scattered", visibility="blind rows")
    example.query.requires_grad_()
    blind = ~example.seen().any(-1)[:, 0]  # (B, R)
    everywhere = torch.where(example.frame_ids < 0, FRAMES, example.frame_ids)
    got = frame_attention(*example[:3], everywhere, num_frames=FRAMES + 1, backend="cuda", **example.bounds)
    assert not got.out.transpose(1, 2)[blind].any() and not got.mass[blind].any()
    assert bool((got.lse.transpose(1, 2)[blind] == -math.inf).all())
    torch.testing.assert_close(got.mass.sum(-1), (~blind).float(), atol=1e-5, rtol=0)
    (grad_query,) = torch.autograd.grad(got.out.sum() + got.mass.square().sum(), example.query)
    assert not grad_query.transpose(1, 2)[blind].any() and grad_query.isfinite().all()


def test_bitwise_repeatable() -> None:
    results = []
    for _ in range(2):
        example = half(heads=(4, 2), rows=111, keys=150, layout="scattered")
        inputs = [t.requires_grad_() for t in example[:3]]
        output = frame_attention(*inputs, example.frame_ids, num_frames=FRAMES, backend="cuda", **example.bounds)
        total = sum(t.float().square().sum() for t in output)
        results.append([*output, *torch.autograd.grad(total, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# The mass of each head and the mean over heads are added by different kernels.
@pytest.mark.parametrize("per_head", [True, False])
def test_out_accumulates_layers(per_head: bool) -> None:
    layers = [half(rows=9), half(rows=9, heads=(14, 2))]
    layers[1] = layers[1]._replace(query=layers[1].query[:, :7], key=layers[1].key[:, :1])
    run = functools.partial(frame_mass, num_frames=FRAMES, per_head=per_head, backend="cuda")
    single = [run(x.query, x.key, x.frame_ids, **x.bounds) for x in layers]
    # Rows apart in memory, as a slice of a larger buffer, of which nothing else may be touched.
    wide = torch.full((3, *single[0].shape[1:-1], FRAMES + 3), 7.0)
    out = wide[:2, ..., :FRAMES].zero_()
    for layer in layers:
        run(layer.query, layer.key, layer.frame_ids, **layer.bounds, out=out)
    torch.testing.assert_close(out, single[0] + single[1], atol=1e-6, rtol=0)
    assert bool((wide[2:] == 7.0).all() and (wide[..., FRAMES:] == 7.0).all())


# Each result alone: its gradient reaches the inputs by a path of its own.
@pytest.mark.parametrize("result", ["out", "lse", "mass"])
def test_one_result_and_one_gradient(result: str) -> None:
    example = half(heads=(4, 2), rows=20, keys=70)
    whole = []
    for chosen in (example[:3], example[:1], example[1:2], example[2:3]):
        tensors = [t.clone().requires_grad_(any(t is c for c in chosen)) for t in example[:3]]
        output = frame_attention(*tensors, example.frame_ids, num_frames=FRAMES, backend="cuda", **example.bounds)
        wanted = [t for t in tensors if t.requires_grad]
        total = getattr(output, result).float().square().sum()
        if total.requires_grad:
            whole.append(torch.autograd.grad(total, wanted, allow_unused=True))
    for together, alone in zip(whole[0], whole[1:], strict=False):
        assert torch.equal(together, alone[0])


def test_offsets_beyond_32_bits() -> None:
    """Rows 2^25 elements apart, the last ones more than 2^31 from the first. Untouched pages take no memory."""
    example = half(batch=1, heads=(1, 1), rows=70, keys=101)
    expected = frame_attention(*example[:4], num_frames=FRAMES, backend="cuda", **example.bounds)

    def far_apart(tensor: torch.Tensor) -> torch.Tensor:
        rows, spacing = tensor.shape[2], 1 << 25
        wide = torch.empty(rows * spacing, dtype=tensor.dtype).as_strided(tensor.shape, (0, 0, spacing, 1))
        return wide.copy_(tensor)

    spread = (far_apart(t) for t in example[:3])
    got = frame_attention(*spread, example.frame_ids, num_frames=FRAMES, backend="cuda", **example.bounds)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_opcheck() -> None:
    example = half(visibility="shared prefix")
    bounds = tuple(example.bounds[name].int() for name in ("first_key", "last_key", "prefix_keys"))
    ids, lse, mass = example.frame_ids.int(), torch.zeros(2, 7, 13), torch.zeros(2, 13, FRAMES)
    weights, out = torch.rand(2, FRAMES), torch.empty_like(example.query)
    operands = (*example[:3], ids, *bounds, weights, 0.2, out, lse, mass)
    torch.library.opcheck(attention_op.forward_op, (*operands, "cuda"))
    operands = (*example[:2], ids, None, *bounds, weights, 0.2, False, mass, lse)
    torch.library.opcheck(mass_op.forward_op, (*operands, "cuda"))


def test_compiles_without_graph_breaks() -> None:
    example = half(visibility="shared prefix")

    def total(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        mass = frame_mass(2 * query, key, example.frame_ids, num_frames=FRAMES, backend="cuda", **example.bounds)
        return mass.square().sum()

    inputs = [t.requires_grad_() for t in example[:2]]
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    wanted, got = torch.autograd.grad(total(*inputs), inputs), torch.autograd.grad(compiled(*inputs), inputs)
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(a, b)


# Several groups in a row, with and without a response; half the layouts in each type.
@pytest.mark.parametrize(("name", "dtype"), list(zip(GROUPS, [BF16, FP16] * 4, strict=False)))
def test_groups(name: str, dtype: torch.dtype) -> None:
    layout = GroupLayout(*GROUPS[name])
    compare_groups("cuda", layout, tensors(layout, (4, 2), 64), dtype)
