"""The shipped attention kernels compiled for sm_90 (wgmma) and executed, matrix layouts one by one, and faults.

A wrong product, descriptor or fragment gives wrong numbers against fp64; a wait, fence or barrier that is missing from
the compiled kernel, or a wrong descriptor in it, is seen.
"""

import pytest
import tensor_core_cases as cases
import torch


@pytest.mark.parametrize(
    ("dtype", "shape", "flips"),
    [*cases.FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in cases.ALL if case not in cases.FAST)],
)
def test_layouts(dtype, shape, flips):
    statistics = cases.check_product(90, dtype, shape, flips)
    assert statistics.opcodes["wgmma"] or shape[1] < 16


# The two head sizes of models: one and two groups of 64 columns.
@pytest.mark.parametrize("head_dim", [64, 128])
def test_forward(head_dim):
    launches = cases.check_forward(90, head_dim)
    assert all(launch.statistics.opcodes["wgmma"] for launch in launches if launch.name == "online_kernel")


# One and two groups of 64 columns; and fp32.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads", "key_heads"),
    [*cases.HEAD_SIZES, (torch.float32, 32, 7, 1)],
)
def test_attention(dtype, head_dim, heads, key_heads):
    launches = cases.check_attention(90, dtype, head_dim, heads, key_heads)
    for name in ("online_kernel", "mass_from_lse_kernel") if dtype != torch.float32 else ():
        assert next(launch for launch in launches if launch.name == name).statistics.opcodes["wgmma"]


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


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault, monkeypatch):
    pattern, replacement, head_dim, how_many = FAULTS[fault]
    found = list(cases.faults_seen(monkeypatch, 90, head_dim, pattern, replacement))
    assert all(found) if how_many == "all" else any(found), found
