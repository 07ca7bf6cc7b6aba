"""The shipped attention kernels, compiled for sm_80 and executed, against the fp64 reference on hostile layouts."""

import math

import attention_layouts as layouts
import backend_calls as calls
import pytest
import torch

from appo_kernels import testing
from appo_kernels.attention import triton_mass
from appo_kernels.ops.frame_mass import reference as mass_reference
from appo_kernels.ops.frame_mass import streaming
from appo_kernels.ops.frame_mass import triton as frame_mass
from ptxsim import triton_device

SCALE = 0.21


def check(layout, query_heads, key_heads, head_dim, dtype, *, seed, scale=SCALE, weights=None):
    """Runs forward and backward under one warp schedule and compares; returns the results."""
    inputs = calls.tensors(layout, query_heads, key_heads, head_dim, dtype)
    grads = calls.upstream(layout, inputs)
    expected = calls.expected_attention(layout, inputs, scale=scale, grads=grads, weights=weights)
    framework = calls.attention(layout, inputs, "torch", scale=scale, grads=grads, weights=weights)
    with triton_device.simulated(seed=seed) as device:
        got = calls.attention(layout, inputs, "triton", scale=scale, grads=grads, weights=weights)
    assert {"online_kernel", "mass_from_tiles_kernel", "delta_kernel", "query_kernel", "key_kernel"} <= {
        launch.name for launch in device.launches
    }
    calls.compare(got, expected, framework)
    return got


def test_attention_bf16():
    """7 query heads to a key/value head, two of these; two schedules give the same bits."""
    first = check(layouts.hostile(), 14, 2, 64, torch.bfloat16, seed=0)
    inputs = calls.tensors(layouts.hostile(), 14, 2, 64, torch.bfloat16)
    with triton_device.simulated(seed=1):
        second = calls.attention(layouts.hostile(), inputs, "triton", scale=SCALE)
    for a, b in zip(first, second, strict=False):
        assert torch.equal(a, b)


def mass_arguments(head_dim=64, dtype=torch.bfloat16):
    layout = layouts.hostile()
    query, key, _ = calls.tensors(layout, 14, 2, head_dim, dtype)
    bounds = dict(zip(("first_key", "last_key", "prefix_keys"), layout.bounds, strict=True))
    options = {"num_frames": layout.num_frames, "scale": SCALE, **bounds}
    expected = mass_reference.frame_mass(query.double(), key.double(), layout.frame_ids, per_head=True, **options)
    lse = calls.expected_attention(
        layout, (query, key, key), scale=SCALE, grads=calls.upstream(layout, (query, key, key))
    )[1].detach()  # fmt: skip
    return layout, query, key, expected.detach(), lse.float()


def run_mass(module, layout, query, key, lse, *, per_head=False, weights=None):
    """Mass on top of ones, into a buffer with frames first in memory; and the lse when none is given."""
    B, Hq, R, _ = query.shape
    shape = (layout.num_frames, B, Hq, R) if per_head else (layout.num_frames, B, R)
    mass = torch.ones(shape).movedim(0, -1)
    new_lse = torch.full((B, Hq, R), float("nan")) if lse is None else None
    mass_BHRF = mass if per_head else mass[:, None]
    module.forward(query, key, layout.operands(SCALE, weights), lse, mass_BHRF, new_lse, per_head)
    return mass - 1, new_lse


def test_replay_bf16(monkeypatch):
    """From a given lse, where empty rows are marked by +inf as by -inf; heads in one program or split over programs."""
    layout, query, key, expected, lse = mass_arguments()
    lse[0, :7] = torch.where(lse[0, :7] == float("-inf"), float("inf"), lse[0, :7])
    framework, _ = run_mass(streaming, layout, query, key, lse)
    results = []
    for programs_wanted in (0, 1 << 20):
        monkeypatch.setattr(triton_mass, "multiprocessors", lambda device, n=programs_wanted: n)
        with triton_device.simulated(seed=2) as device:
            results.append(run_mass(frame_mass, layout, query, key, lse)[0])
        names = [launch.name for launch in device.launches]
        assert names == ["plan_kernel", "mass_from_lse_kernel", *(["accumulate_kernel"] if programs_wanted else [])]
    assert torch.equal(*results)
    testing.assert_as_good_as(results[0], expected.mean(1), framework, atol=3e-6, name="mass")


@pytest.mark.slow
def test_mass_per_head_and_weighted_bf16():
    layout, query, key, expected, lse = mass_arguments()
    weights = torch.rand(2, layout.num_frames)
    for given in (lse, None):
        with triton_device.simulated(seed=3):
            got, new_lse = run_mass(frame_mass, layout, query, key, given, per_head=True, weights=weights)
        want = expected * weights[:, None, None].double()
        assert (got.double() - want).abs().max() < 3e-6
        if new_lse is not None:
            assert torch.equal(new_lse.isfinite(), lse.isfinite())
            assert (new_lse - lse).nan_to_num(0, 0, 0).abs().max() < 1e-5


# Head sizes that are padded (80, 96), the smallest, the common and the largest; fp16 and true fp32 products.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "head_dim", "query_heads", "key_heads"),
    [
        (torch.bfloat16, 128, 7, 1),
        (torch.bfloat16, 80, 3, 1),
        (torch.bfloat16, 256, 2, 2),
        (torch.float16, 96, 4, 2),
        (torch.float32, 32, 7, 1),
        (torch.float32, 128, 2, 1),
    ],
)
def test_attention_types_and_head_sizes(dtype, head_dim, query_heads, key_heads):
    check(layouts.hostile(), query_heads, key_heads, head_dim, dtype, seed=head_dim)


@pytest.mark.slow
def test_attention_without_bounds_and_with_weights():
    weights = torch.rand(1, 2)
    check(layouts.everything_visible(), 5, 1, 64, torch.bfloat16, seed=4, weights=weights, scale=-SCALE)


@pytest.mark.slow
def test_equal_alone_and_left_padded():
    """The bits of a sequence do not depend on who else is in the batch, those of a row not on the padding before it."""
    layout = layouts.hostile()
    inputs = calls.tensors(layout, 7, 1, 64, torch.bfloat16)
    grads = calls.upstream(layout, inputs)
    with triton_device.simulated():
        together = calls.attention(layout, inputs, "triton", scale=SCALE, grads=grads)
    own = layouts.LayoutCase(layout.frame_ids[1:], 6, *(bound[1:] for bound in layout.bounds), layout.rows)
    with triton_device.simulated():
        result = calls.attention(
            own, [t[1:] for t in inputs], "triton", scale=SCALE, grads=[grad[1:] for grad in grads]
        )
    for name, a, b in zip(calls.NAMES, result, together, strict=True):
        assert torch.equal(a, b[1:]), name
    pad, rows = 9, slice(2, 40)  # the first sequence sees nothing before key 9
    alone = layouts.LayoutCase(
        layout.frame_ids[:1, pad:], 6, layout.first_key[:1, rows] - pad, layout.last_key[:1, rows] - pad, None, 38
    )
    query, key, value = inputs
    cut = query[:1, :, rows], key[:1, :, pad:], value[:1, :, pad:]
    with triton_device.simulated():
        result = calls.attention(alone, cut, "triton", scale=SCALE)
    for name, a, b in zip(calls.NAMES, result, together, strict=False):
        b = b[:1, rows] if name == "mass" else b[:1, :, rows]
        assert torch.equal(a, b), name


# One key before a tile of 32 or 64 keys ends, for all rows of a tile; a negative scale; a value whose strides are not
# the key's; frames so small that whole tiles are of several.
@pytest.mark.parametrize("at", [31, 63, 127])
@pytest.mark.parametrize("kind", ["prefix", "last", "first"])
def test_ends_of_tiles(kind, at):
    S, R = 160, 7
    ids = (torch.arange(S, dtype=torch.int32) // 5)[None]
    ids = torch.where(ids < 26, ids, -1)
    same = layouts.ints(torch.full((R,), at))
    nothing = torch.full_like(same, -1)
    bounds = {"prefix": (None, nothing, same), "last": (None, same, None), "first": (same, None, None)}[kind]
    layout = layouts.LayoutCase(ids, 26, *bounds, R)
    query, key, value = calls.tensors(layout, 2, 1, 32, torch.float16)
    wide = torch.full((*value.shape[:3], 48), math.nan, dtype=value.dtype)
    wide[..., :32] = value
    inputs = query, key, wide[..., :32]
    grads = calls.upstream(layout, inputs)
    expected = calls.expected_attention(layout, inputs, scale=-0.3, grads=grads)
    framework = calls.attention(layout, inputs, "torch", scale=-0.3, grads=grads)
    with triton_device.simulated():
        got = calls.attention(layout, inputs, "triton", scale=-0.3, grads=grads)
    calls.compare(got, expected, framework)
