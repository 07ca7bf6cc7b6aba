"""The shipped attention kernels compiled for sm_90 (wgmma) and executed, matrix layouts one by one, and faults.

A wrong product, descriptor or fragment gives wrong numbers against fp64; a wait, fence or barrier that is missing from
the compiled kernel, or a wrong descriptor in it, is seen.
"""

import re

import attention_layouts as layouts
import backend_calls as calls
import pytest
import torch
import triton
import triton.language as tl

import ptxsim
from ptxsim import triton_device

SCALE = 0.21


@triton.jit
def product_kernel(
    p_a, p_b, p_c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TA: tl.constexpr, TB: tl.constexpr
):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a = tl.load(p_a + (k[:, None] * M + m.T if TA else m * K + k[None, :]))
    b = tl.load(p_b + (n.T * K + k[None, :] if TB else k[:, None] * N + n))
    c = tl.dot(a.T if TA else a, b.T if TB else b, input_precision="tf32")
    tl.store(p_c + m * N + n, c)


# Rows of 32, 64 and 128 bytes along the contiguous axis, that axis being K or M/N; more than one atom along each axis.
SHAPES = ((64, 16, 16), (64, 32, 32), (128, 64, 64), (64, 128, 128), (128, 256, 64), (256, 8, 32))
FLIPS = ((False, False), (False, True), (True, False), (True, True))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# All 72 of them.
ALL = [(dtype, shape, flips) for dtype in DTYPES for shape in SHAPES for flips in FLIPS]
# Of the 72, those of four shapes once in each transposition, each dtype and each width of a row among them.
FAST = [(DTYPES[i % 3], SHAPES[(i + i // 4) % 4], FLIPS[i % 4]) for i in range(12)]


@pytest.mark.parametrize(
    ("dtype", "shape", "flips"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in FAST)],
)
def test_layouts(dtype, shape, flips):
    M, N, K = shape
    a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    if dtype == torch.float32:  # exact in tf32
        a, b = ((t.view(torch.int32) & -0x2000).view(torch.float32) for t in (a, b))
    c = torch.full((M, N), float("nan"))
    with triton_device.simulated(arch=90, seed=0) as device:
        inputs = [t.T.contiguous() if flip else t for t, flip in zip((a, b), flips, strict=True)]
        product_kernel[(1,)](*inputs, c, M, N, K, *flips)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)
    assert device.launches[0].statistics.opcodes["wgmma"] or N < 16


def small_layouts() -> list[layouts.LayoutCase]:
    """Together they run every place of the kernel: tiles without a mask before masked ones, only such, only masked."""
    S, R = 390, 20
    ids = layouts.runs(S, (0, 3, 130), (1, 150, 64))[None]
    last_key = layouts.ints(torch.where(torch.arange(R) < 18, 7 * torch.arange(R) + 200, S - 1))
    whole = layouts.runs(192, (0, 0, 128), (1, 128, 64))[None]
    everything = layouts.ints(torch.full((8,), 191))  # bounds that hide nothing: the same compiled kernel
    return [
        layouts.LayoutCase(ids, 2, None, last_key, None, R),
        layouts.LayoutCase(whole, 2, None, everything, None, 8),
    ]


# The two head sizes of models: one and two groups of 64 columns.
@pytest.mark.parametrize("head_dim", [64, 128])
def test_forward(head_dim):
    """Mass and attention of two small layouts: tiles without a mask, with one, and both."""
    for layout in small_layouts():
        inputs = calls.tensors(layout, 7, 1, head_dim, torch.bfloat16)
        grads = calls.upstream(layout, inputs)
        expected = calls.expected_attention(layout, inputs, scale=0.3, grads=grads)
        framework = calls.attention(layout, inputs, "torch", scale=0.3)
        with triton_device.simulated(arch=90, seed=0) as device:
            got = calls.attention(layout, inputs, "triton", scale=0.3)
        assert all(launch.statistics.opcodes["wgmma"] for launch in device.launches if launch.name == "online_kernel")
        calls.compare(got, expected, framework)


# Every head size that has products of its own shape: one and two groups of 64 columns, a padded one; both 16-bit types.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads", "key_heads"),
    [
        (torch.bfloat16, 32, 7, 1),
        (torch.bfloat16, 64, 14, 2),
        (torch.bfloat16, 80, 3, 1),
        (torch.bfloat16, 128, 7, 1),
        (torch.bfloat16, 256, 2, 2),
        (torch.float16, 96, 4, 2),
        (torch.float32, 32, 7, 1),
    ],
)
def test_attention(dtype, head_dim, heads, key_heads):
    """Forward, replay of small frames and gradients on hostile layouts; two schedules give the same bits."""
    layout = layouts.hostile()
    inputs = calls.tensors(layout, heads, key_heads, head_dim, dtype)
    grads = calls.upstream(layout, inputs)
    expected = calls.expected_attention(layout, inputs, scale=SCALE, grads=grads)
    framework = calls.attention(layout, inputs, "torch", scale=SCALE, grads=grads)
    results = []
    for seed in (0, 1):
        with triton_device.simulated(arch=90, seed=seed) as device:
            results.append(calls.attention(layout, inputs, "triton", scale=SCALE, grads=grads))
        for name in ("online_kernel", "mass_from_lse_kernel") if dtype != torch.float32 else ():
            assert next(launch for launch in device.launches if launch.name == name).statistics.opcodes["wgmma"]
    calls.compare(results[0], expected, framework)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# name: (pattern in the PTX of the forward kernel, what replaces it, head size, how many of the places must be seen)
FAULTS = {
    "no wait": (r"wgmma\.wait_group\.sync\.aligned 0;", "", 64, "all"),
    "no commit": (r"wgmma\.commit_group\.sync\.aligned;", "", 64, "all"),
    "no wgmma.fence": (r"wgmma\.fence\.sync\.aligned;", "", 64, "some"),
    "no proxy fence": (r"fence\.proxy\.async\.shared::cta;", "", 64, "some"),
    "no copy wait": (r"cp\.async\.wait_group\s+0;", "", 64, "some"),
    "no barrier": (r"bar\.sync\s+0;", "", 64, "some"),
    "half the stride": (r"4611686293305294848", str(1 << 62 | 32 << 32), 64, "all"),
    "twice the stride": (r"4611686293305294848", str(1 << 62 | 128 << 32), 64, "all"),
    "64-byte swizzle": (r"4611686293305294848", str(2 << 62 | 64 << 32), 64, "all"),
    "half the leading offset": (r"4611686293338849280", str(1 << 62 | 64 << 32 | 256 << 16), 128, "all"),
    "B not transposed": (r"(wgmma\.mma_async[^;]*, \S+, 1, 1), 1;", r"\1, 0;", 64, "all"),
    "A negated": (r"(wgmma\.mma_async[^;]*, \S+), 1, 1, 0, 0;", r"\1, -1, 1, 0, 0;", 64, "all"),
}


def run_forward(head_dim: int, seed: int):
    results, launches = [], []
    for layout in small_layouts():
        inputs = calls.tensors(layout, 7, 1, head_dim, torch.bfloat16)
        with triton_device.simulated(arch=90, seed=seed) as device:
            results += calls.attention(layout, inputs, "triton", scale=0.3)
        launches += device.launches
    return results, launches


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault, monkeypatch):
    pattern, replacement, head_dim, how_many = FAULTS[fault]
    right, launches = run_forward(head_dim, 0)
    (ptx,) = {launch.ptx.read_text() for launch in launches if launch.name == "online_kernel"}
    whole, places = triton_device._program, list(re.finditer(pattern, ptx))

    def seen(place: re.Match[str]) -> str | None:
        broken = ptxsim.parse(ptx[: place.start()] + place.expand(replacement) + ptx[place.end() :])
        monkeypatch.setattr(
            triton_device, "_program", lambda path: broken if path.name == "online_kernel.ptx" else whole(path)
        )
        for seed in (0, 1, 2):
            try:
                got, _ = run_forward(head_dim, seed)
            except (IndexError, RuntimeError) as error:
                return str(error).split(": ")[-1]
            if any(not torch.equal(a, b) for a, b in zip(got, right, strict=True)):
                return "NaN" if any(t.isnan().any() for t in got) else "wrong numbers"
        return None

    found = [seen(place) for place in places]
    assert places and (all(found) if how_many == "all" else any(found)), found
