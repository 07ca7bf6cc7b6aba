"""wgmma in hand-written PTX: where a descriptor's matrix lies, what a product gives, and what must order it."""

import numpy as np
import pytest

import ptxsim
from ptxsim.instructions.shared_matrix import Descriptor

STRIDE = 1024 // 16 << 32  # bytes between blocks of 8 rows, / 16


def descriptor(mode: int, *, start: int = 0, leading: int = 0, stride: int = 0) -> Descriptor:
    return Descriptor.decode(mode << 62 | stride // 16 << 32 | leading // 16 << 16 | start // 16)


# Addresses written by hand from the canonical layouts of the PTX ISA (9.7.15.5): a 128-byte swizzle moves chunk c of
# row r to chunk c ^ (r % 8), a 64-byte one to c ^ (r // 2 % 4), a 32-byte one to c ^ (r // 4 % 2).
@pytest.mark.parametrize(
    ("mode", "row", "first", "fifth"),
    [(1, 128, [0, 16], [5 * 128 + 16 * 5, 5 * 128 + 16 * 4]), (2, 64, [0, 16], [5 * 64 + 32, 5 * 64 + 48]),
     (3, 32, [0, 16], [5 * 32 + 16, 5 * 32])],
)  # fmt: skip
def test_chunks_along_k(mode, row, first, fifth):
    chunks = descriptor(mode, start=4096, stride=8 * row).chunks(16, transposed=False)
    assert chunks.shape == (16, 2)
    assert (chunks[0] - 4096).tolist() == first
    assert (chunks[5] - 4096).tolist() == fifth
    assert (chunks[8] - 4096 - 8 * row).tolist() == first  # the next block of 8 rows


def test_chunks_without_a_swizzle():
    plain = descriptor(0, leading=256, stride=128)
    assert plain.chunks(16, transposed=False)[9].tolist() == [128 + 16, 128 + 16 + 256]
    # Transposed, leading and stride change places.
    assert plain.chunks(16, transposed=True)[9].tolist() == [256 + 16, 256 + 16 + 128]


def test_chunks_along_n():
    chunks = descriptor(1, leading=8192, stride=1024).chunks(128, transposed=True)
    assert chunks.shape == (16, 16)
    assert chunks[0, 8] == 8192 and chunks[8, 0] == 1024
    assert chunks[3, 2] == 3 * 128 + 16 * (2 ^ 3)


def test_a_base_offset_is_refused():
    with pytest.raises(NotImplementedError, match="base offset"):
        Descriptor.decode(1 << 62 | 1 << 49)


# D (64 x 8) of ones (64 x 16) times ones: 16 everywhere. A and B are one matrix of ones without a swizzle, so that
# every address in it will do; the accumulators start as 1.
PRODUCT = """
    .version 8.3 .target sm_90a .address_size 64
    .visible .entry k(.param .u64 result) {{
    .reg .u64 %out, %d<4>; .reg .b32 %t, %r<4>; .reg .f32 %f<4>; .reg .pred %p;
    .shared .align 1024 .b8 buffer[4096];
    ld.param.u64 %out, [result]; mov.u32 %t, %tid.x; mul.wide.u32 %d0, %t, 16; add.s64 %out, %out, %d0;
    mov.u32 %r0, buffer; shl.b32 %r1, %t, 5; add.s32 %r1, %r0, %r1; mov.b32 %r2, 0x3F803F80;
    st.shared.v4.b32 [%r1], {{%r2, %r2, %r2, %r2}}; st.shared.v4.b32 [%r1+16], {{%r2, %r2, %r2, %r2}};
    {proxy} bar.sync 0;
    mov.f32 %f0, 0f3F800000; mov.f32 %f1, 0f3F800000; mov.f32 %f2, 0f3F800000; mov.f32 %f3, 0f3F800000;
    shr.u32 %r0, %r0, 4; cvt.u64.u32 %d1, %r0; or.b64 %d1, %d1, {layout};
    {fence}
    {after_fence}
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f0, %f1, %f2, %f3}}, %d1, %d1, 1, 1, 1, 0, 0;
    {commit} {before_wait} {wait}
    st.global.v4.f32 [%out], {{%f0, %f1, %f2, %f3}};
    ret; }}"""
RIGHT = {
    "proxy": "fence.proxy.async.shared::cta;",
    "layout": str(16 << 16 | 128 // 16 << 32),
    "fence": "wgmma.fence.sync.aligned;",
    "after_fence": "",
    "commit": "wgmma.commit_group.sync.aligned;",
    "before_wait": "",
    "wait": "wgmma.wait_group.sync.aligned 0;",
}


def product(**change: str) -> np.ndarray:
    out = np.zeros((128, 4), np.float32)
    ptxsim.launch(ptxsim.parse(PRODUCT.format(**RIGHT | change)), (1, 1, 1), (128, 1, 1), [out], seed=0)
    return out


def test_a_product():
    assert (product() == 17).all()


def test_an_accumulator_read_before_the_wait_is_nan():
    read_early = "st.global.v4.f32 [%out], {%f0, %f1, %f2, %f3};"
    late = RIGHT["wait"].replace("0;", "0; ret;")
    assert np.isnan(product(before_wait=read_early, wait=late)).all()


# Each fence, commit or wait left out; registers and shared memory touched where only they order it.
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"proxy": ""}, "without a fence.proxy.async"),
        ({"fence": ""}, "without a wgmma.fence"),
        ({"after_fence": "add.f32 %f1, %f1, %f1;"}, "after the last wgmma.fence"),
        ({"before_wait": "add.f32 %f1, %f1, %f1;"}, "while a product accumulates into it"),
        ({"before_wait": "st.shared.b32 [%r1], %r2;"}, "while a product in flight reads it"),
        ({"wait": ""}, "products in flight"),
        ({"commit": ""}, "products in flight"),
    ],
)
def test_what_orders_a_product(change, error):
    with pytest.raises(RuntimeError, match=error):
        product(**change)


def simple(body: str) -> np.ndarray:
    out = np.zeros(32, np.float32)
    text = f""".version 8.6 .target sm_100 .address_size 64
    .visible .entry k(.param .u64 result) {{ .reg .u64 %out, %d; .reg .b32 %t; .reg .f32 %f<4>; .reg .b16 %h<2>;
    .reg .pred %p; ld.param.u64 %out, [result]; mov.u32 %t, %tid.x; mul.wide.u32 %d, %t, 4; add.s64 %out, %out, %d;
    {body} st.global.f32 [%out], %f0; ret; }}"""
    ptxsim.launch(ptxsim.parse(text), (1, 1, 1), (32, 1, 1), [out])
    return out


def test_mixed_precision_takes_each_operand_in_its_type():
    """add.f32.bf16 d, a, c of sm_100: a is bf16, c and d are f32."""
    body = "mov.b16 %h0, 0x3F80; mov.f32 %f1, 0f3DCCCCCD; add.rn.f32.bf16 %f0, %h0, %f1;"
    assert (simple(body) == np.float32(1) + np.float32(0.1)).all()


# A product, a minimum, and the conversion the other way round, none of which the ISA has.
@pytest.mark.parametrize("instruction", ["mul.rn.f32.bf16 %f0, %h0, %f1;", "min.f32.f16 %f0, %h0, %f1;",
                                         "add.rn.bf16.f32 %f0, %h0, %f1;"])  # fmt: skip
def test_two_types_where_one_is_known_are_refused(instruction):
    with pytest.raises(NotImplementedError, match="expected one type"):
        simple(instruction)


def test_labels_belong_to_their_scope():
    """Inline assembly declares one label several times; a branch means the innermost around it."""
    body = """mov.f32 %f0, 0f00000000; mov.f32 %f1, 0f3F800000;
    { bra.uni done; mov.f32 %f0, 0f7F800000; done: add.f32 %f0, %f0, %f1; }
    { bra.uni done; mov.f32 %f0, 0f7F800000; done: add.f32 %f0, %f0, %f1; }
    bra.uni end; mov.f32 %f0, 0f7F800000; end: add.f32 %f0, %f0, %f1;"""
    assert (simple(body) == 3).all()


def test_a_label_out_of_reach_is_an_error():
    with pytest.raises(ValueError, match="no label 'inner'"):
        ptxsim.parse(".version 8.0 .target sm_80 .visible .entry k() { { inner: ret; } bra inner; ret; }")
