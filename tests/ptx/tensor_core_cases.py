"""Shared by test_hopper.py and test_blackwell.py: products of every layout, small attention layouts, faults in PTX."""

import re
from collections.abc import Iterator

import attention_layouts as layouts
import backend_calls as calls
import torch
import triton
import triton.language as tl

import ptxsim
from ptxsim import triton_device


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
# Every head size that has products of its own shape, padded ones among them, and both 16-bit types.
HEAD_SIZES = [
    (torch.bfloat16, 32, 7, 1),
    (torch.bfloat16, 64, 14, 2),
    (torch.bfloat16, 80, 3, 1),
    (torch.bfloat16, 128, 7, 1),
    (torch.bfloat16, 256, 2, 2),
    (torch.float16, 96, 4, 2),
]


def check_product(arch: int, dtype: torch.dtype, shape, flips) -> ptxsim.Statistics:
    """A product compiled for ``arch`` against fp64."""
    M, N, K = shape
    a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    if dtype == torch.float32:  # exact in tf32
        a, b = ((t.view(torch.int32) & -0x2000).view(torch.float32) for t in (a, b))
    c = torch.full((M, N), float("nan"))
    with triton_device.simulated(arch=arch, seed=0) as device:
        inputs = [t.T.contiguous() if flip else t for t, flip in zip((a, b), flips, strict=True)]
        product_kernel[(1,)](*inputs, c, M, N, K, *flips)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)
    return device.launches[0].statistics


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


def run_forward(arch: int, head_dim: int, seed: int):
    results, launches = [], []
    for layout in small_layouts():
        inputs = calls.tensors(layout, 7, 1, head_dim, torch.bfloat16)
        with triton_device.simulated(arch=arch, seed=seed) as device:
            results += calls.attention(layout, inputs, "triton", scale=0.3)
        launches += device.launches
    return results, launches


def check_forward(arch: int, head_dim: int) -> list[triton_device.Launch]:
    """Mass and attention of two small layouts: tiles without a mask, with one, and both."""
    launches = []
    for layout in small_layouts():
        inputs = calls.tensors(layout, 7, 1, head_dim, torch.bfloat16)
        grads = calls.upstream(layout, inputs)
        expected = calls.expected_attention(layout, inputs, scale=0.3, grads=grads)
        framework = calls.attention(layout, inputs, "torch", scale=0.3)
        with triton_device.simulated(arch=arch, seed=0) as device:
            got = calls.attention(layout, inputs, "triton", scale=0.3)
        calls.compare(got, expected, framework)
        launches += device.launches
    return launches


def check_attention(arch: int, dtype: torch.dtype, head_dim: int, heads: int, key_heads: int):
    """Forward, replay of small frames and gradients on hostile layouts; two schedules give the same bits."""
    layout, scale = layouts.hostile(), 0.21
    inputs = calls.tensors(layout, heads, key_heads, head_dim, dtype)
    grads = calls.upstream(layout, inputs)
    expected = calls.expected_attention(layout, inputs, scale=scale, grads=grads)
    framework = calls.attention(layout, inputs, "torch", scale=scale, grads=grads)
    results = []
    for seed in (0, 1):
        with triton_device.simulated(arch=arch, seed=seed) as device:
            results.append(calls.attention(layout, inputs, "triton", scale=scale, grads=grads))
    calls.compare(results[0], expected, framework)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return device.launches


def faults_seen(monkeypatch, arch: int, head_dim: int, pattern: str, replacement: str) -> Iterator[str | None]:
    """What a fault shows as (None: as nothing), put in one place after the other of the compiled forward kernel."""
    right, launches = run_forward(arch, head_dim, 0)
    (ptx,) = {launch.ptx.read_text() for launch in launches if launch.name == "online_kernel"}
    whole = triton_device._program

    def seen(place: re.Match[str]) -> str | None:
        broken = ptxsim.parse(ptx[: place.start()] + place.expand(replacement) + ptx[place.end() :])
        monkeypatch.setattr(
            triton_device, "_program", lambda path: broken if path.name == "online_kernel.ptx" else whole(path)
        )
        for seed in (0, 1, 2):
            try:
                got, _ = run_forward(arch, head_dim, seed)
            except (IndexError, RuntimeError, ValueError) as error:
                return str(error).split(": ")[-1]
            if any(not torch.equal(a, b) for a, b in zip(got, right, strict=True)):
                return "NaN" if any(t.isnan().any() for t in got) else "wrong numbers"
        return None

    places = list(re.finditer(pattern, ptx))
    assert places, f"{pattern!r} is not in the PTX: the fault must follow the compiler"
    yield from map(seen, places)
