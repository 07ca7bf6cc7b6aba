"""tcgen05 and mbarrier in hand-written PTX: what a product gives, where it lies, what it must wait for."""

import numpy as np
import pytest

import ptxsim
from ptxsim.instructions.shared_matrix import Descriptor
from ptxsim.instructions.tensor_memory import Shape

M128_N8, M64_N8 = (1 << 4 | 1 << 7 | 1 << 10 | 1 << 17 | m // 16 << 24 for m in (128, 64))

# D (M x 8) = ones (M x 16) times ones + the zero that st puts there first; each thread returns a row's first column and
# what lies behind its last. A and B are one matrix of ones without a swizzle: every address in it will do.
PRODUCT = """
    .version 8.7 .target sm_100a .address_size 64
    .visible .entry k(.param .u64 result) {{
    .reg .u64 %out, %d<4>; .reg .b32 %t, %r<4>, %w, %a, %e, %f<16>; .reg .pred %p<4>, %done, %first, %leader;
    .shared .align 1024 .b8 buffer[8192]; .shared .align 8 .b64 bar; .shared .align 4 .b32 place;
    ld.param.u64 %out, [result]; mov.u32 %t, %tid.x; mul.wide.u32 %d0, %t, 8; add.s64 %out, %out, %d0;
    setp.lt.u32 %p0, %t, 32; setp.eq.u32 %first, %t, 0; setp.ne.u32 %p1, %t, %t;
    mov.u32 %r0, buffer; shl.b32 %r1, %t, 5; add.s32 %r1, %r0, %r1; mov.b32 %r2, 0x3F803F80;
    st.shared.v4.b32 [%r1], {{%r2, %r2, %r2, %r2}}; st.shared.v4.b32 [%r1+16], {{%r2, %r2, %r2, %r2}};
    {alloc} {init} {proxy} bar.sync 0;
    ld.shared.b32 %a, [place]; {relinquish}
    shr.u32 %w, %t, 5; shl.b32 %w, %w, 21; {lane} add.s32 %w, %w, %a;
    mov.b32 %f0, 0;
    tcgen05.st.sync.aligned.32x32b.x8.b32 [%w], {{%f0, %f0, %f0, %f0, %f0, %f0, %f0, %f0}};
    {wait_st} bar.sync 0;
    shr.u32 %r0, %r0, 4; cvt.u64.u32 %d1, %r0; or.b64 %d1, %d1, {layout};
    mov.b32 %e, {shape}; setp.eq.u32 %p2, %t, %t; {off}
    @%first tcgen05.mma.cta_group::1.kind::f16 [ %a + {column} ], %d1, %d1, %e, {disabled} %p2;
    {before_commit} {commit} {before_wait}
    again: mbarrier.try_wait.parity.shared::cta.b64 %done, [bar], {parity}; {loop}
    {read}
    {wait_ld}
    st.global.v2.b32 [%out], {{%f0, %f8}};
    bar.sync 0; {inval} {dealloc} ret; }}"""
READ = "tcgen05.ld.sync.aligned.32x32b.x16.b32 [REGISTERS], [%w];".replace(
    "[REGISTERS]", "{" + ", ".join(f"%f{i}" for i in range(16)) + "}"
)
RIGHT = {
    "alloc": "@%p0 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [place], 32;",
    "init": "@%first mbarrier.init.shared::cta.b64 [bar], 1;",
    "proxy": "fence.proxy.async.shared::cta;",
    "relinquish": "@%p0 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;",
    "lane": "",
    "wait_st": "tcgen05.wait::st.sync.aligned;",
    "layout": str(1 << 46 | 16 << 16 | 128 // 16 << 32),
    "shape": str(M128_N8),
    "off": "",
    "column": "0",
    "disabled": "",
    "before_commit": "",
    "commit": "@%first tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [bar];",
    "before_wait": "",
    "parity": "0",
    "loop": "@!%done bra.uni again;",
    "read": READ,
    "wait_ld": "tcgen05.wait::ld.sync.aligned;",
    "inval": "@%first mbarrier.inval.shared::cta.b64 [bar];",
    "dealloc": "@%p0 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %a, 32;",
}


def product(seed: int | None = 0, **change: str) -> np.ndarray:
    """(threads, 2): what the threads read of the first column and of one behind the last."""
    out = np.zeros((128, 2), np.float32)
    program = ptxsim.parse(PRODUCT.format(**RIGHT | change))
    ptxsim.launch(program, (1, 1, 1), (128, 1, 1), [out], seed=seed)
    return out


# The regular schedule and three in which warps run far apart and polls fail that could succeed.
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_a_product(seed):
    got = product(seed)
    assert (got[:, 0] == 16).all()
    assert np.isnan(got[:, 1]).all()  # allocated, and nobody wrote it


def test_64_rows_lie_in_every_other_16_lanes():
    got = product(shape=str(M64_N8))[:, 0].reshape(4, 2, 16)
    assert (got[:, 0] == 16).all() and (got[:, 1] == 0).all()
    got = product(shape=str(M64_N8), column=f"{16 << 16}")[:, 0].reshape(4, 2, 16)
    assert (got[:, 0] == 0).all() and (got[:, 1] == 16).all()


def test_a_negated_operand_and_lanes_that_are_left_as_they_are():
    assert (product(shape=str(M128_N8 | 1 << 13))[:, 0] == -16).all()
    got = product(off="mov.b32 %f9, 0; mov.b32 %f10, 6;", disabled="{%f10, %f9, %f9, %f9},")[:, 0]
    assert (got[1:3] == 0).all() and (np.delete(got, [1, 2]) == 16).all()


MMA = "@%first tcgen05.mma.cta_group::1.kind::f16 [ %a + 0 ], %d1, %d1, %e, %p2;"


def test_products_of_one_shape_add_up():
    assert (product(before_commit=MMA)[:, 0] == 32).all()
    assert (product(before_commit=MMA.replace("%p2;", "%p1;"))[:, 0] == 16).all()  # the predicate drops what was there


# Each allocation, fence, commit or wait left out or wrong; memory touched where only they order it.
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"alloc": "@%p0 st.shared.b32 [place], %t;"}, "disagree about an address|not allocated"),
        ({"alloc": RIGHT["alloc"].replace("32;", "48;")}, "power of two"),
        ({"alloc": RIGHT["relinquish"] + RIGHT["alloc"]}, "behind tcgen05.relinquish_alloc_permit"),
        ({"dealloc": ""}, "without tcgen05.dealloc"),
        ({"dealloc": RIGHT["dealloc"].replace("32;", "64;")}, "not allocated together"),
        ({"column": "25"}, "not allocated|out of bounds"),
        ({"lane": f"xor.b32 %w, %w, {32 << 16};"}, "each has 32 of its own"),
        ({"shape": str(M64_N8), "column": f"{8 << 16}"}, "64 rows at lane 8"),
        ({"shape": str(M128_N8 & ~(31 << 24))}, "M 0"),
        ({"layout": str(16 << 16 | 128 // 16 << 32)}, "expected 1 in bits 46-48"),
        ({"proxy": ""}, "without a fence.proxy.async"),
        ({"wait_st": ""}, "before the tcgen05.wait::st"),
        ({"wait_ld": ""}, "before the tcgen05.wait::ld"),
        ({"commit": ""}, "deadlock"),
        ({"parity": "1"}, "a product in flight"),
        ({"loop": ""}, "a product in flight"),
        ({"before_wait": READ}, "read while a product in flight writes"),
        ({"before_wait": "st.shared.b32 [%r1], %r2;"}, "while a product in flight reads it"),
        (
            {"before_wait": "@%first mbarrier.inval.shared::cta.b64 [bar];"},
            "ends while products will arrive|no mbarrier",
        ),
        ({"before_commit": MMA.replace("%e,", "%f11,"), "off": f"mov.b32 %f11, {M64_N8};"}, "of another shape"),
        ({"before_commit": MMA + RIGHT["commit"] + MMA, "off": ""}, "ends with products|uses it|in flight"),
        ({"init": ""}, "no mbarrier was initialised"),
        ({"init": RIGHT["init"] * 2}, "initialised twice"),
        ({"before_wait": "@%first st.shared.b32 [bar], %t;"}, "a store into an mbarrier"),
    ],
)
def test_what_a_product_needs(change, error):
    with pytest.raises((RuntimeError, IndexError, ValueError), match=error):
        for seed in range(4):  # of which some let a first poll fail
            product(seed, **change)


def test_descriptors():
    """Fields as the tables of the PTX ISA (9.7.16.4.1, 9.7.16.4.2) place them."""
    bits = 4096 // 16 | 8192 // 16 << 16 | 1024 // 16 << 32 | 1 << 46 | 2 << 61
    assert Descriptor.decode(bits, 1) == Descriptor(4096, 8192, 1024, 128)
    assert Descriptor.decode(bits ^ 6 << 61, 1).row == 64  # mode 4
    with pytest.raises(NotImplementedError, match="swizzle 1"):
        Descriptor.decode(bits ^ 3 << 61, 1)
    shape = Shape.decode(1 << 4 | 1 << 7 | 0 << 10 | 1 << 14 | 1 << 16 | 64 // 8 << 17 | 128 // 16 << 24, "f16")
    assert shape == Shape(128, 64, ("bf16", "f16"), -1, (False, True))
    with pytest.raises(NotImplementedError, match="not into f32"):
        Shape.decode(8 << 24 | 8 << 17, "f16")


POLL = """
    .version 8.7 .target sm_100a .address_size 64
    .visible .entry k(.param .u64 result) {{
    .reg .u64 %out, %d; .reg .b32 %t; .reg .f32 %f; .reg .pred %p0, %first, %done; .shared .align 8 .b64 bar;
    ld.param.u64 %out, [result]; mov.u32 %t, %tid.x; mul.wide.u32 %d, %t, 4; add.s64 %out, %out, %d;
    setp.lt.u32 %p0, %t, 32; setp.eq.u32 %first, %t, 0;
    @%first mbarrier.init.shared::cta.b64 [bar], {count}; bar.sync 0;
    @%p0 bra work;
    again: mbarrier.try_wait.parity.shared::cta.b64 %done, [bar], 0; @!%done bra again;
    bra end;
    work: @%first tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [bar];
    end: mov.f32 %f, 0f3F800000; st.global.f32 [%out], %f; ret; }}"""


# The regular schedule, in which the threads that poll are behind the others and would be chosen for ever, and two more.
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_threads_that_poll_give_way(seed):
    out = np.zeros(64, np.float32)
    ptxsim.launch(ptxsim.parse(POLL.format(count=1)), (1, 1, 1), (64, 1, 1), [out], seed=seed)
    assert (out == 1).all()
    with pytest.raises(RuntimeError, match="deadlock"):  # an arrival is missing
        ptxsim.launch(ptxsim.parse(POLL.format(count=2)), (1, 1, 1), (64, 1, 1), [out], seed=seed)
