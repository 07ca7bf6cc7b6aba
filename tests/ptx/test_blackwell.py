"""The shipped attention kernels compiled for sm_100 (tcgen05) and executed, matrix layouts one by one, and faults.

A wrong product, descriptor or place in tensor memory gives wrong numbers against fp64; a wait, fence, barrier, commit
or deallocation that is missing from the compiled kernel, or a wrong descriptor in it, is seen.
"""

import pytest
import tensor_core_cases as cases
import torch


@pytest.mark.parametrize(
    ("dtype", "shape", "flips"),
    [*cases.FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in cases.ALL if case not in cases.FAST)],
)
def test_layouts(dtype, shape, flips):
    assert cases.check_product(100, dtype, shape, flips).opcodes["tcgen05"]


# The head size of two groups of 64 columns takes longer and runs nothing else.
@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_forward(head_dim):
    launches = cases.check_forward(100, head_dim)
    assert all(launch.statistics.opcodes["tcgen05"] for launch in launches if launch.name == "online_kernel")


# Kernels by the head size that they multiply in tensor memory at; the others have tiles too small for it and take mma.
PRODUCTS = {
    "online_kernel": (32, 64, 80, 96, 128, 256),
    "mass_from_lse_kernel": (32, 64, 80, 96, 128, 256),
    "delta_kernel": (64, 80, 96, 128),
    "query_kernel": (64, 80, 96, 128),
}


# Rows of 128 and (256) of 64; fp32, whose products are not in tensor memory.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads", "key_heads"),
    [*cases.HEAD_SIZES, (torch.float32, 64, 7, 1)],
)
def test_attention(dtype, head_dim, heads, key_heads):
    launches = cases.check_attention(100, dtype, head_dim, heads, key_heads)
    for launch in launches:
        multiplied = dtype != torch.float32 and head_dim in PRODUCTS.get(launch.name, ())
        assert bool(launch.statistics.opcodes["tcgen05"]) == multiplied, launch.name


STRIDE = 1 << 46 | 2 << 61  # of a descriptor: what is fixed, and the 128-byte swizzle
# name: (pattern in the PTX of the forward kernel, what replaces it, head size). One place must be seen: some waits are
# covered by a later one before anything is overwritten, and peeled iterations of a loop may have nothing to do.
FAULTS = {
    "no wait::ld": (r"tcgen05\.wait::ld\.sync\.aligned;", "", 64),
    "no wait::st": (r"tcgen05\.wait::st\.sync\.aligned;", "", 64),
    "no commit": (r"@%p\d+ tcgen05\.commit[^;]*;", "", 64),
    "a poll instead of a wait": (r"@!complete bra\.uni waitLoop;", "", 64),
    "no wait for a product": (r"mbarrier\.try_wait[^;]*;\s*@!complete bra\.uni waitLoop;", "", 64),
    "the other parity": (r"(mbarrier\.try_wait\.parity\S+ complete, \S+), (%r\d+);",
                         r"{ .reg .b32 %other; xor.b32 %other, \2, 1; \1, %other; }", 64),
    "no dealloc": (r"@%p\d+ tcgen05\.dealloc[^;]*;", "", 64),
    "too few columns": (r"(tcgen05\.(?:de)?alloc\.[^,]*), 256;", r"\1, 64;", 64),
    "no proxy fence": (r"fence\.proxy\.async\.shared::cta;", "", 64),
    "no copy wait": (r"cp\.async\.wait_group\s+0;", "", 64),
    "no barrier": (r"bar\.sync\s+0;", "", 64),
    "half the stride": (rf"{STRIDE | 64 << 32}", str(STRIDE | 32 << 32), 64),
    "64-byte swizzle": (rf"{STRIDE | 64 << 32}", str(1 << 46 | 4 << 61 | 64 << 32), 64),
    "a descriptor of wgmma": (rf"{STRIDE | 64 << 32}", str(1 << 62 | 64 << 32), 64),
    "half the leading offset": (rf"{STRIDE | 64 << 32 | 512 << 16}", str(STRIDE | 64 << 32 | 256 << 16), 128),
    "B not transposed": (rf"{0x8110490}", str(0x8100490), 64),
    "half the columns": (rf"{0x8100490}", str(0x8080490), 64),
    "fp16": (rf"{0x8100490}", str(0x8100010), 64),
    "A negated": (rf"{0x8100490}", str(0x8102490), 64),
    "the next columns": (r"(tcgen05\.mma\S+ \[ %r\d+) \+ 0 \], \[", r"\1 + 8 ], [", 64),
    "lanes of another warp": (r"(tcgen05\.ld[^\[]*\[%r\d+) \+ 0", rf"\1 + {32 << 16}", 64),
}  # fmt: skip
# Seen by the first run: with the other tests.
QUICK = ("no dealloc",)


@pytest.mark.parametrize("fault", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAULTS])
def test_fault_is_seen(fault, monkeypatch):
    pattern, replacement, head_dim = FAULTS[fault]
    assert any(cases.faults_seen(monkeypatch, 100, head_dim, pattern, replacement))
